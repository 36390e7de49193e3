"""A corpus: splits of examples and the list of labels, from a file, a folder or a hub id."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from irtune.config.schema import DataConfig
from irtune.data.tables import SUFFIXES, NumberedRows, Row, read_table
from irtune.errors import DataError

SPLITS = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}


@dataclass(frozen=True)
class Example:
    """One revision: a text before, a text after (None for single texts), and the number of its label."""

    id: str
    before: str
    after: str | None
    label: int


@dataclass(frozen=True)
class Corpus:
    """Splits by name (train and dev always, test where there is one) and label names in order of their numbers."""

    splits: dict[str, list[Example]]
    labels: list[str]


def read_corpus(data: DataConfig) -> Corpus:
    """Read all splits of the corpus that `data` describes.

    Raises:
        DataError: for missing files, columns, splits or rows, labels that are unknown or stand only outside the
            training split, and cells that are not text. Names the file, row, column and value.
    """
    tables = {split: _kept(rows, where, data) for split, (where, rows) in _find_splits(data).items()}
    splits, raw = {}, {}
    for split, (where, rows) in tables.items():
        raw[split] = [label for _, label in _labels(rows, where, data)]
        splits[split] = [
            Example(
                id=str(row[data.id]) if data.id in row else f"{split}:{number}",
                before=_text(row, data.before, where, number),
                after=None if data.after is None else _text(row, data.after, where, number),
                label=-1,  # numbered once all splits are known
            )
            for number, row in rows
        ]
        _check_ids(splits[split], where, data.id)
    labels = _label_names(raw, {split: where for split, (where, _) in tables.items()}, data)
    index = {label: position for position, label in enumerate(labels)}
    return Corpus(
        {
            split: [replace(example, label=index[name]) for example, name in zip(examples, raw[split])]
            for split, examples in splits.items()
        },
        labels,
    )


def _find_splits(data: DataConfig) -> dict[str, tuple[str, NumberedRows]]:
    """Rows of each split with the place they come from, for messages."""
    found: dict[str, tuple[str, NumberedRows]] = {}
    for split in SPLITS:
        named = getattr(data, split)
        if named is not None:
            path = Path(named).expanduser()
            found[split] = (str(path), read_table(path))
    if data.path is not None:
        path = Path(data.path).expanduser()
        if path.is_file() or path.suffix.lower() in SUFFIXES:
            found.setdefault("train", (str(path), read_table(path)))
        elif path.is_dir():
            for split, file in _files_of(path).items():
                if split not in found:
                    found[split] = (str(file), read_table(file))
        elif data.path.count("/") <= 1 and not data.path.startswith((".", "/", "~")):
            found = _from_hub(data.path, data.label) | found
        else:
            raise DataError(f"there is no file or folder {data.path!r}")
    for split in ("train", "dev"):
        if split not in found:
            names = ", ".join(f"{stem}{suffix}" for stem in SPLITS[split] for suffix in SUFFIXES[:1])
            raise DataError(f"{data.path or data.train}: no {split} split; expected a file such as {names}, or set "
                            f"data.{split}")  # fmt: skip
    return found


def _files_of(folder: Path) -> dict[str, Path]:
    files = {}
    for split, stems in SPLITS.items():
        matches = [folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
        matches = [match for match in matches if match.is_file()]
        if len(matches) > 1:
            raise DataError(f"{folder}: more than one {split} file: {', '.join(match.name for match in matches)}")
        if matches:
            files[split] = matches[0]
    return files


def _from_hub(name: str, label: str) -> dict[str, tuple[str, NumberedRows]]:
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # the hub client raises many kinds: no such id, no network, no access
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{name!r} is neither a file, a folder nor a hub dataset that can be reached: {reason}"
        ) from error
    found = {}
    for split, stems in SPLITS.items():
        for stem in stems:
            if stem in loaded and split not in found:
                part = loaded[stem]
                names = getattr(part.features.get(label), "names", None)  # a class column holds numbers
                rows = part.to_list()
                if names is not None:
                    rows = [row | {label: names[row[label]]} for row in rows]
                found[split] = (f"{name} ({stem})", list(enumerate(rows, 1)))
    return found


def _kept(rows: NumberedRows, where: str, data: DataConfig) -> tuple[str, NumberedRows]:
    """Check the columns and leave out rows whose raw label is dropped; rows keep their number."""
    first = rows[0][1]
    for column in (data.before, data.after, data.label):
        if column is None or column in first:
            continue
        known = [str(name) for name in first]
        near = difflib.get_close_matches(column, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"{where}: no column {column!r}{hint} Columns: {', '.join(known[:20])}")
    for number, row in rows:
        lacking = [column for column in (data.before, data.after, data.label) if column and column not in row]
        if lacking:
            raise DataError(f"{where}, row {number}: no column {lacking[0]!r}, which other rows have")
    kept = [(number, row) for number, row in rows if str(row[data.label]) not in data.drop_labels]
    if not kept:
        raise DataError(f"{where}: no rows are left without the labels {data.drop_labels}")
    return where, kept


def _labels(rows: NumberedRows, where: str, data: DataConfig) -> Iterable[tuple[int, str]]:
    """Label name of each row, mapped where `data.labels` is a map."""
    for number, row in rows:
        value = row.get(data.label)
        if isinstance(value, bool) or not isinstance(value, str | int) or str(value).strip() == "":
            raise DataError(f"{where}, row {number}, column {data.label!r}: {value!r} is no label")
        name = str(value)
        if isinstance(data.labels, dict):
            if name not in data.labels:
                known = ", ".join(data.labels)
                raise DataError(f"{where}, row {number}, column {data.label!r}: unknown label {name!r}; known: {known}")
            name = data.labels[name]
        elif data.labels is not None and name not in data.labels:
            known = ", ".join(data.labels)
            raise DataError(f"{where}, row {number}, column {data.label!r}: unknown label {name!r}; known: {known}")
        yield number, name


def _label_names(raw: dict[str, list[str]], places: dict[str, str], data: DataConfig) -> list[str]:
    train = set(raw["train"])
    if data.labels is None and len(train) < 2:
        raise DataError(f"{places['train']}: only one label ({raw['train'][0]!r}); at least 2 are needed")
    for split, names in raw.items():
        strange = sorted(set(names) - train)
        if strange:
            raise DataError(
                f"{places[split]}: label {strange[0]!r} stands {names.count(strange[0])} times in {split} but never in "
                "the training split, so it cannot be learnt; add it to data.drop_labels or to the training split"
            )
    if isinstance(data.labels, dict):
        return list(dict.fromkeys(data.labels.values()))
    return list(data.labels) if data.labels is not None else sorted(train)


def _text(row: Row, column: str, where: str, number: int) -> str:
    value = row.get(column)
    if value is None:  # an empty cell: an addition or a deletion
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(f"{where}, row {number}, column {column!r}: expected text, not the {kind} {value!r}")
    return value


def _check_ids(examples: list[Example], where: str, column: str) -> None:
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise DataError(
                f"{where}: id {example.id!r} in column {column!r} stands twice; set data.id to another column"
            )
        seen.add(example.id)
