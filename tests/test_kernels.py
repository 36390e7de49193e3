"""Kernels that a run may take instead of the model's own."""

import logging

import pytest
import torch

from irtune import kernels
from irtune.config import load_config
from irtune.errors import ConfigError
from irtune.kernels import add_fused_kernels, attention_kernel, compile_layers
from tests import tiny
from tests.ranks import run_ranks

SELECTIONS = [[1], [0]]


@pytest.mark.quick
def test_a_missing_package_is_named_with_what_is_used_instead(caplog):
    with caplog.at_level(logging.WARNING, "irtune"):
        assert attention_kernel("flash_attention_2", torch.float32) == "sdpa"
    assert "needs the package flash-attn, which is not installed here; sdpa is used instead" in caplog.text


@pytest.mark.quick
@pytest.mark.parametrize(
    ("gpu", "reason"),
    [(False, "a GPU, and there is none"), (True, "the package liger-kernel (0.3.0 or newer), which is not installed")],
)
def test_fused_kernels_fall_back_aloud(gpu, reason, monkeypatch, caplog):
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: gpu)
    model = torch.nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING, "irtune"):
        add_fused_kernels(model)
    assert f"model.fused_kernels needs {reason}" in caplog.text and "own kernels are used instead" in caplog.text


@pytest.mark.quick
def test_compile_is_refused_where_it_cannot_be(tmp_path):
    with pytest.raises(ConfigError) as refusal:
        load_config(
            [
                f"--data.path={tmp_path}",
                "--model.compile=true",
                "--model.quantization=nf4",
                f"--deepspeed={tiny.engine_json(tmp_path, 3)}",
            ]
        )
    for reason in ("zero_optimization.stage 3", "model.quantization nf4"):
        assert f"model.compile does not go with {reason}" in str(refusal.value)


def _compiled(model, compiled):
    rig = tiny.Rig(model, 2)
    if compiled:
        compile_layers(rig.table.modules)
    losses = []
    for selected in SELECTIONS:
        rig.engine.module.train()
        rig.engine.reselect(selected)
        losses += rig.train(2)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    weights = [layer.tolist() for layer in rig.layer_weights()]  # plain numbers: tensors would outlive their process
    rig.close()
    return losses, weights, graphs


def test_compiled_layers_train_as_others_do_over_selections(tmp_path):
    model = tiny.save_model(tmp_path / "model", layers=2)
    (plain, weights, none), (compiled, others, graphs) = (run_ranks(_compiled, 1, model, flag)[0] for flag in (0, 1))
    assert none == 0 and 1 <= graphs <= 6  # one for each combination, not for each layer and selection
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(plain), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(others, weights, rtol=1e-3, atol=1e-4)
