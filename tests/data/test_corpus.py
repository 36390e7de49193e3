"""Corpora: formats, labels, and what is wrong with a file."""

import json
from pathlib import Path

import openpyxl
import pandas
import pytest

from irtune.config import DataConfig
from irtune.data import Example, read_corpus
from irtune.data.synthetic import INTENTIONS, synthetic_pairs
from irtune.errors import DataError

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


def test_the_synthetic_corpus_is_seeded_and_has_five_intentions():
    rows = synthetic_pairs(1500)
    assert rows == synthetic_pairs(1500)
    assert rows != synthetic_pairs(1500, seed=1)
    assert len({(row["before"], row["after"]) for row in rows}) == 1500
    assert {row["label"] for row in rows} == set(INTENTIONS)
    assert all(row["before"] != row["after"] for row in rows)
