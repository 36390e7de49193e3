"""A model of few bits that computes in fp32 for a while."""

import copy
import logging

import pytest
import torch
from transformers import FunnelConfig, FunnelForSequenceClassification

from irtune.adapters import guard
from irtune.adapters.build import add_adapters
from irtune.config import AdapterConfig, ModelConfig
from irtune.data import collate
from irtune.errors import ModelError
from irtune.models import load_classifier, widening
from tests.support import zoo

pytestmark = pytest.mark.quick
TEXTS = [{"input_ids": list(range(4, 4 + length))} for length in (5, 9, 30)]


def load(folder):
    return load_classifier(ModelConfig(name_or_path=str(folder), dtype="bfloat16"), list(zoo.LABELS))


@pytest.mark.parametrize("at_once", [1e6, 3e4])  # the whole model, or a layer
@pytest.mark.parametrize("name", ["qwen2", "deberta2", "jamba", "mixtral"])
def test_it_computes_what_a_wider_copy_does_and_is_as_before(tmp_path_factory, monkeypatch, name, at_once):
    monkeypatch.setattr(widening, "AT_ONCE", at_once)
    folder = tmp_path_factory.getbasetemp() / "widened"
    model = add_adapters(load(zoo.build(name, folder)), AdapterConfig(r=4))[0].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wide = copy.deepcopy(model).float()
    batch = collate(TEXTS, zoo.PAD)
    with torch.no_grad():
        with widening.in_fp32(model):
            found = model(**batch).logits
        torch.testing.assert_close(found, wide(**batch).logits, rtol=1e-4, atol=1e-4)
        assert model(**batch).logits.dtype == torch.bfloat16
    for key, value in model.state_dict().items():
        assert value.dtype == before[key].dtype and torch.equal(value, before[key]), key


def test_weights_are_as_before_where_the_model_fails(tmp_path):
    model = load(zoo.build("qwen2", tmp_path)).model
    with pytest.raises(IndexError), widening.in_fp32(model):
        model(input_ids=torch.tensor([[10**6]]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def funnel(folder):
    """A model whose pooling of places reads the padding, also where bf16 could have rounded as much."""
    torch.manual_seed(0)
    shape = {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [2, 2], "num_decoder_layers": 1}
    model = FunnelForSequenceClassification(
        FunnelConfig(**shape, vocab_size=zoo.VOCABULARY, pad_token_id=zoo.PAD, id2label=dict(enumerate(zoo.LABELS)))
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    return folder


def test_the_guard_takes_rounding_for_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "SAME_SHAPE", {torch.bfloat16: 1e-3})  # these two differ by 2 %
    monkeypatch.setattr(guard, "_other_padding", lambda _model: torch.no_grad())
    for name in ("modernbert", "qwen2"):
        guard.watch(load(zoo.build(name, tmp_path)), TEXTS, patient=True)


def test_the_guard_sees_what_rounding_could_have_made_and_did_not(tmp_path, monkeypatch, caplog):
    classifier = load(funnel(tmp_path))
    with pytest.raises(ModelError, match=r"FunnelForSequenceClassification .* alone .* \(a difference of 1?\d%\)"):
        guard.watch(classifier, TEXTS, patient=True)
    monkeypatch.setattr(guard, "SECONDS", 1e6)
    monkeypatch.setattr(guard, "MORE_PASSES", 1e12)
    with caplog.at_level(logging.INFO, "irtune"):
        assert guard.watch(classifier, TEXTS).hurried
    assert "would take too long here: `python -m irtune validate` does it" in caplog.text
