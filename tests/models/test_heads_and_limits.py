"""Fields of a model's files that no longer apply, limits, and the side of the padding."""

import json
import logging
import shutil

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BigBirdConfig,
    BigBirdForSequenceClassification,
    CanineConfig,
    CanineForSequenceClassification,
    CohereConfig,
    ConvBertConfig,
    ConvBertForSequenceClassification,
)

from irtune.adapters.build import add_adapters
from irtune.adapters.guard import check_length, watch
from irtune.config import AdapterConfig, Config, ModelConfig
from irtune.data import collate
from irtune.errors import ConfigError, ModelError
from irtune.models import load_classifier, pooling
from irtune.models.limits import check_tokens, longest_input
from tests.support import zoo

pytestmark = pytest.mark.quick
TEXTS = [{"input_ids": list(range(4, 4 + length))} for length in (5, 9, 17)]
ROWS = torch.arange(96.0).view(3, 32)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("zoo")


def load(folder, labels=zoo.LABELS, dtype="float32"):
    return load_classifier(ModelConfig(name_or_path=str(folder), dtype=dtype), list(labels))


def with_head(models, folder, names, **settings):
    """A classifier of the zoo's Qwen2 whose row i is ROWS[i], for the label names[i]."""
    source = zoo.build("qwen2", models)
    model = AutoModelForSequenceClassification.from_pretrained(source, id2label=dict(enumerate(names)), **settings)
    model.score.weight.data.copy_(ROWS[: len(names)])
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (("style", "clarity", "fluency"), [0, 1, 2]),
        (("fluency", "style", "clarity"), [1, 2, 0]),
        (("Fluency", "clarity", "STYLE"), [2, 1, 0]),
    ],
)
def test_rows_of_a_head_follow_the_names_of_labels(models, tmp_path, names, rows):
    classifier = load(with_head(models, tmp_path, names))
    assert torch.equal(classifier.model.score.weight, ROWS[rows])
    assert list(classifier.model.config.id2label.values()) == list(zoo.LABELS)


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("LABEL_0", "LABEL_1", "LABEL_2"), zoo.LABELS),
        (("style", "clarity", "meaning"), zoo.LABELS),
        (("style", "clarity"), zoo.LABELS),  # whose rows transformers draws
        (("style", "clarity", "fluency"), ("Style", "style", "fluency")),  # two for one row
    ],
)
def test_a_head_for_other_labels_starts_anew(models, tmp_path, names, labels, caplog):
    with caplog.at_level(logging.INFO, "irtune"):
        weight = load(with_head(models, tmp_path, names), labels).model.score.weight
    assert weight.shape == (3, 32)
    assert weight.abs().max() < 0.2
    assert weight.std() > 0.01
    assert f"the head of the files is for other labels ({', '.join(names)})" in caplog.text


def test_the_kind_of_problem_is_irtunes_to_set(models, tmp_path):
    folder = with_head(models, tmp_path, zoo.LABELS, problem_type="multi_label_classification")
    assert json.loads((folder / "config.json").read_text())["problem_type"] == "multi_label_classification"
    assert load(folder).model.config.problem_type == "single_label_classification"


def test_positions_behind_the_paddings_row_are_counted(models):
    classifier = load(zoo.build("roberta", models))
    longest = longest_input(classifier)
    assert longest == 514 - (zoo.PAD + 1)
    ids = torch.full((1, longest), 5)
    assert classifier.model(input_ids=ids).logits.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        classifier.model(input_ids=torch.full((1, longest + 1), 5))
    config = Config()
    config.data.max_length = 514
    with pytest.raises(ConfigError, match=r"data.max_length is 514, but .* accepted: at most 510"):
        check_length(config, classifier)


def test_attention_in_blocks_is_refused_with_what_to_change(tmp_path):
    torch.manual_seed(0)
    shape = {name: value for name, value in zoo.ZOO["bert"][2].items() if name != "vocab_size"}
    settings = BigBirdConfig(**shape, vocab_size=zoo.VOCABULARY, block_size=4, num_random_blocks=1, num_labels=3)
    model = BigBirdForSequenceClassification(settings).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    texts = [{"input_ids": [4 + place % 100 for place in range(length)]} for length in (30, 45)]
    with torch.no_grad():  # the fault
        alone, together = model(**collate(texts[:1], zoo.PAD)).logits, model(**collate(texts, zoo.PAD)).logits
    assert not torch.allclose(alone[0], together[0], atol=1e-3)
    classifier, config = load(tmp_path), Config()
    config.data.max_length = 28
    check_length(config, classifier)
    config.data.max_length = 29
    with pytest.raises(ConfigError, match=r"more than 28 tokens, .* accepted: at most 28, or attention_type original"):
        check_length(config, classifier)
    classifier.model.config.attention_type = "original_full"
    check_length(config, classifier)


def test_a_token_without_a_row_is_named(models, tmp_path):
    shutil.copytree(zoo.build("qwen2", models), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "model")
    classifier = load(tmp_path / "model")
    check_tokens(classifier, [TEXTS])
    rows = zoo.VOCABULARY
    wanted = rf"token {rows} \('<new>'\), but .* for {rows} tokens; .* resize_token_embeddings"
    with pytest.raises(ModelError, match=wanted):
        check_tokens(classifier, [TEXTS, [{"input_ids": [5, rows]}]])


def test_settings_inside_of_settings_are_read(models):
    classifier = load(zoo.build("gemma3", models))
    assert classifier.anatomy.num_layers == 4
    assert longest_input(classifier) == 512
    assert classifier.model.config.get_text_config().pad_token_id == zoo.PAD


@pytest.mark.parametrize(
    ("name", "dtype"), [("xlnet", "float32"), ("gpt2", "bfloat16"), ("mpnet", "float32"), ("mpnet", "bfloat16")]
)
def test_padding_changes_nothing(models, name, dtype):
    classifier = load(zoo.build(name, models), dtype=dtype)
    classifier.model.eval()
    with torch.no_grad():
        alone = torch.cat([classifier.model(**collate([text], zoo.PAD)).logits for text in TEXTS])
        together = classifier.model(**collate(TEXTS, zoo.PAD)).logits
    near = 1e-5 if dtype == "float32" else 0.05
    torch.testing.assert_close(together, alone, rtol=near, atol=near)
    assert (alone.argmax(1) == together.argmax(1)).all()


def test_an_encoder_decoder_model_is_refused_with_what_to_use(models):
    with pytest.raises(ModelError, match=r"which has two lists of layers; accepted: .* FacebookAI/roberta-base"):
        load(zoo.build("t5", models))


@pytest.mark.parametrize("name", ["gpt2", "jamba"])
def test_the_guard_leaves_no_trace(models, name):
    classifier = load(zoo.build(name, models))
    classifier.model.train()
    before = torch.get_rng_state()
    guard = watch(classifier, TEXTS, patient=True)  # on a busy machine, too
    assert torch.equal(torch.get_rng_state(), before)
    model, table = add_adapters(classifier, AdapterConfig(r=4))
    table.set_trainable([1])
    drawn = torch.get_rng_state()
    assert not torch.equal(before, drawn)
    guard.check(model, table, AdapterConfig(r=4))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(part.training for part in classifier.model.modules())
    assert all(parameter.grad is None for _, parameter in table.all())
    assert [any(p.requires_grad for _, p in layer) for layer in table.layers] == [False, True, False, False]


def test_the_guard_sees_padding_that_counts(models):
    classifier = load(zoo.build("gpt2", models))
    classifier.model.config.pad_token_id = 77  # the class is then read at the padding
    with pytest.raises(ModelError, match="GPT2ForSequenceClassification computes something else for a text alone"):
        watch(classifier, TEXTS, patient=True)


def test_the_guard_sees_padding_that_counts_less_than_rounding(tmp_path):
    """ConvBERT's convolutions read the padding: in bf16 that is less than what another batch rounds differently."""
    torch.manual_seed(0)
    shape = {name: value for name, value in zoo.ZOO["bert"][2].items() if name != "type_vocab_size"}
    names = dict(enumerate(zoo.LABELS))
    model = ConvBertForSequenceClassification(ConvBertConfig(**shape, embedding_size=32, id2label=names))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.14)
    model.save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    texts = [{"input_ids": list(range(4, 4 + length))} for length in (5, 30)]
    with pytest.raises(ModelError, match="ConvBertForSequenceClassification computes something else for a text alone"):
        watch(load(tmp_path, dtype="bfloat16"), texts, patient=True)


def test_the_guard_sees_adapters_that_are_not_silent_or_learn_nothing(models):
    classifier = load(zoo.build("gpt2", models))
    guard = watch(classifier, TEXTS, patient=True)
    model, table = add_adapters(classifier, AdapterConfig(r=4))
    factor = dict(table.layers[2])
    name = next(name for name in factor if "lora_B" in name)
    factor[name].data.fill_(0.1)
    with pytest.raises(ModelError, match=r"adapter.type lora changes what GPT2ForSequenceClassification computes"):
        guard.check(model, table, AdapterConfig(r=4))
    factor[name].data.zero_()
    table.layers[2].append(("base_model.other.lora_A", torch.nn.Parameter(torch.zeros(2))))
    with pytest.raises(ModelError, match=r"base_model.other.lora_A \(1 such parameters\) gets no gradient"):
        guard.check(model, table, AdapterConfig(r=4))


def test_a_number_format_that_a_model_cannot_compute_in_is_refused(models):
    with pytest.raises(ModelError, match=r"XLNetForSequenceClassification cannot read .*; set model.dtype to float32"):
        watch(load(zoo.build("xlnet", models), dtype="bfloat16"), TEXTS, patient=True)


@pytest.mark.parametrize("kind", ["last", "mean"])
def test_the_guard_sees_through_a_pooled_head_that_starts_at_zero(models, kind):
    config = ModelConfig(name_or_path=str(zoo.build("gpt2", models)), dtype="float32", pooling=kind)
    classifier = load_classifier(config, list(zoo.LABELS))
    guard = watch(classifier, TEXTS, patient=True)
    assert guard.outputs.shape == (2, 32) and guard.outputs.abs().amax() > 0.1
    model, table = add_adapters(classifier, AdapterConfig(r=4))
    guard.check(model, table, AdapterConfig(r=4))
    factor = dict(table.layers[2])
    factor[next(name for name in factor if "lora_B" in name)].data.fill_(0.1)
    with pytest.raises(
        ModelError, match=r"adapter.type lora changes what PooledGPT2ForSequenceClassification computes"
    ):
        guard.check(model, table, AdapterConfig(r=4))


def test_the_guard_sees_padding_that_a_pooled_head_reads(models, monkeypatch):
    config = ModelConfig(name_or_path=str(zoo.build("gpt2", models)), dtype="float32", pooling="mean")
    classifier = load_classifier(config, list(zoo.LABELS))
    monkeypatch.setattr(pooling, "_mean", lambda states, _weights: states.float().mean(1))
    with pytest.raises(
        ModelError, match="PooledGPT2ForSequenceClassification computes something else for a text alone"
    ):
        watch(classifier, TEXTS, patient=True)


@pytest.mark.parametrize("name", ["qwen2", "bert"])
def test_flash_attention_waits_for_the_gpu(models, name):
    classifier = load(zoo.build(name, models))
    settings = classifier.model.config
    wanted = watch(classifier, TEXTS, patient=True).outputs
    seen = []
    classifier.model.register_forward_pre_hook(lambda *_: seen.append(settings._attn_implementation))
    settings._attn_implementation = "flash_attention_2"
    guard = watch(classifier, TEXTS, patient=True)
    model, table = add_adapters(classifier, AdapterConfig(r=4))
    guard.check(model, table, AdapterConfig(r=4))
    torch.testing.assert_close(guard.outputs, wanted)
    assert len(seen) >= 4 and set(seen) == {"sdpa"}
    assert settings._attn_implementation == "flash_attention_2"


def test_the_guard_makes_no_gradients_of_the_models_own_weights(models):
    classifier = load(zoo.build("gpt2", models))
    adapter = AdapterConfig(type="none", dtype="model")
    guard = watch(classifier, TEXTS, patient=True)
    model, table = add_adapters(classifier, adapter)
    made = []
    for _, parameter in table.all():
        parameter.requires_grad_(True).register_hook(lambda gradient: made.append(gradient.shape))
    guard.check(model, table, adapter)
    assert not made and table.all()


def test_random_numbers_of_the_models_device_only_are_put_back(models, monkeypatch):
    classifier = load(zoo.build("gpt2", models))
    asked, fork = [], torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda *a, **named: (asked.append((a, named)), fork(*a, **named))[1])
    watch(classifier, TEXTS, patient=True)
    assert asked and all(call == ((), {"devices": []}) for call in asked)


def test_advice_leaves_out_what_is_set_already(models, monkeypatch):
    classifier = load(zoo.build("gpt2", models))
    classifier.model.config.pad_token_id = 77
    with pytest.raises(ModelError, match=r"set model.attn_implementation to eager, or model.name_or_path"):
        watch(classifier, TEXTS, patient=True)
    classifier.model.set_attn_implementation("eager")
    with pytest.raises(ModelError, match=r"depend on the batch; set model.name_or_path to another model"):
        watch(classifier, TEXTS, patient=True)
    monkeypatch.setattr(classifier.model, "forward", lambda **_: torch.zeros(2).view(3))
    with pytest.raises(ModelError, match=r"cannot read a text \(shape .*\); set model.name_or_path to another model"):
        watch(classifier, TEXTS, patient=True)


def test_a_kind_of_model_without_a_classifier_is_named(tmp_path):
    CohereConfig(**zoo.DECODER).save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a Cohere model, of which transformers has no sequence classifier"):
        load(tmp_path)


def test_what_a_model_raises_for_a_text_becomes_a_sentence(models, monkeypatch):
    """Whatever it is: classes of transformers have KeyErrors and TypeErrors for what they do not know."""
    classifier = load(zoo.build("gpt2", models))
    guard = watch(classifier, TEXTS, patient=True)
    model, table = add_adapters(classifier, AdapterConfig(type="bottleneck", size=8))

    def broken(*_arguments, **_batch):
        raise KeyError("cpu_bf16")

    monkeypatch.setattr(classifier.model.transformer, "forward", broken)
    with pytest.raises(ModelError, match=r"with adapter.type bottleneck \(KeyError: 'cpu_bf16'\); set adapter.type to"):
        guard.check(model, table, AdapterConfig(type="bottleneck", size=8))
    with pytest.raises(ModelError, match=r"cannot read a text \(KeyError: 'cpu_bf16'\); set model.name_or_path to"):
        watch(classifier, TEXTS, patient=True)


def test_a_model_without_embeddings_of_tokens_is_refused(tmp_path):
    shape = {name: value for name, value in zoo.ZOO["bert"][2].items() if name != "vocab_size"}
    CanineForSequenceClassification(CanineConfig(**shape)).save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="CanineForSequenceClassification, which has no table of embeddings of tokens"):
        load(tmp_path)
