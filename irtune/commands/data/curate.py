"""`python -m irtune data curate`: labels that are probably wrong, and a corpus without them."""

import csv
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from irtune.commands.common import a_path, a_share, add_json, check_single, parser, show, show_json, table
from irtune.config.labels import canonical
from irtune.config.schema import DataConfig
from irtune.data.corpus import Tables, corpus_digest, find_splits, fold_records, read_corpus
from irtune.data.curation import Change, filter_and_correct, suspicious_rows
from irtune.data.readers.records import Record
from irtune.errors import ConfigError, DataError, RunError
from irtune.evaluation.saved_run import read_run
from irtune.files import replacing, to_json, write_text, writing

CORRECT = 0.8
CHANGES = "changes.csv"
SHOWN = ("id", "action", "label", "other", "probability_of_label", "probability_of_other")
COLUMNS = (*SHOWN, "reason", "before", "after")


@dataclass(frozen=True)
class OutOfFold:
    """The training rows of a cross-validated corpus, each predicted by the run that did not train on it.

    tables: all splits. probabilities: float64 [rows of the train split, classes].
    """

    data: DataConfig
    tables: Tables
    names: list[str]
    probabilities: np.ndarray

    @property
    def rows(self) -> list[Record]:
        """Of the train split, in order."""
        return self.tables["train"][1]

    @property
    def labels(self) -> np.ndarray:
        """Numbers of the given labels, int64 [rows]."""
        return np.array([self.names.index(record.label) for record in self.rows])


def main(arguments: Sequence[str]) -> int:
    """List suspicious rows, or write a corpus without them and the list of what was changed."""
    options = parser(
        "data curate",
        "Rows whose label is probably wrong, by the predictions that crossvalidate made for each row without having "
        "seen it. --filter none lists the suspicious ones. --filter median takes out the half of the training rows "
        "whose label is the least probable, gives those back whose likeliest other label is above --correct, with that "
        f"label, and writes the new corpus and {CHANGES}. Dev and test stay as they are.",
        "python -m irtune data curate --folds runs/crossvalidate",
    )
    options.add_argument("--folds", required=True, type=a_path, help="the --output_dir of crossvalidate")
    options.add_argument("--filter", choices=("none", "median"), default="none", help="what to take out (default none)")
    options.add_argument("--correct", type=a_share, help=f"least probability of a new label (default {CORRECT})")
    options.add_argument("--output", type=a_path, help=f"new folder for {CHANGES} and the new corpus")
    add_json(options)
    given = options.parse_args(list(arguments))
    median = given.filter == "median"
    if given.correct is not None and not median:
        raise ConfigError("--correct goes with --filter median: --filter none changes nothing; leave one of them out")
    if median and given.output is None:
        raise ConfigError("--filter median writes a corpus: name its folder with --output")
    if given.output is not None and given.output.exists():
        raise ConfigError(f"--output {str(given.output)!r} exists; name a folder that does not")
    found = read_folds(given.folds)
    probabilities, labels = found.probabilities, found.labels
    correct = CORRECT if given.correct is None else given.correct
    changes = filter_and_correct(probabilities, labels, correct) if median else suspicious_rows(probabilities, labels)
    kept = _changed(found, changes) if median else {}
    rows = [_row(change, found) for change in changes]
    if given.output is not None:
        with writing(given.output):
            given.output.parent.mkdir(parents=True, exist_ok=True)
            with replacing(given.output) as scratch:
                scratch.mkdir()
                _write(scratch, rows, kept, found.data)
    show_json(rows) if given.json else show(_text(rows, len(labels)))
    return 0


def read_folds(folder: Path) -> OutOfFold:
    """The out-of-fold predictions below the folder of a cross-validation.

    Raises:
        RunError: when folds are missing or not finished, or are folds of different corpora.
        DataError: when the corpus is another by now, or rows of it are in no fold.
    """
    runs = {}
    for place in sorted(folder.glob("fold_*")):
        config, results = read_run(place)
        runs[config.data.fold] = (place, config.data, results)
    if not runs or None in runs:
        raise RunError(f"{folder} holds no folds; accepted: the --output_dir of python -m irtune crossvalidate")
    place, data, results = next(iter(runs.values()))
    check_single(data, "data curate")
    folds = int(str(data.fold).partition("/")[2])
    missing = [f"{k}/{folds}" for k in range(1, folds + 1) if f"{k}/{folds}" not in runs]
    if missing or len(runs) > folds:
        raise RunError(
            f"{folder} lacks the fold {missing[0]}, so the rows in it have no prediction; run crossvalidate again to "
            "finish it"
            if missing
            else f"{folder} holds folds of several numbers of folds: {', '.join(map(str, runs))}; curate one of them"
        )
    for other, settings, _ in runs.values():
        if dataclasses.replace(settings, fold=data.fold) != data:
            raise RunError(f"{other} and {place} are folds of different corpora: their data sections differ")
    names = list(results["dev"]["per_class"])
    tables = find_splits(data)
    records, where = fold_records(tables, data, folds)
    _check_complete(records, where, tables["train"][0])
    probabilities = np.zeros((len(records), len(names)))
    for k in range(folds):
        rows = [row for row, number in enumerate(where) if number == k]
        probabilities[rows] = _predictions(*runs[f"{k + 1}/{folds}"], names)
    return OutOfFold(data, tables, names, probabilities[: len(tables["train"][1])])


def _check_complete(records: list[Record], folds: list[int], where: str) -> None:
    """Raise a DataError for rows that no fold holds out."""
    left = sorted({record.label for record, fold in zip(records, folds) if fold < 0})
    if left:
        raise DataError(
            f"{where}: {folds.count(-1)} row(s) are in no fold, so that they have no prediction: all examples of "
            f"{', '.join(map(repr, left))} would be held out together; drop such labels with data.drop_labels, or use "
            "another data.split_seed, and run crossvalidate again"
        )


def _predictions(place: Path, data: DataConfig, results: dict[str, Any], names: list[str]) -> list[list[float]]:
    """Probabilities of the rows that one fold holds out, in the corpus's order."""
    corpus = read_corpus(data)
    if results.get("corpus_sha256") != corpus_digest(corpus):
        raise DataError(
            f"{data.path or data.train} is not the corpus that {place} was trained on (its SHA-256 is another); run "
            "crossvalidate again"
        )
    file = place / "predictions.jsonl"
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        if [line["id"] for line in lines] != [example.id for example in corpus.splits["dev"]]:
            raise ValueError("its ids are not those of the fold")
        return [[float(line["probabilities"][name]) for name in names] for line in lines]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{file} is damaged: {error}; delete {place} and run crossvalidate again") from error


def _changed(found: OutOfFold, changes: list[Change]) -> Tables:
    """All splits, with the changes made to the training rows.

    Raises:
        DataError: for a label that would have no row left.
    """
    where, records = found.tables["train"]
    # A label as the file has it, so that the new corpus is read with the same configuration.
    raw = {name: name for name in found.names}
    if isinstance(found.data.labels, dict):
        raw = {name: str(canonical(key)) for key, name in reversed(found.data.labels.items())}
    dropped = {change.row for change in changes if change.action == "dropped"}
    others = {change.row: found.names[change.other] for change in changes if change.action == "relabelled"}
    kept = [
        dataclasses.replace(record, label=others[row], raw=raw[others[row]]) if row in others else record
        for row, record in enumerate(records)
        if row not in dropped
    ]
    gone = sorted(set(found.names) - {record.label for record in kept})
    if gone:
        raise DataError(f"{where}: no row of {gone[0]!r} would be left; use --filter none, and change rows by hand")
    return found.tables | {"train": (where, kept)}


def _row(change: Change, found: OutOfFold) -> dict[str, Any]:
    record = found.rows[change.row]
    other = found.names[change.other]
    reason = change.reason.format(label=repr(record.label), other=repr(other))
    numbers = (round(change.given, 4), round(change.best, 4))
    cells = (_name(record, "train"), change.action, record.label, other, *numbers, reason, record.before, record.after)
    return dict(zip(COLUMNS, cells, strict=True))


def _name(record: Record, split: str) -> str:
    return f"{split}:{record.number}" if record.id is None else record.id


def _write(folder: Path, rows: list[dict[str, Any]], kept: Tables, data: DataConfig) -> None:
    with (folder / CHANGES).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for split, (_, records) in kept.items():
        lines = []
        for record in records:
            cells = {
                data.group: record.group,  # which may be one of the texts
                data.id: _name(record, split),
                data.before: record.before,
                data.after: record.after,
                data.context: record.context,
                data.label: record.raw,
                data.weight: record.weight,
            }
            lines.append(to_json({name: cell for name, cell in cells.items() if name is not None}) + "\n")
        write_text(folder / f"{split}.jsonl", "".join(lines))


def _text(rows: list[dict[str, Any]], count: int) -> str:
    shown = table(list(SHOWN), [[str(row[name]) for name in SHOWN] for row in rows])
    actions = [row["action"] for row in rows]
    said = ", ".join(f"{actions.count(name)} {name}" for name in dict.fromkeys(actions)) or "nothing suspicious"
    return f"{shown}\n\nof {count} training rows: {said}"
