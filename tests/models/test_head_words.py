"""Heads made of words: the formula by hand, a language model as oracle, and what is refused."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import LlamaForCausalLM

from irtune.cli import main
from irtune.commands.common import ranks
from irtune.commands.data.stats import untrained
from irtune.commands.data.terms import propose
from irtune.config import ModelConfig
from irtune.config.checks import check_config
from irtune.data import Encoder, collate, read_corpus
from irtune.errors import ConfigError, ModelError
from irtune.models import load_classifier
from irtune.models.head_words import read_terms, start_from_words, term_tokens, weighted_mean
from irtune.train import setup
from tests.support.tiny import tiny_config

pytestmark = pytest.mark.quick
LABELS = ["clarity", "fluency"]


def terms_file(folder, content):
    file = folder / "terms.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(file)


def test_a_row_by_hand():
    # x = t1 with score 1, yz = t2 t3 with score .5: ((1, 0) + .5 ((0, 1) + (1, 1)) / 2) / 2
    rows = {1: torch.tensor([1.0, 0.0]), 2: torch.tensor([0.0, 1.0]), 3: torch.tensor([1.0, 1.0])}
    assert weighted_mean({"x": 1.0, "yz": 0.5}, {"x": [1], "yz": [2, 3]}, rows).tolist() == [0.625, 0.25]


def copy_of(llama, folder, tied):
    """The tiny Llama whose language-model head is its embeddings, which are not stored twice, or one of its own."""
    shutil.copytree(llama, folder)
    model = LlamaForCausalLM.from_pretrained(llama)
    torch.manual_seed(1)
    rows = model.model.embed_tokens.weight if tied else torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.lm_head.weight, model.config.tie_word_embeddings = rows, tied
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert ("lm_head.weight" in weights.keys()) is not tied  # noqa: SIM118 - not a dictionary
    return folder


@pytest.fixture(scope="module")
def untied(llama, tmp_path_factory):
    return copy_of(llama, tmp_path_factory.mktemp("untied") / "model", tied=False)


@pytest.fixture(scope="module")
def tied(llama, tmp_path_factory):
    return copy_of(llama, tmp_path_factory.mktemp("tied") / "model", tied=True)


def words_of(corpus, count):
    """Words that the tiny model knows, each one token."""
    lines = (corpus / "train.jsonl").read_text().splitlines()
    return sorted({word for line in lines for word in json.loads(line)["before"].split()})[:count]


@pytest.mark.parametrize("pooling", ["class", "last"])
@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_the_logits_are_those_of_the_language_model(request, corpus, tmp_path, kind, pooling):
    model = request.getfixturevalue(kind)
    config = tiny_config(model, corpus, tmp_path / "run", model__pooling=pooling, data__prompt="instruction")
    data = read_corpus(config.data)
    words = words_of(corpus, 2 * len(data.labels))
    pairs = list(zip(words[::2], words[1::2]))
    content = {label: {first: 1.0, second: 0.5} for label, (first, second) in zip(data.labels, pairs)}
    config.model.head_init = terms_file(tmp_path, content)
    classifier = load_classifier(config.model, data.labels)
    start_from_words(classifier, config.model, data.labels)
    encoder = Encoder(classifier.tokenizer, config.data, data.labels)
    encoded = [encoder.encode(example) for example in data.splits["dev"][:4]]
    batch = collate(encoded, classifier.tokenizer.pad_token_id)
    oracle = LlamaForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        found = classifier.model.eval()(**batch).logits
        every = oracle(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    last = every[torch.arange(4), batch["attention_mask"].sum(1) - 1]
    number = classifier.tokenizer.convert_tokens_to_ids
    wanted = [(last[:, number(first)] + 0.5 * last[:, number(second)]) / 2 for first, second in pairs]
    torch.testing.assert_close(found.float(), torch.stack(wanted, 1), rtol=1e-4, atol=1e-5)


def test_a_run_starts_with_it_and_baseline_tells_what_it_predicts(tied, corpus, tmp_path, monkeypatch):
    labels = read_corpus(tiny_config(tied, corpus, tmp_path / "run").data).labels
    words = words_of(corpus, len(labels))
    file = terms_file(tmp_path, {label: {word: 1.0} for label, word in zip(labels, words)})
    config = tiny_config(tied, corpus, tmp_path / "run", data__prompt="instruction", model__head_init=file)
    found = untrained(config, read_corpus(config.data))
    assert found["examples"] == 20 and 0 <= found["accuracy"] <= 1
    monkeypatch.setattr(setup, "estimate_memory", lambda *_, **__: None)
    with ranks() as world:
        table = setup.prepare(config, setup.engine_settings(config, world), world, tmp_path / "run").model.table
    ((_, head),) = table.head
    classifier = load_classifier(ModelConfig(name_or_path=str(tied), dtype="float32"), labels)
    embeddings = classifier.model.get_input_embeddings().weight
    wanted = embeddings[[classifier.tokenizer.convert_tokens_to_ids(word) for word in words]]
    torch.testing.assert_close(head, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[a, b]", "does not map labels to terms and scores; accepted: {label: {term: score}}"),
        ("clarity: [clear]\nfluency: {fluent: 1}", "does not map labels to terms and scores"),
        ("clarity: {clear: 1}", "has no terms for 'fluency'"),
        ("clarity: {clear: 1}\nfluency: {}", "has no terms for 'fluency'"),
        ("clarity: {clear: 1}\nfluency: {fluent: 1}\nstyle: {a: 1}", "has terms for 'style', which is not a label"),
        ("clarity: {clear: high}\nfluency: {fluent: 1}", "'clear' of 'clarity' has the score 'high'"),
        ("clarity: {clear: 0}\nfluency: {fluent: .nan}", "2 errors"),
        ("a: &a [*a]", "is not valid YAML"),
    ],
)
def test_files_of_terms_that_are_refused(tmp_path, content, said):
    with pytest.raises(ConfigError) as raised:
        read_terms(terms_file(tmp_path, content), LABELS)
    assert said in str(raised.value)
    with pytest.raises(ConfigError, match="No such file"):
        read_terms(str(tmp_path / "none.yaml"), LABELS)


def test_models_that_are_refused(bert, untied, tied, corpus, tmp_path):
    one, two = words_of(corpus, 2)

    def attempt(model, first=one, **options):
        file = terms_file(tmp_path, {"clarity": {first: 1}, "fluency": {two: 1}})
        config = ModelConfig(name_or_path=str(model), dtype="float32", head_init=file, **options)
        start_from_words(load_classifier(config, LABELS), config, LABELS)

    with pytest.raises(ConfigError, match="is an encoder, whose words are predicted at a mask position"):
        attempt(bert)
    with pytest.raises(ConfigError, match="knows no part of the term 'zzz'; remove it"):
        attempt(tied, "zzz")
    with pytest.raises(ConfigError, match=r"is not one linear module over 32 numbers; set model\.pooling to last"):
        attempt(tied, pooling="last", head="mlp")
    bare = tmp_path / "bare"
    shutil.copytree(untied, bare)
    LlamaForCausalLM.from_pretrained(untied).model.save_pretrained(bare)  # without the head
    with pytest.raises(ModelError, match=r"holds no lm_head.weight, the head of the language model"):
        attempt(bare)


def test_keys_that_do_not_go_together(llama, corpus, tmp_path):
    config = tiny_config(llama, corpus, tmp_path / "run")
    config.model.head_init, config.model.start_from = "terms.yaml", "runs/other"
    config.model.pooling, config.model.head = "mean", "mlp"
    said = check_config(config)
    assert any("model.pooling is mean; set model.pooling to last or class" in problem for problem in said)
    assert any("makes a linear head, and model.head is mlp; set model.head to linear" in problem for problem in said)
    assert any("model.start_from both set the start of the head" in problem for problem in said)


def test_words_of_a_label_by_hand():
    vectors = {"clarity": (1, 0), "word usage": (0, 1), "clear": (0.8, 0.6), "usage": (0.6, 0.8), "far": (-1, -1),
               "plain": (1, 0.1)}  # fmt: skip

    def vector(text):
        return torch.tensor(vectors[text], dtype=torch.float) if text in vectors else None

    found = propose(["clarity", "Word-usage"], ["clear", "usage", "far", "strange", "plain", "clarity"], vector, 3)
    assert found["clarity"] == {"clarity": 1.0, "plain": 0.995, "clear": 0.8}
    assert found["Word-usage"] == {"word usage": 1.0, "usage": 0.8}
    assert propose(["clarity"], ["plain", "clear"], vector, 2) == {"clarity": {"clarity": 1.0, "plain": 0.995}}
    with pytest.raises(ConfigError, match="no part of the label 'B2'"):
        propose(["clarity", "B2"], [], vector, 3)


def test_terms_are_proposed_and_read_again(bpe, corpus, tmp_path, capsys):
    options = [f"--model.name_or_path={bpe}", "--model.dtype=float32", f"--data.path={corpus}", "--count=4"]
    assert main(["data", "terms", *options, "--output", str(tmp_path / "terms.yaml")]) == 0
    labels = read_corpus(tiny_config(bpe, corpus, tmp_path / "run").data).labels
    terms = read_terms(str(tmp_path / "terms.yaml"), labels)
    assert all(1 <= len(found) <= 4 and next(iter(found.values())) == 1 for found in terms.values())
    assert main(["data", "terms", *options]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == terms
    assert main(["data", "terms", *options, "--output", str(tmp_path / "terms.yaml")]) == 2
    assert "exists; name a file that does not" in capsys.readouterr().err


def test_a_term_has_the_tokens_that_it_has_in_a_text(bpe):
    tokenizer = load_classifier(ModelConfig(name_or_path=str(bpe), dtype="float32"), LABELS).tokenizer
    ids = tokenizer("the blue house", add_special_tokens=False)["input_ids"]
    found = term_tokens(tokenizer, "blue")
    assert found == tokenizer(" blue", add_special_tokens=False)["input_ids"]
    assert any(ids[i : i + len(found)] == found for i in range(len(ids)))
