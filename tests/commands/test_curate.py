"""Curation of a corpus by the predictions of a cross-validation, and what it refuses."""

import csv
import json
import shutil

import pytest

from irtune.cli import main
from irtune.config import load_config, write_config
from irtune.data import corpus_digest, read_corpus

pytestmark = pytest.mark.quick
# A probability of label x for each training row, by its text.
OF_X = {"r0": 0.9, "r1": 0.1, "r2": 0.8, "r3": 0.7, "r4": 0.2, "r5": 0.3, "r6": 0.4, "r7": 0.95}
LABELS = dict(zip(OF_X, ["A", "A", "A", "A", "B", "B", "B", "B"]))  # A is x, B is y; r1 and r7 are mislabelled


def write(folder, rows):
    for split, texts in rows.items():
        lines = [
            {"old": text, "new": f"{text}!", "kind": kind, "doc": f"d{text}", "near": f"by {text}"}
            for text, kind in texts.items()
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folds(tmp_path):
    """A corpus of eight training rows, two dev rows and a test row, and the folder of its cross-validation."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write(corpus, {"train": LABELS, "dev": {"d0": "A", "d1": "B"}, "test": {"t0": "A"}})
    for fold in (1, 2):
        place = tmp_path / "cv" / f"fold_{fold}"
        place.mkdir(parents=True)
        config = load_config([
            f"--data.path={corpus}", f"--data.fold={fold}/2", "--data.before=old", "--data.after=new",
            "--data.label=kind", "--data.group=doc", "--data.context=near", "--data.labels={A: x, B: y}",
        ])  # fmt: skip
        write_config(config, place / "config.yaml")
        data = read_corpus(config.data)
        results = {"corpus_sha256": corpus_digest(data), "dev": {"per_class": {"x": {}, "y": {}}}}
        (place / "results.json").write_text(json.dumps(results))
        lines = []
        for example in data.splits["dev"]:
            of_x = OF_X.get(example.before, 0.5)
            lines.append({"id": example.id, "probabilities": {"x": of_x, "y": 1 - of_x}})
        (place / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "cv"


def curate(folds, *options):
    return main(["data", "curate", "--folds", str(folds), *map(str, options)])


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_by_default_suspicious_rows_are_listed_and_nothing_is_changed(folds, tmp_path, capsys):
    assert curate(folds, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    # Own label: A .9 .1 .8 .7 (mean .625), B .8 .7 .6 .05 (mean .5375).
    assert [(row["before"], row["label"], row["other"]) for row in found] == [("r7", "y", "x"), ("r1", "x", "y")]
    assert found[0]["id"] == "train:8" and found[0]["action"] == "suspicious"
    assert found[0]["reason"] == (
        "models that did not see it give 'x' 0.95 and 'y' 0.05; rows labelled 'x' get 0.62 on average"
    )
    assert curate(folds, "--output", tmp_path / "list") == 0
    assert "of 8 training rows: 2 suspicious" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "list").iterdir()] == ["changes.csv"]


def test_the_new_corpus_is_read_like_the_old_one(folds, tmp_path):
    new = tmp_path / "new"
    assert curate(folds, "--filter", "median", "--output", new) == 0
    # Own label: .9 .1 .8 .7 .8 .7 .6 .05, median .7: r6 (.6), r1 (.1) and r7 (.05) are below it.
    with (new / "changes.csv").open() as file:
        changes = {row["before"]: (row["action"], row["other"]) for row in csv.DictReader(file)}
    assert changes == {"r7": ("relabelled", "x"), "r1": ("relabelled", "y"), "r6": ("dropped", "x")}
    kinds = {row["old"]: row["kind"] for row in rows_of(new / "train.jsonl")}
    assert kinds == {"r0": "A", "r1": "B", "r2": "A", "r3": "A", "r4": "B", "r5": "B", "r7": "A"}
    assert [row["id"] for row in rows_of(new / "train.jsonl")][-1] == "train:8"
    old = {"data.before": "old", "data.after": "new", "data.label": "kind", "data.group": "doc",
           "data.labels": "{A: x, B: y}"}  # fmt: skip
    options = [f"--{key}={value}" for key, value in old.items()]
    before = read_corpus(load_config([f"--data.path={tmp_path / 'corpus'}", *options]).data)
    after = read_corpus(load_config([f"--data.path={new}", *options]).data)
    assert after.splits["dev"] == before.splits["dev"] and after.splits["test"] == before.splits["test"]
    assert after.splits["train"][0] == before.splits["train"][0] and len(after.splits["train"]) == 7


def test_a_higher_threshold_drops_more(folds, tmp_path):
    assert curate(folds, "--filter", "median", "--correct", "0.92", "--output", tmp_path / "new") == 0
    assert [row["old"] for row in rows_of(tmp_path / "new/train.jsonl")] == ["r0", "r2", "r3", "r4", "r5", "r7"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folds: shutil.rmtree(folds / "fold_2"), "lacks the fold 2/2, so the rows in it have no prediction"),
        (lambda folds: (folds / "fold_2/results.json").unlink(), "is not finished"),
        (
            lambda folds: write(folds.parent / "corpus", {"train": LABELS | {"r0": "B"}}),
            "is not the corpus that",
        ),
        (
            lambda folds: write(folds.parent / "corpus", {"train": LABELS | {"r8": "A"}}),
            "is not the corpus that",
        ),
        (lambda folds: (folds / "fold_1/predictions.jsonl").write_text("{"), "predictions.jsonl is damaged"),
        (lambda folds: (folds / "fold_1/predictions.jsonl").write_text(""), "its ids are not those of the fold"),
        (lambda folds: shutil.rmtree(folds), "holds no folds"),
    ],
)  # fmt: skip
def test_folds_that_do_not_fit_are_refused(folds, tmp_path, capsys, spoil, said):
    spoil(folds)
    assert curate(folds, "--filter", "median", "--output", tmp_path / "new") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_rows_that_are_in_no_fold_are_refused(folds, capsys):
    write(folds.parent / "corpus", {"train": LABELS | {"r8": "C"}})  # the only C is never held out
    for fold in (1, 2):
        file = folds / f"fold_{fold}/config.yaml"
        file.write_text(file.read_text().replace("    B: y\n", "    B: y\n    C: z\n"))
    assert curate(folds) == 2
    said = capsys.readouterr().err
    assert "1 row(s) are in no fold" in said and "'z' would be held out together" in said and "drop_labels" in said


def test_a_label_without_rows_is_refused(folds, tmp_path, capsys):
    for fold in (1, 2):
        file = folds / f"fold_{fold}/predictions.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for number, line in enumerate(lines):
            line["probabilities"] = {"x": 0.9 - number / 1000, "y": 0.1 + number / 1000}
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curate(folds, "--filter", "median", "--output", tmp_path / "new") == 2
    assert "no row of 'y' would be left; use --filter none" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--correct", "0.9"], "--correct goes with --filter median"),
        (["--filter", "median"], "name its folder with --output"),
        (["--filter", "median", "--correct", "1.5"], "'1.5'; accepted: a number from 0 to 1"),
        (["--filter", "median", "--correct", "nan"], "'nan'; accepted: a number from 0 to 1"),
        (["--output", "."], "--output '.' exists; name a folder that does not"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, capsys, options, said):
    assert curate(tmp_path, *options) == 2
    assert said in capsys.readouterr().err
