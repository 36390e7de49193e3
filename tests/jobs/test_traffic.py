"""What crosses ranks in a step, counted at torch.distributed: the trained parameters, L numbers, and nothing else."""

import collections
import functools

import pytest
import torch
import torch.distributed as dist

from irtune.selection.scores import LayerScores
from tests.support import tiny
from tests.support.ranks import run_ranks

# Name of a collective and which of its arguments holds what one rank hands in.
HANDED_IN = {
    "all_reduce": 0,
    "reduce": 0,
    "broadcast": 0,
    "reduce_scatter_tensor": 1,
    "all_gather_into_tensor": 1,
    "all_gather": 1,
}
OWN_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
HANDED_IN[OWN_GATHER] = 1
SELECTED = [1, 4]


class Traffic:
    """Counts elements that this rank hands to collectives, by collective; scalars are counted apart."""

    def __init__(self):
        self.elements: collections.Counter[str] = collections.Counter()
        self.scalars = 0
        for name, position in HANDED_IN.items():
            setattr(dist, name, self._counted(getattr(dist, name), name, position))

    def _counted(self, function, name, position):
        @functools.wraps(function)
        def counted(*args, **kwargs):
            tensors = [value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor)]
            handed = tensors[min(position, len(tensors) - 1)]
            if handed.numel() == 1:
                self.scalars += 1
            else:
                self.elements[name] += handed.numel()
            return function(*args, **kwargs)

        return counted

    def take(self) -> tuple[dict[str, int], int]:
        """What was counted since the last call."""
        counted = {name: count for name, count in self.elements.items() if count}, self.scalars
        self.elements.clear()
        self.scalars = 0
        return counted


def _traffic(model, stage):
    traffic = Traffic()  # before DeepSpeed, which looks some of the functions up only once
    rig = tiny.Rig(model, stage)
    scores = LayerScores(rig.table, "rms", torch.device("cpu"))
    rig.engine.reselect(SELECTED)
    rig.engine.module.train()
    rig.train(2)
    rig.train(1, scores)
    scores.reduce()
    traffic.take()
    found = {}
    rig.train(1)
    found["step"] = traffic.take()
    rig.train(1, scores)
    found["scoring step"] = traffic.take()
    scores.reduce()
    found["scores"] = traffic.take()
    rig.engine.reselect([0, 4, 5])
    found["selection"] = traffic.take()
    found["numel"], found["layers"] = rig.numel(SELECTED), rig.table.num_layers
    found["adapters"] = rig.numel(list(range(found["layers"])))
    every = sum(getattr(p, "ds_numel", p.numel()) for p in rig.engine.module.parameters())
    found["base"] = every - found["adapters"]
    rig.close()
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_sends_the_trained_parameters_and_a_selection_one_number_per_layer(stage, tmp_path):
    found = run_ranks(_traffic, 2, tiny.save_model(tmp_path / "model"), stage)[0]
    trained, layers = found["numel"], found["layers"]
    assert trained < found["adapters"] / 2  # else it would prove little
    step, scalars = found["step"]
    expected = {
        0: {"all_reduce": trained},
        1: {"all_reduce": trained, OWN_GATHER: trained // 2},  # a rank hands in its half
        2: {"all_reduce": trained, OWN_GATHER: trained // 2},
        3: {"reduce_scatter_tensor": trained},
    }[stage]
    gathered = step.pop("all_gather_into_tensor") if stage == 3 else 0
    assert step == expected
    assert gathered <= 2 * (found["base"] + found["adapters"]) / 2  # a rank's half, in the forward and backward pass
    assert scalars <= 5
    scoring, _ = found["scoring step"]
    assert {name: scoring[name] for name in expected} == expected  # gradients of frozen layers stay where they are
    assert found["scores"] == ({"all_reduce": layers + 1}, 0)  # L sums of squares and the number of micro-batches
    assert found["selection"] == ({}, 0)  # state moves between optimizers without communication
