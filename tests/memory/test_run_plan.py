"""The plan of a run: in words, with what to change where it cannot fit, and never a reason not to run."""

import logging

import pytest
import torch

from irtune.memory import compare, describe, estimate_memory, shortage
from tests.memory.test_planner import LABELS, config_for

ZERO_2 = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}


@pytest.mark.quick
def test_a_run_is_planned_in_words(llama):
    plan = estimate_memory(config_for(llama), ZERO_2, 2, device="cpu", labels=LABELS)
    text = describe(plan)
    assert f"{plan.estimate.total / 2**20:,.1f} MiB" in text.splitlines()[-1]
    assert all(name in text for name in ("ZeRO 2", "process before", "optimizer state", "activations", "parked state"))
    assert plan.estimate.process > 100 * 2**20  # Python with torch
    assert shortage(plan) is None  # nobody said how much there is
    total = plan.estimate.total
    assert "(+10%), with freed memory" in compare(plan, round(1.1 * total))
    on_gpu = estimate_memory(config_for(llama), ZERO_2, 2, 80 * 2**30)
    assert "process before" not in describe(on_gpu) and shortage(on_gpu) is None
    assert compare(on_gpu, round(0.8 * on_gpu.estimate.total)).endswith("(-20%)")


@pytest.mark.quick
def test_a_run_that_cannot_fit_is_told_so_with_what_to_change(llama):
    config = config_for(llama)
    config.optim.micro_batch_size = 100_000
    warning = shortage(estimate_memory(config, ZERO_2, 1, 8 * 2**30))
    largest = int(warning.partition("optim.micro_batch_size ")[2].split()[0])
    assert 1000 < largest < 100_000
    config.optim.micro_batch_size = largest
    assert shortage(estimate_memory(config, ZERO_2, 1, 8 * 2**30)) is None
    config.optim.micro_batch_tokens = 100_000 * config.data.max_length
    by_tokens = shortage(estimate_memory(config, ZERO_2, 1, 8 * 2**30))
    assert f"optim.micro_batch_tokens {largest * config.data.max_length} with more" in by_tokens
    config.optim.micro_batch_tokens = largest * config.data.max_length
    assert shortage(estimate_memory(config, ZERO_2, 1, 8 * 2**30)) is None
    config.optim.micro_batch_tokens = None
    hopeless = shortage(estimate_memory(config, ZERO_2, 1, 2**20))
    assert "optim.micro_batch_size" not in hopeless and "model.quantization nf4" in hopeless


@pytest.mark.quick
def test_a_model_that_cannot_be_planned_is_no_reason_not_to_run(llama, monkeypatch, caplog):
    def needs_values(*_, **__):
        return bool(torch.ones(1, device="meta"))

    monkeypatch.setattr("irtune.memory.meta_step._batch", needs_values)
    with caplog.at_level(logging.WARNING, "irtune"):
        assert estimate_memory(config_for(llama), ZERO_2, 1) is None
    assert f"no memory plan: {llama} cannot be counted without weights (RuntimeError: " in caplog.text
