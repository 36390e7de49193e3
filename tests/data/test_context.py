"""Text around a revision (data.context): where it goes, what is cut of it, and that every command reads it."""

import contextlib
import dataclasses
import io
import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from irtune.cli import main
from irtune.commands.export.card import model_card
from irtune.config import DataConfig, ModelConfig, load_config
from irtune.config.checks import needed_mask
from irtune.config.template import template_pieces, template_problems
from irtune.data import Encoder, Example, read_corpus
from irtune.data.corpus import corpus_digest
from irtune.errors import ConfigError, DataError
from irtune.evaluation.saved_run import load_run
from tests.support.runs import launch
from tests.support.tiny import byte_tokenizer, tiny_config

LABELS = ["x", "y"]
OWN = "{labels} around: {context} old: {before} new: {after} ."
FORMS = {
    "plain": {"prompt": "plain"},
    "tagged": {"prompt": "tagged"},
    "instruction": {"prompt": "instruction"},
    "diff": {"prompt": "diff"},
    "template": {"template": OWN},
    "single": {"after": None, "prompt": "plain"},
    "single template": {"after": None, "prompt": "plain", "template": "{context}: {before}"},
}


def example(context, before="The school", after="The bakery"):
    return Example("1", before, after, 0, context=context)


@pytest.mark.quick
@pytest.mark.parametrize("form", FORMS)
def test_the_context_comes_first_and_loses_its_start(llama, form):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    data = DataConfig(max_length=64, context="around", **FORMS[form])
    encoder = Encoder(tokenizer, data, LABELS)
    after = None if data.after is None else "The bakery"
    bare = encoder.encode(example("", after=after))["input_ids"]
    opening = len(encoder.opening)
    assert bare[:opening] == encoder.opening and bare[opening : opening + len(encoder.head)] == encoder.head
    ids = tokenizer("school bakery the", add_special_tokens=False)["input_ids"]
    short = encoder.encode(example("school bakery the", after=after))["input_ids"]
    assert short == bare[:opening] + ids + bare[opening:]
    assert len(short) == encoder.length(example("school bakery the", after=after))
    long = encoder.encode(example("school " * 90 + "school bakery the", after=after))["input_ids"]
    assert len(long) == 64 and long[:opening] == bare[:opening] and long[opening - len(bare) :] == bare[opening:]
    assert long[opening - len(bare) - len(ids) : opening - len(bare)] == ids
    full = encoder.encode(example("school bakery the", "The school " * 90, after))["input_ids"]
    assert len(full) == 64 and full[opening : opening + len(encoder.head)] == encoder.head  # no room for the context


@pytest.mark.quick
@given(
    around=st.text(alphabet="ab [-]{+}<>", max_size=80),
    size=st.integers(1, 4) | st.integers(5, 60),
    form=st.sampled_from(["diff", "tagged"]),
)
def test_masks_leave_the_context_out(around, size, form):
    data = {"max_length": 64, "prompt": form}
    mask = "edit_mask" if form == "diff" else "side_mask"
    tokenizer = byte_tokenizer()
    pair = example(around, "a " * size, "b " * size)
    found = Encoder(tokenizer, DataConfig(context="around", **data), LABELS, mask=mask).encode(pair)
    assert len(found[mask]) == len(found["input_ids"]) <= 64
    without = Encoder(tokenizer, DataConfig(**data), LABELS, mask=mask).encode(pair)
    if len(without["input_ids"]) < 40:  # room for the pair in both
        assert sum(map(bool, found[mask])) == sum(map(bool, without[mask]))
        places = [place for place, one in enumerate(found[mask]) if one]
        kept = [place for place, one in enumerate(without[mask]) if one]
        assert [found["input_ids"][place] for place in places] == [without["input_ids"][place] for place in kept]


@pytest.mark.quick
def test_a_template_holds_the_context_in_front():
    assert template_pieces("c {context} b {before} a {after} .", LABELS) == ["c ", " b ", " a ", " ."]
    assert template_problems(OWN, pair=True, context=True) == []
    (said,) = template_problems("{before} {after}", pair=True, context=True)
    assert "{context} nowhere; accepted: once" in said
    (said,) = template_problems("{before} {context} {after}", pair=True, context=True)
    assert "holds {before}, {context}, {after} in this order; accepted: {context}, {before}, {after}" in said
    (said,) = template_problems("{context} {before}", pair=False)
    assert "{context}; accepted: {before} and {labels}, since data.after is null" in said
    (said,) = template_problems("{context} {before} {after}", pair=True)
    assert "{context}; accepted: {before}, {after} and {labels} ({context} needs data.context)" in said


@pytest.mark.quick
@pytest.mark.parametrize(
    "column, said",
    [
        *((name, r"data\.before, data\.after, data\.label and data\.context must be different") for name in
          ("before", "after", "label")),
        ("id", r"data\.id is 'id', the column of data\.context already"),
        ("importance", r"data\.weight is 'importance', a column that is a text"),
    ],
)  # fmt: skip
def test_a_context_that_is_another_column_is_refused(column, said):
    with pytest.raises(ConfigError, match=said):
        load_config(["--data.path", "x", "--data.weight", "importance", "--data.context", column])


@pytest.fixture(scope="module")
def around(tmp_path_factory):
    """A corpus whose labels only the context tells."""
    folder = tmp_path_factory.mktemp("around")
    for split, count in (("train", 48), ("dev", 16)):
        rows = [
            {
                "before": "The school",
                "after": "The bakery",
                "around": ("school", "bakery")[i % 2],
                "label": LABELS[i % 2],
            }
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.quick
def test_a_corpus_with_context(around, tmp_path):
    data = DataConfig(path=str(around), context="around")
    corpus = read_corpus(data)
    assert [one.context for one in corpus.splits["dev"][:2]] == ["school", "bakery"]
    assert corpus_digest(corpus) != corpus_digest(read_corpus(DataConfig(path=str(around))))
    with pytest.raises(DataError, match=r"no column 'arond'; did you mean 'around'\?"):
        read_corpus(DataConfig(path=str(around), context="arond"))
    rows = '{"before": "a", "after": "b", "label": "x", "around": 3}\n'
    (tmp_path / "train.jsonl").write_text(rows)
    with pytest.raises(DataError, match=r"row 1, column 'around'"):
        read_corpus(DataConfig(path=str(tmp_path), context="around", dev_fraction=0.5))


@pytest.mark.quick
def test_stats_tell_texts_apart_by_their_context(around, capsys):
    given = ["data", "stats", "--data", str(around), "--json"]
    assert main([*given, "--data.context", "around"]) == 0
    found = json.loads(capsys.readouterr().out)["splits"]["train"]
    assert (found["contradictions"], found["duplicates"], found["characters_context"]["longest"]) == (0, 46, 6)
    assert main(given) == 0
    found = json.loads(capsys.readouterr().out)["splits"]["train"]
    assert (found["contradictions"], found["duplicates"]) == (1, 47) and "characters_context" not in found


@pytest.mark.quick
@pytest.mark.parametrize("prompt, pooling", [("plain", "class"), ("diff", "mean+edit")])
@pytest.mark.parametrize("form", ["merged", "onnx"])
def test_code_without_irtune_is_not_given_for_a_text_with_context(bpe, prompt, pooling, form):
    results = {
        "dev": {"per_class": {name: {} for name in LABELS}, "examples": 1, "accuracy": 1, "macro_f1": 1, "auprc": 1},
        "steps": 1, "steps_per_layer": [1], "num_layers": 1, "layers_trained_per_step": 1.0,
        "versions": {"irtune": "0"},
    }  # fmt: skip
    cards = []
    for column in (None, "around"):
        data = DataConfig(path="x", prompt=prompt, context=column)
        model = ModelConfig(name_or_path=str(bpe), pooling=pooling)
        encoder = Encoder(AutoTokenizer.from_pretrained(bpe), data, LABELS, mask=needed_mask(model))
        cards.append(model_card(_config(model, data), results, encoder, form=form, more=""))
    own = "context=CONTEXT" if form == "merged" else "# batch: what irtune makes of texts"
    assert own not in cards[0] and own in cards[1]


def _config(model, data):
    return dataclasses.replace(load_config(["--data.path=x"]), model=model, data=data)


@pytest.fixture(scope="module")
def run(llama, around, tmp_path_factory):
    folder = tmp_path_factory.mktemp("context") / "run"
    options = {"data__context": "around", "data__prompt": "tagged", "model__pooling": "mean", "optim__lr": 0.02}
    return launch(tiny_config(llama, around, folder, 0, tuning__method="full", optim__max_steps=30, **options), 1)


def test_predict_reads_it_and_labels_by_it(run, around, tmp_path, capsys):
    assert json.loads((run / "results.json").read_text())["dev"]["accuracy"] == 1.0
    assert main(["predict", "--run", str(run), "--input", str(around / "dev.jsonl"), "--output", "-"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["predicted"] for row in found] == [row["label"] for row in found]
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text((around / "dev.jsonl").read_text().replace('"around"', '"near"'))
    assert main(["predict", "--run", str(run), "--input", str(renamed), "--output", "-"]) == 2
    assert "row 1: no column 'around'; columns: before, after, near" in capsys.readouterr().err
    assert main(["predict", "--run", str(run), "--input", str(renamed), "--output", "-", "--context", "near"]) == 0
    assert [json.loads(line)["predicted"] for line in capsys.readouterr().out.splitlines()] == [
        row["predicted"] for row in found
    ]


def test_a_run_without_context_takes_none(base, run, corpus, capsys):
    given = ["--input", str(corpus / "dev.jsonl"), "--output", "-"]
    assert main(["predict", "--run", str(base), *given, "--context", "around"]) == 2
    said = capsys.readouterr().err
    assert "--context 'around': the run was trained without context (data.context is null); leave it out" in said


def test_evaluate_and_select_read_it(run, around, tmp_path, capsys):
    given = ["evaluate", "--run", str(run), "--data", str(around), "--split", "dev", "--json"]
    assert main([*given, "--output_dir", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 1.0
    texts = tmp_path / "candidates.jsonl"
    texts.write_text('{"before": "A", "after": "B", "around": "school"}\n{"before": "A", "after": "B", "near": "c"}\n')
    given = ["--method", "uncertainty", "--count", "1", "--output", str(tmp_path / "best.jsonl")]
    assert main(["data", "select", "--run", str(run), "--candidates", str(texts), *given]) == 2
    assert "row 2: no column 'around'" in capsys.readouterr().err


def test_pseudo_labels_keep_it(run, around, tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"before": "A", "after": f"B {i}", "around": "bakery"}) + "\n" for i in range(6))
    )
    given = [
        "--runs",
        str(run),
        "--unlabelled",
        str(texts),
        "--threshold",
        "0.5",
        "--output",
        str(tmp_path / "p.jsonl"),
    ]
    assert main(["pseudo", *given]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert rows and {row["around"] for row in rows} == {"bakery"}
    data = DataConfig(path=str(around), context="around", pseudo=str(tmp_path / "p.jsonl"))
    assert read_corpus(data).splits["train"][-1].context == "bakery"


@pytest.mark.parametrize("form", [[], ["--merge"]])
def test_the_code_of_a_card_gives_it(run, tmp_path, form):
    target = tmp_path / "exported"
    assert main(["export", "--run", str(run), "--to", str(target), *form]) == 0
    ((_, code),) = re.findall(r"^(```+)python\n(.*?)^\1$", (target / "README.md").read_text(), re.M | re.S)
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code.replace("THIS_FOLDER", str(target)), "README.md", "exec"), names)
    rows = [Example("1", *pair, 0, context=names["CONTEXT"]) for pair in names["examples"]]
    wanted = load_run(run, torch.device("cpu")).predict(rows, 2).probabilities
    torch.testing.assert_close(names["probabilities"].float(), wanted, rtol=0, atol=1e-5)


def test_a_service_asks_for_it(run):
    pytest.importorskip("fastapi", reason="fastapi is not installed: irtune[serve] has it")
    from irtune.commands.serve.app import Limits, RequestError, model_facts, read_examples, text_names

    loaded, limits = load_run(run, torch.device("cpu")), Limits(texts=4, size=2**20, batch=2)
    names = text_names(loaded)
    assert names == ["before", "after", "context"]
    shown = model_facts(loaded, limits)["example"]
    (found,) = read_examples(json.dumps(shown).encode(), names=names, limits=limits, blank=0)
    assert (found.before, found.after, found.context) == ("I has a cat.", "I have a cat.", "I live alone.")
    with pytest.raises(RequestError, match=r'accepted: an object such as .*"context": "\.\.\."'):
        read_examples(b'{"texts": [{"before": "a", "after": "b"}]}', names=names, limits=limits, blank=0)
