"""Suppressing adapters for a measurement."""

import pytest
import torch

from irtune.adapters import add_adapters, suppressed
from irtune.config import AdapterConfig, ModelConfig
from irtune.models import load_classifier

pytestmark = pytest.mark.quick


@pytest.fixture
def model_and_table(llama):
    classifier = load_classifier(ModelConfig(name_or_path=str(llama), dtype="float32"), ["a", "b"])
    model, table = add_adapters(classifier, AdapterConfig(r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval(), table


def test_suppressed_adapters_act_less_and_come_back_bit_for_bit(model_and_table):
    model, table = model_and_table
    batch = {"input_ids": torch.arange(4, 16).reshape(2, 6)}
    with torch.no_grad():
        before = model(**batch).logits
        with suppressed(table, [1, 3]):
            during = model(**batch).logits
        with suppressed(table, [1, 3], factor=1.0):
            same = model(**batch).logits
        after = model(**batch).logits
    assert not torch.equal(before, during)
    assert torch.equal(before, same)
    assert torch.equal(before, after)


def test_scaling_comes_back_when_an_exception_flies(model_and_table):
    _, table = model_and_table
    module = table.modules[2].self_attn.q_proj
    before = dict(module.scaling)

    def fail():
        with suppressed(table, [2]):
            assert module.scaling["default"] == before["default"] * 0.25
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert module.scaling == before
