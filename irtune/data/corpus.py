"""A corpus: splits of examples and the list of labels, from a file, a folder or a hub id."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from irtune.config.schema import DataConfig
from irtune.data.readers.cells import check_looks
from irtune.data.readers.hub import hub_rows, hub_splits
from irtune.data.readers.records import Record, RecordReader
from irtune.data.readers.tables import SUFFIXES, table_rows
from irtune.errors import DataError
from irtune.redaction import redact

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


Tables = dict[str, tuple[str, list[Record]]]  # by split: the place rows come from, for messages, and the rows


def read_corpus(data: DataConfig) -> Corpus:
    """Read all splits of the corpus that `data` describes.

    Raises:
        DataError: for missing files, columns, splits or rows, labels that are unknown or stand only outside the
            training split, and cells that are not text. Names the file, row, column and value.
    """
    tables = _find_splits(data)
    if data.fold is not None or "dev" not in tables:
        tables |= _held_out(tables, data)
    labels = _label_names(tables, data)
    index = {label: position for position, label in enumerate(labels)}
    splits = {split: _examples(records, split, where, data, index) for split, (where, records) in tables.items()}
    return Corpus(splits, labels)


def read_split(data: DataConfig, split: str, labels: list[str]) -> list[Example]:
    """Examples of one split of `data.path` (a file is that split), numbered by a run's `labels`.

    Raises:
        DataError: as `read_corpus`, and for labels that the run does not know.
    """
    path = Path(data.path or "").expanduser()
    if _names_file(path):
        found = {split: _read_file(path, data)}
    elif path.is_dir():
        found = {name: _read_file(file, data) for name, file in _files_of(path).items() if name == split}
    else:
        found = _from_hub(str(data.path), data)
    if split not in found:
        raise DataError(f"{data.path}: no {split} split; expected a file such as {SPLITS[split][0]}.jsonl")
    where, records = found[split]
    names = [record.label for record in records]
    strange = sorted(set(names) - set(labels))
    if strange:
        raise DataError(
            f"{where}: label {strange[0]!r} stands {names.count(strange[0])} times, but the run knows only "
            f"{', '.join(labels)}; drop it with data.drop_labels or map it with data.labels"
        )
    return _examples(records, split, where, data, {label: number for number, label in enumerate(labels)})


def _examples(records: list[Record], split: str, where: str, data: DataConfig, index: dict[str, int]) -> list[Example]:
    """Examples with the numbers of their labels; ids are made of the row where there are none."""
    examples, seen = [], set()
    for record in records:
        name = f"{split}:{record.number}" if record.id is None else record.id
        if name in seen:
            raise DataError(f"{where}: id {name!r} in column {data.id!r} stands twice; set data.id to another column")
        seen.add(name)
        examples.append(Example(name, record.before, record.after, index[record.label], record.group))
    return examples


def _held_out(tables: Tables, data: DataConfig) -> Tables:
    """Train and dev split by `data.fold` or `data.dev_fraction`: no document stands in both."""
    joined = [(split, record) for split in ("train", "dev") for record in tables.get(split, ("", []))[1]]
    where = tables["train"][0]
    if data.fold is not None:
        held_out, folds = (int(part) for part in data.fold.split("/"))
    else:
        held_out, folds = 1, max(2, round(1 / (data.dev_fraction or 0.1)))
    groups = [f"{split}:{record.number}" if record.group is None else record.group for split, record in joined]
    if folds > len(set(groups)):
        what = "documents" if data.group else "examples"
        raise DataError(f"{where}: {folds} folds need at least as many {what}, not {len(set(groups))}")
    place = fold_of([record.raw for _, record in joined], groups, folds, data.split_seed)
    # Numbers go on after those of the training file, so that ids made of them stay different.
    last = max(record.number for _, record in joined)
    records = [record if split == "train" else replace(record, number=last + record.number) for split, record in joined]
    dev = [record for record, fold in zip(records, place) if fold == held_out - 1]
    if not dev:
        raise DataError(f"{where}: too few examples of each label for {folds} folds; use fewer, or a larger corpus")
    return {"train": (where, [r for r, fold in zip(records, place) if fold != held_out - 1]), "dev": (where, dev)}


def _find_splits(data: DataConfig) -> Tables:
    """Rows of each split with the place they come from, for messages."""
    found: Tables = {}
    for split in SPLITS:
        named = getattr(data, split)
        if named is not None:
            found[split] = _read_file(Path(named).expanduser(), data)
    if data.path is not None:
        path = Path(data.path).expanduser()
        if _names_file(path):
            found = {"train": _read_file(path, data)} | found
        elif path.is_dir():
            for split, file in _files_of(path).items():
                if split not in found:
                    found[split] = _read_file(file, data)
        elif data.path.count("/") <= 1 and not data.path.startswith((".", "/", "~")):
            found = _from_hub(data.path, data) | found
        else:
            raise DataError(f"there is no file or folder {redact(data.path)!r}")
    made = data.dev_fraction is not None or data.fold is not None
    for split in ("train",) if made else ("train", "dev"):
        if split not in found:
            names = ", ".join(f"{stem}{suffix}" for stem in SPLITS[split] for suffix in SUFFIXES[:1])
            more = ", or data.dev_fraction to make one of training examples" if split == "dev" else ""
            raise DataError(f"{data.path or data.train}: no {split} split; expected a file such as {names}, or set "
                            f"data.{split}{more}")  # fmt: skip
    return found


def _names_file(path: Path) -> bool:
    """Whether a corpus is one file: also one that is missing, which is then said."""
    try:
        return path.is_file() or (path.suffix.lower() in SUFFIXES and not path.is_dir())
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise DataError(f"{redact(str(path))[:200]!r} cannot be looked up: {error.strerror}") from error


def _read_file(path: Path, data: DataConfig) -> tuple[str, list[Record]]:
    reader = RecordReader(str(path), data)
    return reader.where, reader.records(table_rows(path, reader.columns))


def _files_of(folder: Path) -> dict[str, Path]:
    """The file of each split. A link must not lead out of the folder: whoever made it would choose what is read."""
    files = {}
    for split, stems in SPLITS.items():
        named = [folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
        matches = [path for path in named if path.is_file()]
        if len(matches) > 1:
            raise DataError(f"{folder}: more than one {split} file: {', '.join(match.name for match in matches)}")
        wrong = [path for path in named if path.exists() and not path.is_file()]
        if wrong and not matches:
            raise DataError(f"{wrong[0]} is a folder, where a file is expected")
        for match in matches:
            if not match.resolve().is_relative_to(folder.resolve()):
                raise DataError(
                    f"{match} is a link that leads out of its folder, to {match.resolve()}; if that file is meant, "
                    f"name it with data.{split}"
                )
            files[split] = match
    return files


def _from_hub(name: str, data: DataConfig) -> Tables:
    loaded = hub_splits(name)
    found: Tables = {}
    for split, stems in SPLITS.items():
        stem = next((stem for stem in stems if stem in loaded), None)
        if stem is not None:
            reader = RecordReader(f"{name} ({stem})", data)
            rows = hub_rows(loaded[stem], data.label, reader.where, reader.columns)
            found[split] = (reader.where, reader.records(rows))
    return found


def _label_names(tables: Tables, data: DataConfig) -> list[str]:
    """Labels in order of their numbers."""
    places = {split: where for split, (where, _) in tables.items()}
    raw = {split: [record.label for record in records] for split, (_, records) in tables.items()}
    train = set(raw["train"])
    if data.labels is None and len(train) < 2:
        raise DataError(f"{places['train']}: only one label ({raw['train'][0]!r}); at least 2 are needed")
    if data.labels is None:
        check_looks(sorted(train), places["train"])
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


def corpus_digest(corpus: Corpus) -> str:
    """SHA-256 of labels and examples, in their order: the same wherever the corpus lies and whatever its format."""
    found = hashlib.sha256(json.dumps(corpus.labels).encode())
    for split, examples in corpus.splits.items():
        found.update(f"\0{split} {len(examples)}\0".encode())
        for one in examples:
            found.update(repr((one.id, one.before, one.after, one.label, one.group)).encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def fold_of(labels: Sequence[str], groups: Sequence[str], folds: int, seed: int) -> list[int]:
    """The fold, 0 to `folds` - 1, of each example.

    Examples of one group (a document) are in one fold. A label whose examples are all in one fold stays out of every
    fold (-1: always in training): it could not be learnt when that fold is held out.
    """
    # Imported here: it takes more than a second, and most runs have a dev split.
    from sklearn.model_selection import StratifiedGroupKFold

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a label rarer than folds cannot be in each of them: expected here
        splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed % 2**32)
        result = np.zeros(len(labels), dtype=int)
        for number, (_, held_out) in enumerate(splitter.split(np.zeros(len(labels)), labels, groups)):
            result[held_out] = number
    for label in set(labels):
        places = [i for i, name in enumerate(labels) if name == label]
        if len({int(result[i]) for i in places}) == 1:
            kept = {groups[i] for i in places}
            result[[i for i, group in enumerate(groups) if group in kept]] = -1
    return [int(number) for number in result]
