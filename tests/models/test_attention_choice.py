"""Kernels are taken only where a model's class declares what they need."""

import logging

import pytest
import torch

from irtune.adapters.build import add_adapters
from irtune.commands import plan
from irtune.config import AdapterConfig, ModelConfig
from irtune.errors import ModelError
from irtune.models import kernels, load_classifier
from irtune.models.kernels.attention import CPU_ATTENTION
from tests.support import zoo

pytestmark = pytest.mark.quick
# The attention of a bf16 model on a CPU, where sdpa, the default, is asked for.
CHOSEN = {"qwen2": CPU_ATTENTION, "bert": CPU_ATTENTION, "gemma2": "eager", "bloom": "eager", "mpnet": "eager",
          "deberta2": "eager", "falcon": "sdpa", "jamba": "sdpa"}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("zoo")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel for CPUs is not taken where there is a GPU")
@pytest.mark.parametrize("name", CHOSEN)
def test_each_class_gets_an_attention_that_it_has(models, name, caplog):
    kernels._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "irtune"):
        classifier = load_classifier(ModelConfig(name_or_path=str(zoo.build(name, models))), list(zoo.LABELS))
        load_classifier(ModelConfig(name_or_path=str(zoo.build(name, models))), list(zoo.LABELS))
    assert classifier.model.config._attn_implementation == CHOSEN[name]
    said = [record.getMessage() for record in caplog.records if "attention" in record.getMessage()]
    kind = type(classifier.model).__name__
    expected = {
        CPU_ATTENTION: [],
        "eager": [f"{kind} has no sdpa attention in transformers; its own (eager) is used instead"],
        "sdpa": [f"{kind} takes no other attention than its own, and keeps it on this CPU"],
    }
    assert said == expected[CHOSEN[name]]


@pytest.mark.parametrize("name", ["bloom", "gemma2", "falcon", "qwen2"])
def test_the_first_token_does_not_see_the_last(models, name):
    classifier = load_classifier(ModelConfig(name_or_path=str(zoo.build(name, models))), list(zoo.LABELS))
    body = getattr(classifier.model, classifier.model.base_model_prefix).train()
    for part in body.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 8, 20]])
    with torch.no_grad():
        states = body(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(states[0, :4], states[1, :4], rtol=0.02, atol=0.02)
    assert not torch.allclose(states[0, 4], states[1, 4], atol=0.1)


def test_prefixes_are_refused_where_no_attention_can_have_them(models):
    classifier = load_classifier(ModelConfig(name_or_path=str(zoo.build("bloom", models))), list(zoo.LABELS))
    with pytest.raises(ModelError, match="BloomForSequenceClassification does not have one attention per layer"):
        add_adapters(classifier, AdapterConfig(type="prefix"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["falcon", "deberta2", "mixtral", "mpnet"])
def test_plans_are_made_for_models_that_keep_their_attention(models, name, dtype, capsys):
    folder = zoo.build(name, models)
    assert plan.main([f"--model.name_or_path={folder}", f"--model.dtype={dtype}", "--data.max_length=32"]) == 0
    assert f"{folder}: 4 layers" in capsys.readouterr().out


def test_a_plan_that_cannot_be_made_says_why(models):
    with pytest.raises(ModelError, match=r"xlnet cannot be counted without weights \(RuntimeError: .*\)$"):
        plan.main([f"--model.name_or_path={zoo.build('xlnet', models)}", "--data.max_length=32"])
