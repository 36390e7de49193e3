"""Updates that are zero are left out, and no number changes."""

import pytest
import torch

from irtune.selection.scores import LayerScores
from tests.support import tiny
from tests.support.ranks import run_ranks

FIRST, SECOND = [1, 4], [2, 4]


def _idle_layers(rig):
    """Layers of which some adapter is left out."""
    modules = [[part for part in layer.modules() if hasattr(part, "lora_A")] for layer in rig.table.modules]
    return [number for number, parts in enumerate(modules) if any(part.disable_adapters for part in parts)]


def _run(model, stage, dtype, awake, adapter):
    rig = tiny.Rig(model, stage, dtype, adapter=adapter)
    if awake:
        rig.engine.idle.has_trained(range(rig.table.num_layers))
    rig.engine.module.train()
    scores = LayerScores(rig.table, "rms", torch.device("cpu"))
    losses, idle, found = [], [], []
    for selected in (FIRST, SECOND):
        rig.engine.reselect(selected)
        losses += rig.train(2)
        losses += rig.train(1, scores)
        found.append(scores.reduce())
        idle.append(_idle_layers(rig))
    rig.engine.module.eval()
    with torch.no_grad():
        logits = rig.engine.module(**{k: v for k, v in rig.batch(0).items() if k != "labels"}).logits.tolist()
    weights = [layer.tolist() for layer in rig.layer_weights()]
    rig.close()
    return {"losses": losses, "scores": found, "weights": weights, "logits": logits, "idle": idle}


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "mixed"), (2, "float32"), pytest.param(3, "mixed", marks=pytest.mark.slow)]
)
def test_what_is_left_out_changes_no_bit(stage, dtype, tmp_path):
    model = tiny.save_model(tmp_path / "model")
    short, whole = (run_ranks(_run, 2, model, stage, dtype, awake, {})[0] for awake in (False, True))
    assert short.pop("idle") == [[0, 2, 3, 5], [0, 3, 5]] and whole.pop("idle") == [[], []]
    assert short == whole
    assert all(score > 0 for scores in short["scores"] for score in scores)  # asleep layers are scored too


def test_updates_that_are_not_zero_are_never_left_out(tmp_path):
    model = tiny.save_model(tmp_path / "model")
    for adapter in ({"type": "pissa"}, {"type": "dora"}, {"dropout": 0.1}):
        assert run_ranks(_run, 1, model, 2, "float32", False, adapter)[0]["idle"] == [[], []], adapter
