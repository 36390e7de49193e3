"""A corpus: splits of examples and the list of labels, from a file, a folder or a hub id."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from irtune.config.schema import DataConfig
from irtune.data.folds import fold_of
from irtune.data.tables import SUFFIXES, NumberedRows, Row, read_table
from irtune.errors import DataError

SPLITS = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}


@dataclass(frozen=True)
class Example:
    """One revision: a text before, a text after (None for single texts), the number of its label, its document."""

    id: str
    before: str
    after: str | None
    label: int
    group: str | None = None


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
    if data.fold is not None or "dev" not in tables:
        tables |= _held_out(tables, data)
    splits, raw = {}, {}
    for split, (where, rows) in tables.items():
        raw[split] = [label for _, label in _labels(rows, where, data)]
        splits[split] = _examples(rows, split, where, data)
    labels = _label_names(raw, {split: where for split, (where, _) in tables.items()}, data)
    index = {label: position for position, label in enumerate(labels)}
    return Corpus(
        {
            split: [replace(example, label=index[name]) for example, name in zip(examples, raw[split])]
            for split, examples in splits.items()
        },
        labels,
    )


def _held_out(tables: dict[str, tuple[str, NumberedRows]], data: DataConfig) -> dict[str, tuple[str, NumberedRows]]:
    """Train and dev split by `data.fold` or `data.dev_fraction`: no document stands in both."""
    joined = [(split, number, row) for split in ("train", "dev") for number, row in tables.get(split, ("", []))[1]]
    where = tables["train"][0]
    if data.fold is not None:
        held_out, folds = (int(part) for part in data.fold.split("/"))
    else:
        held_out, folds = 1, max(2, round(1 / (data.dev_fraction or 0.1)))
    groups = [str(row[data.group]) if data.group else f"{split}:{number}" for split, number, row in joined]
    if folds > len(set(groups)):
        what = "documents" if data.group else "examples"
        raise DataError(f"{where}: {folds} folds need at least as many {what}, not {len(set(groups))}")
    place = fold_of([str(row[data.label]) for _, _, row in joined], groups, folds, data.split_seed)
    # Numbers go on after those of the training file, so that ids made of them stay different.
    last = max(number for _, number, _ in joined)
    rows = [(number if split == "train" else last + number, row) for split, number, row in joined]
    dev = [row for row, fold in zip(rows, place) if fold == held_out - 1]
    if not dev:
        raise DataError(f"{where}: too few examples of each label for {folds} folds; use fewer, or a larger corpus")
    return {"train": (where, [row for row, fold in zip(rows, place) if fold != held_out - 1]), "dev": (where, dev)}


def read_split(data: DataConfig, split: str, labels: list[str]) -> list[Example]:
    """Examples of one split of `data.path` (a file is that split), numbered by a run's `labels`.

    Raises:
        DataError: as `read_corpus`, and for labels that the run does not know.
    """
    path = Path(data.path or "").expanduser()
    if path.is_file() or path.suffix.lower() in SUFFIXES:
        found = {split: (str(path), read_table(path))}
    elif path.is_dir():
        found = {name: (str(file), read_table(file)) for name, file in _files_of(path).items() if name == split}
    else:
        found = _from_hub(str(data.path), data.label)
    if split not in found:
        raise DataError(f"{data.path}: no {split} split; expected a file such as {SPLITS[split][0]}.jsonl")
    where, rows = _kept(found[split][1], found[split][0], data)
    names = [name for _, name in _labels(rows, where, data)]
    strange = sorted(set(names) - set(labels))
    if strange:
        raise DataError(
            f"{where}: label {strange[0]!r} stands {names.count(strange[0])} times, but the run knows only "
            f"{', '.join(labels)}; drop it with data.drop_labels or map it with data.labels"
        )
    examples = _examples(rows, split, where, data)
    return [replace(example, label=labels.index(name)) for example, name in zip(examples, names)]


def _examples(rows: NumberedRows, split: str, where: str, data: DataConfig) -> list[Example]:
    """Examples whose labels (-1) are numbered once all splits are known."""
    examples = [
        Example(
            id=str(row[data.id]) if data.id in row else f"{split}:{number}",
            before=_text(row, data.before, where, number),
            after=None if data.after is None else _text(row, data.after, where, number),
            label=-1,
            group=str(row[data.group]) if data.group is not None else None,
        )
        for number, row in rows
    ]
    _check_ids(examples, where, data.id)
    return examples


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
    made = data.dev_fraction is not None or data.fold is not None
    for split in ("train",) if made else ("train", "dev"):
        if split not in found:
            names = ", ".join(f"{stem}{suffix}" for stem in SPLITS[split] for suffix in SUFFIXES[:1])
            more = ", or data.dev_fraction to make one of training examples" if split == "dev" else ""
            raise DataError(f"{data.path or data.train}: no {split} split; expected a file such as {names}, or set "
                            f"data.{split}{more}")  # fmt: skip
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
    for column in (data.before, data.after, data.label, data.group):
        if column is None or column in first:
            continue
        known = [str(name) for name in first]
        near = difflib.get_close_matches(column, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise DataError(f"{where}: no column {column!r}{hint} Columns: {', '.join(known[:20])}")
    for number, row in rows:
        lacking = [
            column for column in (data.before, data.after, data.label, data.group) if column and column not in row
        ]
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
