"""Recomputation: the same numbers, less memory, and nothing below the lowest trained layer."""

import contextlib

import pytest
import torch

from irtune.memory.measure import LiveTensors
from irtune.selection.scores import LayerScores
from tests.support.ranks import run_cases, run_ranks
from tests.support.tiny import Rig


def train_with(model, stage, recompute, scored):
    rig = Rig(model, stage, recompute=recompute)
    rig.engine.module.train()
    scores = LayerScores(rig.table, "rms", rig.engine.device)
    losses, seen = [], []
    for selected in ([4, 5], [1, 4], [3]):
        rig.engine.reselect(selected)
        with rig.engine.reaching_all_layers() if scored else contextlib.nullcontext():
            losses += rig.train(2, scores if scored else None)
        if scored:
            seen.append(scores.reduce())
    weights = [layer.tolist() for layer in rig.layer_weights()]
    rig.close()
    return losses, weights, seen


# The two kinds of recomputation; in the runs of every day, the other tests here look at that of ZeRO 3.
@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_recomputing_and_scoring_change_no_number(llama, stage):
    kinds = [(False, False), (True, False), (False, True), (True, True)]
    plain, *others = run_cases(train_with, 2, [(llama, stage, *kind) for kind in kinds])
    for (_, scored), reports in zip(kinds[1:], others, strict=True):
        for (losses, weights, seen), (wanted_losses, wanted_weights, _) in zip(reports, plain, strict=True):
            assert losses == wanted_losses
            assert weights == wanted_weights
            assert len(seen) == 3 * scored and all(score > 0 for scores in seen for score in scores)


def scores_of(model, stage, recompute):
    """Fresh scores of all layers while the top ones train; layers below them are recomputed to get them."""
    rig = Rig(model, stage)
    rig.engine.module.train()
    if not recompute:
        rig.engine.recompute.modules = []  # store everything
    rig.engine.reselect([5])
    scores = LayerScores(rig.table, "rms", rig.engine.device)
    with rig.engine.reaching_all_layers():
        rig.train(1, scores)
    result = scores.reduce()
    rig.close()
    return result


@pytest.mark.parametrize("stage", [0, 3])
def test_recomputed_layers_have_the_same_scores(llama, stage):
    recomputed, stored = run_cases(scores_of, 2, [(llama, stage, True), (llama, stage, False)])
    assert recomputed == stored


def step_bytes(model, stage, selected, recompute, scored):
    """Live bytes after a forward pass, and at the peak of forward and backward; which layer outputs carry a graph."""
    rig = Rig(model, stage, recompute=recompute, zero={"reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 1000})
    rig.engine.module.train()
    rig.engine.reselect(selected)
    scores = LayerScores(rig.table, "rms", rig.engine.device)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(4, 60, (8, 48), generator=generator),
        "attention_mask": torch.ones(8, 48, dtype=torch.long),
        "labels": torch.randint(0, 3, (8,), generator=generator),
    }
    graphs = []

    def note(_module, _args, output):
        graphs.append((output[0] if isinstance(output, tuple) else output).requires_grad)

    handles = [module.register_forward_hook(note) for module in rig.table.modules]
    with LiveTensors([*rig.engine.module.parameters()]) as live, contextlib.ExitStack() as stack:
        if scored:
            stack.enter_context(rig.engine.reaching_all_layers())
            stack.enter_context(scores.micro_batch(batch["attention_mask"], all_layers=True, factor=1.0))
        rig.engine.forward_backward(batch)
    for handle in handles:
        handle.remove()
    rig.engine.step(0.01)
    rig.close()
    return live.peak, graphs[: len(rig.table.modules)]


@pytest.mark.parametrize("stage", [2, 3])
def test_layers_below_the_lowest_trained_one_stay_out_of_the_backward_pass(llama, stage):
    ((stored, plain),) = run_ranks(step_bytes, 1, llama, stage, [3, 4, 5], False, False)
    ((recomputed, graphs),) = run_ranks(step_bytes, 1, llama, stage, [3, 4, 5], True, False)
    assert plain == graphs == [False, False, False, True, True, True]
    assert recomputed < 0.75 * stored


def prompt_bytes(model, recompute):
    """Live bytes at the peak of a step in which a prompt trains, before all layers, and none of them."""
    rig = Rig(
        model, 2, recompute=recompute, adapter={"type": "prompt", "num_tokens": 4}, zero={"reduce_bucket_size": 1000}
    )
    rig.engine.module.train()
    rig.engine.reselect([])
    batch = {
        "input_ids": torch.full((8, 48), 7),
        "attention_mask": torch.ones(8, 48, dtype=torch.long),
        "labels": torch.zeros(8, dtype=torch.long),
    }
    with LiveTensors([*rig.engine.module.parameters()]) as live:
        rig.engine.forward_backward(batch)
    rig.engine.step(0.01)
    rig.close()
    return live.peak


def test_a_prompt_below_the_layers_has_them_recomputed_too(llama):
    (stored,), (recomputed,) = (run_ranks(prompt_bytes, 1, llama, recompute) for recompute in (False, True))
    assert recomputed < 0.5 * stored


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("selected", [[4, 5], [0, 5]])
def test_a_step_that_scores_all_layers_needs_no_more_memory(llama, stage, selected):
    ((normal, _),) = run_ranks(step_bytes, 1, llama, stage, selected, False, False)
    ((scored, graphs),) = run_ranks(step_bytes, 1, llama, stage, selected, False, True)
    assert graphs == [True] * 6  # gradients reached every layer
    assert scored <= 1.01 * normal
