"""`model.start_from`: a run that begins with what another has learnt."""

import json
import logging
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from irtune.adapters import write_adapter
from irtune.adapters.build import add_adapters
from irtune.config import AdapterConfig, ModelConfig
from irtune.errors import ConfigError, RunError
from irtune.evaluation.start import start_from
from irtune.models import load_classifier
from irtune.models.pooling import pooling_of

pytestmark = pytest.mark.quick
LABELS = ["a", "b", "c"]
IDS = torch.arange(4, 20).view(2, 8)


def built(base, labels=LABELS, model=(), **settings):
    classifier = load_classifier(ModelConfig(name_or_path=str(base), dtype="float32", **dict(model)), list(labels))
    adapter = AdapterConfig(**{"r": 4} | settings)
    return *add_adapters(classifier, adapter), adapter


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def learnt(base, folder, **settings):
    """The folder of a run whose adapter and head are random numbers, and its logits."""
    model, table, adapter = built(base, **settings)
    torch.manual_seed(5)
    for _, parameter in table.all():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    pooling = pooling_of(model)
    if hasattr(model, "peft_config") and pooling is None:
        model.save_pretrained(folder / "adapter")
        (folder / "results.json").write_text(json.dumps({"dev": {"per_class": dict.fromkeys(LABELS)}}))
    else:
        write_adapter(folder / "adapter", {n: p.detach() for n, p in table.all()}, adapter, LABELS, pooling)
    return logits(model)


@pytest.mark.parametrize(
    "settings",
    [{}, {"type": "dora"}, {"type": "pissa"}, {"type": "bottleneck", "size": 8}, {"model": {"pooling": "mean"}}],
)
def test_it_computes_what_the_other_run_did(llama, tmp_path, settings):
    wanted = learnt(llama, tmp_path, **settings)
    model, table, adapter = built(llama, **settings)
    assert not torch.allclose(logits(model), wanted, atol=1e-2)
    start_from(str(tmp_path), model, table, adapter, LABELS)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)


def test_rows_follow_the_names_of_labels(llama, tmp_path):
    wanted = learnt(llama, tmp_path)
    model, table, adapter = built(llama, ["c", "a", "b"])
    start_from(str(tmp_path), model, table, adapter, ["c", "a", "b"])
    torch.testing.assert_close(logits(model), wanted[:, [2, 0, 1]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("labels", [["a", "b", "z"], ["a", "b"]])
def test_for_other_labels_the_head_starts_anew(llama, tmp_path, labels, caplog):
    learnt(llama, tmp_path)
    model, table, adapter = built(llama, labels)
    head = [parameter.clone() for _, parameter in table.head]
    with caplog.at_level(logging.INFO, "irtune"):
        start_from(str(tmp_path), model, table, adapter, labels)
    assert all(torch.equal(parameter, before) for (_, parameter), before in zip(table.head, head))
    assert "is for other labels (a, b, c): it starts anew" in caplog.text
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name, parameter = table.layers[3][0]
    assert torch.equal(parameter, saved[name.replace(".default", "")])


def test_an_adapter_alone_says_nothing_of_labels(llama, tmp_path, caplog):
    learnt(llama, tmp_path)
    shutil.move(tmp_path / "adapter", tmp_path / "other")
    model, table, adapter = built(llama)
    with caplog.at_level(logging.INFO, "irtune"):
        start_from(str(tmp_path / "other"), model, table, adapter, LABELS)
    assert "is for labels that are not known: it starts anew" in caplog.text


PLAIN = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "init_lora_weights": "gaussian"}


@pytest.mark.parametrize("task", ["SEQ_CLS", "CAUSAL_LM"])
def test_it_computes_what_an_adapter_of_plain_peft_does(llama, tmp_path, task, caplog):
    """The way from an adapter of another program, or of a language model, whose head is no classifier's."""
    kind = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForCausalLM
    other = get_peft_model(kind.from_pretrained(llama), LoraConfig(task_type=task, **PLAIN))
    for name, parameter in other.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    other.save_pretrained(tmp_path)
    model, table, adapter = built(llama)
    with caplog.at_level(logging.INFO, "irtune"):
        start_from(str(tmp_path), model, table, adapter, LABELS)
    assert "is for labels that are not known: it starts anew" in caplog.text

    def states(one):
        with torch.no_grad():
            return one.eval().base_model.model.model(input_ids=IDS).last_hidden_state

    torch.testing.assert_close(states(model), states(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("there", "reason"),
    [
        ({"target_modules": ["q_proj"]}, r"k_proj.lora_A.weight is not there .* and the section adapter as they were"),
        ({"lora_alpha": 8}, "has lora_alpha 8 where adapter.alpha makes it 16.0; set adapter.alpha"),
        ({"init_lora_weights": "olora"}, "sets init_lora_weights to 'olora', which irtune never does"),
        ({"alpha_pattern": {"q_proj": 3}}, "sets alpha_pattern to .* which irtune never does"),
    ],
)
def test_another_adapter_of_plain_peft_is_refused(llama, tmp_path, there, reason):
    other = AutoModelForSequenceClassification.from_pretrained(llama)
    get_peft_model(other, LoraConfig(task_type="SEQ_CLS", **PLAIN | there)).save_pretrained(tmp_path)
    with pytest.raises((ConfigError, RunError), match=reason):
        start_from(str(tmp_path), *built(llama), LABELS)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"r": 2}, "has r 4 where adapter.r makes it 2"),
        ({"alpha": 3.0}, "has lora_alpha 16.0 where adapter.alpha makes it 3.0"),
        ({"type": "rslora"}, "has use_rslora False where adapter.type makes it True"),
        ({"type": "bottleneck"}, "holds low-rank updates; set adapter.type as it was there, not bottleneck"),
        ({"type": "none"}, "export that run with --merge and set model.name_or_path"),
        ({"target_modules": ["q_proj"]}, None),
    ],
)
def test_another_adapter_is_refused(llama, tmp_path, settings, reason):
    learnt(llama, tmp_path)
    model, table, adapter = built(llama, **settings)
    if reason is None:  # a part of the modules is a start, too
        start_from(str(tmp_path), model, table, adapter, LABELS)
        return
    with pytest.raises(ConfigError, match=reason):
        start_from(str(tmp_path), model, table, adapter, LABELS)


def test_a_merged_model_is_a_base(llama):
    with pytest.raises(ConfigError, match=r"holds a merged model and no adapter; set model\.name_or_path to it"):
        start_from(str(llama), *built(llama), LABELS)


def test_a_folder_without_an_adapter_is_refused(llama, tmp_path):
    model, table, adapter = built(llama)
    with pytest.raises(RunError, match="holds no adapter"):
        start_from(str(tmp_path / "no"), model, table, adapter, LABELS)


@pytest.mark.parametrize(
    ("settings", "change", "reason"),
    [
        ({"model": {"pooling": "mean"}}, {"alpha": 3.0}, "has adapter.alpha 16.0, not 3.0; set adapter.alpha"),
        ({"type": "bottleneck"}, {"scale": 2.0}, "has adapter.scale 1.0, not 2.0"),
        ({"type": "bottleneck"}, {"activation": "relu"}, "has adapter.activation 'tanh', not 'relu'"),
        ({"type": "bottleneck"}, {"placement": "parallel"}, "has adapter.placement 'serial', not 'parallel'"),
    ],
)
def test_an_adapter_of_irtunes_format_that_computes_something_else_is_refused(
    llama, tmp_path, settings, change, reason
):
    learnt(llama, tmp_path, **settings)
    model, table, adapter = built(llama, **settings | change)
    with pytest.raises(ConfigError, match=reason):
        start_from(str(tmp_path), model, table, adapter, LABELS)


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ({"pooling": "mean"}, {"pooling": "last"}),
        ({"pooling": "mean"}, {"pooling": "mean", "head": "mlp"}),
        ({"pooling": "mean"}, {}),
        ({}, {"pooling": "mean"}),
    ],
)
def test_another_pooling_or_head_starts_the_head_anew_only(llama, tmp_path, caplog, there, here):
    learnt(llama, tmp_path, model=there)
    model, table, adapter = built(llama, model=here)
    head = [parameter.clone() for _, parameter in table.head]
    with caplog.at_level(logging.INFO, "irtune"):
        start_from(str(tmp_path), model, table, adapter, LABELS)
    assert all(torch.equal(parameter, before) for (_, parameter), before in zip(table.head, head))
    assert "is of another model.pooling or model.head: it starts anew" in caplog.text
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name, parameter = table.layers[3][0]
    assert torch.equal(parameter, saved.get(name, saved.get(name.replace(".default", ""))))
