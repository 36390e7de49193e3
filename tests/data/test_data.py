"""Corpora, prompts and batches."""

import json
import random
from pathlib import Path

import openpyxl
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from irtune.config import DataConfig, load_config
from irtune.data import BatchSampler, Encoder, Example, collate, evaluation_batches, padded_lengths, read_corpus
from irtune.data.prompts import shorten
from irtune.data.synthetic import INTENTIONS, synthetic_pairs
from irtune.errors import ConfigError, DataError

pytestmark = pytest.mark.quick
ROWS = [
    {"before": "a b", "after": "a c", "label": "x"},
    {"before": "", "after": "new", "label": "y"},
    {"before": "old", "after": "", "label": "x"},
    {"before": "d", "after": "e", "label": "y"},
]


def write(folder: Path, name: str, rows: list[dict]) -> Path:
    path = folder / name
    suffix = path.suffix
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".parquet":
        pandas.DataFrame(rows).to_parquet(path)
    elif suffix == ".xlsx":
        pandas.DataFrame(rows).to_excel(path, index=False)
    else:
        pandas.DataFrame(rows).to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xlsx"])
def test_every_format_gives_the_same_corpus(tmp_path, suffix):
    write(tmp_path, f"train{suffix}", ROWS)
    write(tmp_path, f"dev{suffix}", ROWS[:2])
    corpus = read_corpus(DataConfig(path=str(tmp_path)))
    assert corpus.labels == ["x", "y"]
    header = suffix in (".csv", ".tsv", ".xlsx")  # ids hold the row as an editor or a spreadsheet numbers it
    assert corpus.splits["train"][1] == Example(f"train:{2 + header}", "", "new", 1)
    assert corpus.splits["train"][2] == Example(f"train:{3 + header}", "old", "", 0)
    assert [len(corpus.splits[split]) for split in ("train", "dev")] == [4, 2]
    assert "test" not in corpus.splits


def test_an_xlsx_with_the_argrevision_columns(tmp_path):
    rows = [{"old_sentences": r["before"], "new_sentences": r["after"], "purpose_labels": r["label"]} for r in ROWS]
    train, dev = write(tmp_path, "all.xlsx", rows), write(tmp_path, "more.xlsx", rows)
    data = DataConfig(
        train=str(train), dev=str(dev), before="old_sentences", after="new_sentences", label="purpose_labels"
    )
    assert [example.label for example in read_corpus(data).splits["train"]] == [0, 1, 0, 1]


def test_labels_are_dropped_and_mapped(tmp_path):
    write(tmp_path, "train.jsonl", [*ROWS, {"before": "z", "after": "z", "label": "others"}])
    write(tmp_path, "dev.jsonl", ROWS)
    corpus = read_corpus(
        DataConfig(path=str(tmp_path), labels={"x": "surface", "y": "content"}, drop_labels=["others"])
    )
    assert corpus.labels == ["surface", "content"]
    assert len(corpus.splits["train"]) == 4
    corpus = read_corpus(DataConfig(path=str(tmp_path), labels=["y", "x"], drop_labels=["others"]))
    assert [example.label for example in corpus.splits["dev"]] == [1, 0, 1, 0]


def test_single_texts(tmp_path):
    write(tmp_path, "train.csv", [{"text": "a", "label": 1}, {"text": "b", "label": 0}])
    write(tmp_path, "dev.csv", [{"text": "a", "label": 1}])
    corpus = read_corpus(DataConfig(path=str(tmp_path), before="text", after=None))
    assert corpus.labels == ["0", "1"]
    assert corpus.splits["train"][0].after is None


BAD = {
    "missing column": (ROWS, {"label": "intent"}, r"train.jsonl: no column 'intent'.*Columns: before, after, label"),
    "near column": (ROWS, {"label": "labels"}, r"did you mean 'label'"),
    "unknown label": (
        ROWS,
        {"labels": ["x", "z"]},
        r"train.jsonl, row 2, column 'label': unknown label 'y'; known: x, z",
    ),
    "only one label": (ROWS[:1], {}, r"only one label \('x'\)"),
    "number as text": (
        [{"before": 3, "after": "a", "label": "x"}],
        {},
        r"row 1, column 'before': expected text, not the int 3",
    ),
    "list as text": ([{"before": [], "after": "a", "label": "x"}], {}, r"expected text, not the list"),
    "null label": ([{"before": "a", "after": "a", "label": None}], {}, r"row 1, column 'label': None is not a label"),
    "all dropped": (ROWS, {"drop_labels": ["x", "y"]}, r"no rows are left without the labels"),
    "missing key": (
        [ROWS[0], {"befor": "a", "after": "b", "label": "x"}],
        {},
        r"row 2: no column 'before', which other",
    ),
    "same id": ([{**row, "id": 1} for row in ROWS], {}, r"id '1' in column 'id' appears twice"),
}


@pytest.mark.parametrize("case", BAD, ids=lambda name: name.replace(" ", "-"))
def test_bad_rows_are_named(tmp_path, case):
    rows, options, message = BAD[case]
    write(tmp_path, "train.jsonl", rows)
    write(tmp_path, "dev.jsonl", ROWS)
    with pytest.raises(DataError, match=message):
        read_corpus(DataConfig(path=str(tmp_path), **options))


def test_a_label_that_only_stands_in_dev(tmp_path):
    write(tmp_path, "train.jsonl", ROWS)
    write(tmp_path, "dev.jsonl", [{"before": "a", "after": "b", "label": "w"}])
    said = r"dev.jsonl: label 'w' occurs 1 time\(s\) in dev but never in the training split"
    with pytest.raises(DataError, match=said):
        read_corpus(DataConfig(path=str(tmp_path)))


FILES = {
    "broken json": ("train.jsonl", b'{"before": 1', r"line 1: not valid JSON"),
    "no object": ("train.jsonl", b"[1, 2]", r"line 1: expected an object"),
    "empty": ("train.jsonl", b"", r"has no rows"),
    "not utf-8": ("train.jsonl", b'{"before": "\xff"}', r"byte 12 is not UTF-8"),
    "corrupt xlsx": ("train.xlsx", b"PK\x03\x04 nonsense", r"cannot be read as xlsx"),
    "corrupt parquet": ("train.parquet", b"PAR1", r"cannot be read as parquet"),
    "open quote": ("train.tsv", b'before\tafter\tlabel\n"a\tb\tx\nc\td\ty\n"e\tf\tx\n', r"row 2|cannot be read as tsv"),
    "open cell": ("train.tsv", b'before\tafter\tlabel\n"a\n\tb"\tc\tx\n', r"row 2: a cell runs past the end"),
    "ragged csv": ("train.csv", b"before,after,label\na,b\n", r"row 2: does not have 3 cells"),
}


@pytest.mark.parametrize("case", FILES, ids=lambda name: name.replace(" ", "-"))
def test_bad_files_are_named(tmp_path, case):
    name, content, message = FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_corpus(DataConfig(path=str(tmp_path)))


def test_missing_places(tmp_path):
    with pytest.raises(DataError, match="no file"):
        read_corpus(DataConfig(path=str(tmp_path / "no.jsonl")))
    with pytest.raises(DataError, match="no file or folder"):
        read_corpus(DataConfig(path="./no/such/folder"))
    write(tmp_path, "train.jsonl", ROWS)
    with pytest.raises(DataError, match="no dev split"):
        read_corpus(DataConfig(path=str(tmp_path)))
    write(tmp_path, "train.csv", ROWS)
    with pytest.raises(DataError, match="more than one train file"):
        read_corpus(DataConfig(path=str(tmp_path)))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"format '.txt' is not known"):
        read_corpus(DataConfig(train=str(tmp_path / "notes.txt"), dev=str(tmp_path / "notes.txt")))


def test_formula_cells_are_refused_and_rows_are_numbered_as_the_sheet_does(tmp_path):
    write(tmp_path, "dev.jsonl", ROWS)
    for cell, message in (
        ("=1+1", r"row 4, column 'before': a formula \(=1\+1\)"),
        (3, r"row 4, column 'before'.*int 3"),
    ):
        book = openpyxl.Workbook()
        for line in (["before", "after", "label"], ["a", "b", "x"], [None, None, None], [cell, "b", "y"]):
            book.active.append(line)
        book.save(tmp_path / "train.xlsx")
        with pytest.raises(DataError, match=message):
            read_corpus(DataConfig(path=str(tmp_path)))


def test_a_hub_corpus_with_a_class_column(monkeypatch):
    import datasets

    features = datasets.Features(
        {
            "before": datasets.Value("string"),
            "after": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["q", "p"]),
        }
    )
    part = datasets.Dataset.from_list([{"before": "a", "after": "b", "label": n} for n in (0, 1)], features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": part, "validation": part})
    corpus = read_corpus(DataConfig(path="someone/something"))
    assert corpus.labels == ["p", "q"]
    assert [example.label for example in corpus.splits["dev"]] == [1, 0]


def test_a_hub_corpus_that_cannot_be_reached(monkeypatch):
    import datasets

    def refuse(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        DataError, match=r"'someone/something' is neither a file, a folder nor a hub dataset .* no network"
    ):
        read_corpus(DataConfig(path="someone/something"))


def test_real_corpora(real_data):
    corpus = read_corpus(
        DataConfig(path=str(real_data / "iterater"), before="before_sent", after="after_sent", label="labels",
                   drop_labels=["others"])
    )  # fmt: skip
    assert {split: len(rows) for split, rows in corpus.splits.items()} == {"train": 2901, "dev": 336}
    corpus = read_corpus(DataConfig(path=str(real_data / "argrewrite"), before="source", after="target", label="label"))
    assert len(corpus.labels) == 9
    assert sum(example.before == "" for example in corpus.splits["train"]) == 752
    assert sum(example.after == "" for example in corpus.splits["train"]) == 319


# ----- prompts -----


@given(st.integers(0, 60), st.integers(0, 60), st.integers(2, 80))
def test_the_longer_side_is_shortened(first, second, budget):
    before, after = shorten(list(range(first)), list(range(second)), budget)
    assert before == list(range(len(before))) and after == list(range(len(after)))
    assert len(before) + len(after) == min(first + second, budget)
    if len(before) < first and len(after) < second:
        assert abs(len(before) - len(after)) <= 1
    elif len(before) < first:
        assert len(before) >= len(after) - 1
    elif len(after) < second:
        assert len(after) >= len(before) - 1


@pytest.mark.parametrize("prompt", ["plain", "tagged", "instruction"])
def test_the_template_is_never_cut(llama, prompt):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    data = DataConfig(max_length=40, prompt=prompt)
    encoder = Encoder(tokenizer, data, ["x", "y"])
    short = encoder.encode(Example("1", "The school", "The bakery", 0))["input_ids"]
    long = encoder.encode(Example("2", "The school " * 90, "The bakery", 0))["input_ids"]
    assert len(long) == 40
    assert long[: len(encoder.head)] == encoder.head == short[: len(encoder.head)]
    assert long[len(long) - len(encoder.tail) :] == encoder.tail
    assert encoder.middle == [] or any(
        long[i : i + len(encoder.middle)] == encoder.middle for i in range(len(long) - len(encoder.middle) + 1)
    )
    after = tokenizer("The bakery", add_special_tokens=False)["input_ids"]
    assert long[len(long) - len(encoder.tail) - len(after) : len(long) - len(encoder.tail)] == after


def test_a_template_longer_than_the_limit_is_refused(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    with pytest.raises(ConfigError, match="template alone takes"):
        Encoder(tokenizer, DataConfig(max_length=16, prompt="instruction"), ["label"] * 30)


def test_text_cannot_smuggle_in_special_tokens(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    encoded = Encoder(tokenizer, DataConfig(), ["x", "y"]).encode(Example("1", "<pad> </s>", "b", 0))
    assert tokenizer.pad_token_id not in encoded["input_ids"]
    assert tokenizer.eos_token_id not in encoded["input_ids"]


def test_an_example_without_any_token_is_named(llama):
    encoder = Encoder(AutoTokenizer.from_pretrained(llama), DataConfig(after=None), ["x", "y"])
    with pytest.raises(DataError, match="example 'train:7' has no text"):
        encoder.encode(Example("train:7", "", None, 0))
    pair = Encoder(AutoTokenizer.from_pretrained(llama), DataConfig(prompt="tagged"), ["x", "y"])
    assert pair.encode(Example("train:8", "", "", 0))["input_ids"] == pair.head + pair.middle + pair.tail


# ----- batches -----


def test_the_plan_does_not_depend_on_the_split_over_ranks():
    lengths = [(7 * i) % 31 + 3 for i in range(101)]
    plan = BatchSampler(lengths, micro_batch_size=4, micro_batches=4, seed=5)
    for world, accumulation in ((1, 4), (2, 2), (4, 1)):
        for step in (0, 3, 7):
            mine = [[plan.step(step)[g * world + rank] for g in range(accumulation)] for rank in range(world)]
            flat = [mine[m % world][m // world] for m in range(4)]
            assert flat == plan.step(step)


@given(st.lists(st.integers(1, 300), min_size=16, max_size=200), st.integers(0, 5))
def test_an_epoch_shows_each_example_at_most_once(lengths, seed):
    plan = BatchSampler(lengths, micro_batch_size=3, micro_batches=2, seed=seed)
    for epoch in (0, 1):
        first = epoch * plan.steps_per_epoch
        seen = [i for step in range(first, first + plan.steps_per_epoch) for batch in plan.step(step) for i in batch]
        assert len(seen) == len(set(seen)) == plan.steps_per_epoch * 6
    assert len(lengths) - plan.steps_per_epoch * 6 < 6


def test_batches_are_bucketed_by_length():
    lengths = [(i * 37) % 200 + 1 for i in range(1000)]
    plan = BatchSampler(lengths, micro_batch_size=8, micro_batches=2, seed=0)
    batches = [batch for step in range(plan.steps_per_epoch) for batch in plan.step(step)]
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    real = sum(lengths[i] for batch in batches for i in batch)
    assert real / padded > 0.95  # random batches of 8 fill about .57


@given(
    st.lists(st.integers(1, 60), min_size=4, max_size=200), st.integers(60, 300), st.integers(1, 4), st.integers(0, 5)
)
def test_micro_batches_by_tokens_keep_to_them_and_show_each_example_once(lengths, tokens, micro_batches, seed):
    plan = BatchSampler(lengths, 8, micro_batches, seed, bucket=3, tokens=tokens)
    steps = [plan.step(step) for step in range(2 * plan.steps_per_epoch + 3)]
    assert all(len(step) == micro_batches and all(step) for step in steps)
    for batch in (batch for step in steps for batch in step):
        assert max(lengths[i] for i in batch) * len(batch) <= tokens
    first = [i for step in steps[: plan.steps_per_epoch] for batch in step for i in batch]
    assert len(first) == len(set(first)) == plan.examples(plan.steps_per_epoch)
    again = BatchSampler(lengths, 8, micro_batches, seed, bucket=3, tokens=tokens)
    order = random.Random(seed).sample(range(len(steps)), len(steps))  # as after a resumption, in any order
    assert [again.step(step) for step in order] == [steps[step] for step in order]


def test_micro_batches_by_tokens_are_equal_work():
    lengths = [(i * 37) % 200 + 1 for i in range(2000)]
    plan = BatchSampler(lengths, 8, micro_batches=4, seed=0, tokens=2048)
    batches = [batch for step in range(plan.steps_per_epoch) for batch in plan.step(step)]
    padded = [max(lengths[i] for i in batch) * len(batch) for batch in batches]
    assert sorted(padded)[1] > 0.85 * 2048  # but for the last one; with 8 examples each: from 8 to 1,600
    assert sum(lengths[i] for batch in batches for i in batch) / sum(padded) > 0.95
    assert sum(map(len, batches)) > 0.97 * len(lengths)
    assert plan.examples_per_step == pytest.approx(4 * 2048 / 100, rel=0.1)
    assert max(map(len, batches)) > 100 and min(map(len, batches)) < 12


def test_in_a_small_corpus_every_example_has_its_turn_and_meets_others():
    lengths = [10 * (i // 5) + 10 for i in range(60)]
    plan = BatchSampler(lengths, 8, micro_batches=13, seed=0, tokens=240)  # one bucket; fewer than 2 x 13 micro-batches
    assert plan.steps_per_epoch == 1
    epochs = [[tuple(batch) for batch in plan.step(step)] for step in range(40)]
    assert {i for epoch in epochs for batch in epoch for i in batch} == set(range(60))
    assert len({frozenset(batch) for epoch in epochs for batch in epoch}) > 3 * 15
    assert sum(map(len, epochs[0])) < 60


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(50, 200), st.integers(1, 5))
def test_evaluation_by_tokens_shows_each_example_once(lengths, tokens, world):
    shares = [evaluation_batches(lengths, 8, rank, world, tokens) for rank in range(world)]
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1
    for batch in (batch for share in shares for batch in share if batch):
        assert max(lengths[i] for i in batch) * len(batch) <= tokens


def test_few_examples_still_make_a_micro_batch_for_each_rank():
    plan = BatchSampler([5] * 6, 8, micro_batches=4, seed=0, tokens=64)
    assert [len(plan.step(step)) for step in range(3)] == [4, 4, 4] and plan.steps_per_epoch == 1
    with pytest.raises(ConfigError, match="4 micro-batches per step are more than the 3 examples"):
        BatchSampler([5] * 3, 8, micro_batches=4, seed=0, tokens=64)


def test_a_batch_larger_than_the_corpus_is_refused():
    with pytest.raises(ConfigError, match=r"global batch of 32 examples .* larger than the training split of 31"):
        BatchSampler([5] * 31, 8, 4, 0)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(1, 9), st.integers(1, 5))
def test_evaluation_shows_each_example_exactly_once(lengths, size, world):
    shares = [evaluation_batches(lengths, size, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(len(lengths)))


def test_collate_pads_on_the_right():
    batch = collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}], pad_token_id=9, labels=[1, 0])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]


def test_on_cpus_in_bf16_batches_have_few_lengths():
    cpu, wanted = torch.device("cpu"), {1: 32, 32: 32, 33: 64, 95: 96, 97: 100, 100: 100}
    config = load_config(["--data.path=x", "--data.max_length=100"])
    lengths = padded_lengths(config, cpu)
    assert {length: lengths.at_least(length) for length in wanted} == wanted
    batch = collate([{"input_ids": [5] * 33, "edit_mask": [1] * 33}], 9, lengths=lengths)
    assert batch["input_ids"].shape == (1, 64) and batch["attention_mask"].sum() == batch["edit_mask"].sum() == 33
    assert batch["attention_mask"].padded
    assert padded_lengths(config, torch.device("cuda")) is None
    for other in ("--model.dtype=float32", "--optim.micro_batch_tokens=200"):
        assert padded_lengths(load_config(["--data.path=x", "--data.max_length=100", other]), cpu) is None


def test_the_synthetic_corpus_is_seeded_and_has_five_intentions():
    rows = synthetic_pairs(1500)
    assert rows == synthetic_pairs(1500)
    assert rows != synthetic_pairs(1500, seed=1)
    assert len({(row["before"], row["after"]) for row in rows}) == 1500
    assert {row["label"] for row in rows} == set(INTENTIONS)
    assert all(row["before"] != row["after"] for row in rows)
