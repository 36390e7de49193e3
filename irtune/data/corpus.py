"""A corpus: splits of examples and the list of labels, from a file, a folder or a hub id."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from irtune.config.labels import canonical
from irtune.config.schema import DataConfig
from irtune.data.held_out import draw_share, fold_of, nested_subset
from irtune.data.readers.cells import by_number, check_looks
from irtune.data.readers.hub import hub_rows, hub_splits
from irtune.data.readers.layouts import SPLITS, find_files
from irtune.data.readers.records import Record, RecordReader, UnlabelledError
from irtune.data.readers.tables import SUFFIXES, table_rows
from irtune.errors import DataError, brief
from irtune.redaction import redact
from irtune.tasks import SINGLE_LABEL, Task, task_of
from irtune.tasks.base import Label

log = logging.getLogger("irtune")


@dataclass(frozen=True)
class Example:
    """One revision: a text before, a text after (None for single texts), its label, its document.

    label: its number; of other tasks, a tuple of numbers or a value, see `irtune.tasks`.
    weight: how much it counts in the training loss. pseudo: its label is a prediction (data.pseudo). context: the text
    around it (data.context); None without such a column.
    """

    id: str
    before: str
    after: str | None
    label: Label
    group: str | None = None
    weight: float = 1.0
    pseudo: bool = False
    context: str | None = None


@dataclass(frozen=True)
class Corpus:
    """Splits by name (train and dev always, test where there is one) and label names in order of their numbers.

    Where the task is regression, the one name is that of the column.
    """

    splits: dict[str, list[Example]]
    labels: list[str]
    task: Task = SINGLE_LABEL


Tables = dict[str, tuple[str, list[Record]]]  # by split: the place rows come from, for messages, and the rows


def read_corpus(data: DataConfig) -> Corpus:
    """Read all splits of the corpus that `data` describes.

    Raises:
        DataError: for missing files, columns, splits or rows, labels that are unknown or appear only outside the
            training split, and cells that are not text. Names the file, row, column and value.
    """
    tables = find_splits(data)
    if data.fold is not None or "dev" not in tables:
        tables |= _held_out(tables, data)
    labels = _label_names(tables, data)
    index = {label: position for position, label in enumerate(labels)}
    if data.train_fraction < 1:
        where, records = tables["train"]
        strata = task_of(data).strata([record.label for record in records])
        kept = nested_subset(strata, data.train_fraction, data.subset_seed)
        tables["train"] = (where, [record for record, keep in zip(records, kept) if keep])
    splits = {split: _examples(records, split, where, data, index) for split, (where, records) in tables.items()}
    if not any(example.weight for example in splits["train"]):
        place = f"{tables['train'][0]}: every weight in column {data.weight!r}"
        raise DataError(f"{place} (data.weight) is 0: nothing would be learnt")
    for split, examples in splits.items():
        if split != "train":
            warn_of_missing_labels(examples, split, labels, task_of(data))
    if data.pseudo is not None:
        splits["train"] = splits["train"] + _pseudo_examples(data, splits, index)
    return Corpus(splits, labels, task_of(data))


def _pseudo_examples(data: DataConfig, splits: dict[str, list[Example]], index: dict[str, int]) -> list[Example]:
    """The rows of data.pseudo, which carry labels by their names in this corpus."""
    plain = replace(data, labels=list(index), drop_labels=[], group=None, weight=None)
    where, records = _read_files([Path(str(data.pseudo)).expanduser()], plain)
    examples = [
        Example(
            f"pseudo:{record.number}",
            record.before,
            record.after,
            index[record.label],
            pseudo=True,
            context=record.context,
        )
        for record in records
    ]
    check_apart(examples, splits, f"data.pseudo {where}")
    return examples


def check_apart(examples: Sequence[Example], splits: dict[str, list[Example]], where: str) -> None:
    """Look whether `examples`, whose ids tell their rows in `where`, share no text with dev or test.

    Raises:
        DataError: naming the first that does.
    """
    for split in ("dev", "test"):
        held_out = {(example.before, example.after): example.id for example in splits.get(split, [])}
        for example in examples:
            if (example.before, example.after) in held_out:
                there = held_out[example.before, example.after]
                raise DataError(
                    f"{where}, row {example.id.rpartition(':')[2]}: the same text is in the {split} split ({there}), "
                    "which nothing may train on; remove the row"
                )


def warn_of_missing_labels(
    examples: Sequence[Example], split: str, labels: Sequence[str], task: Task = SINGLE_LABEL
) -> None:
    """Say which labels a split has no example of: macro averages over all labels count them as 0."""
    there = {number for example in examples for number in task.numbers(example.label)}
    missing = [repr(label) for number, label in enumerate(labels) if number not in there]
    if missing:
        log.warning(
            "the %s split has no example of %s: macro_f1 counts %s as 0, macro_f1_present leaves %s out",
            split, ", ".join(missing), *(["it"] * 2 if len(missing) == 1 else ["them"] * 2),
        )  # fmt: skip


def read_split(data: DataConfig, split: str, labels: list[str]) -> list[Example]:
    """Examples of one split of `data.path` (a file is that split), numbered by a run's `labels`.

    Raises:
        DataError: as `read_corpus`, and for labels that the run does not know.
    """
    path = Path(data.path or "").expanduser()
    data = replace(data, weight=None)  # only training needs it
    if _names_file(path):
        found = {split: _read_files([path], data)}
    elif path.is_dir():
        files = find_files(path, data.config)
        found = {name: _read_files(files[name], data) for name in files if name == split}
    else:
        found = _from_hub(str(data.path), data)
    if split not in found:
        raise DataError(f"{data.path}: no {split} split; expected a file such as {SPLITS[split][0]}.jsonl")
    where, records = found[split]
    index = {canonical(label): number for number, label in enumerate(labels)}
    index |= {label: number for number, label in enumerate(labels)}
    names = [name for record in records for name in task_of(data).names(record.label)]
    strange = sorted(set(names) - set(index))
    if strange:
        raise DataError(
            f"{where}: label {strange[0]!r} occurs {names.count(strange[0])} time(s), but the run knows only "
            f"{', '.join(labels)}; drop it with data.drop_labels or map it with data.labels"
        )
    examples = _examples(records, split, where, data, index)
    warn_of_missing_labels(examples, split, labels, task_of(data))
    return examples


def _examples(records: list[Record], split: str, where: str, data: DataConfig, index: dict[str, int]) -> list[Example]:
    """Examples with the numbers of their labels; ids are made of the row where there are none."""
    examples, seen, task = [], set(), task_of(data)
    for record in records:
        name = f"{split}:{record.number}" if record.id is None else record.id
        if name in seen:
            raise DataError(f"{where}: id {name!r} in column {data.id!r} appears twice; set data.id to another column")
        seen.add(name)
        label = task.numbered(record.label, index)
        examples.append(
            Example(
                name,
                record.before,
                record.after,
                label,
                record.group,
                record.weight,
                context=record.context,
            )
        )
    return examples


def _held_out(tables: Tables, data: DataConfig) -> Tables:
    """Train and dev split by `data.fold` or `data.dev_fraction`: no document is in both."""
    where = tables["train"][0]
    if data.fold is None:
        records = tables["train"][1]
        groups = [f"train:{record.number}" if record.group is None else record.group for record in records]
        share = data.dev_fraction or 0.1
        strata = task_of(data).strata([record.label for record in records])
        out, remark = draw_share(strata, groups, share, data.split_seed)
        if remark is not None:
            log.warning("%s: %s", where, remark)
        if not any(out):
            what = "no whole document can leave" if data.group else "each label has only one example in"
            raise DataError(f"{where}: data.dev_fraction {share:g} makes no dev split: {what} the training split")
        rows = list(zip(records, out))
        return {"train": (where, [r for r, held in rows if not held]), "dev": (where, [r for r, held in rows if held])}
    held_out, folds = (int(part) for part in data.fold.split("/"))
    records, place = fold_records(tables, data, folds)
    dev = [record for record, fold in zip(records, place) if fold == held_out - 1]
    if not dev:
        raise DataError(f"{where}: too few examples of each label for {folds} folds; use fewer, or a larger corpus")
    return {"train": (where, [r for r, fold in zip(records, place) if fold != held_out - 1]), "dev": (where, dev)}


def fold_records(tables: Tables, data: DataConfig, folds: int) -> tuple[list[Record], list[int]]:
    """Records of the train and then the dev split, numbered through, and the fold of each, as `fold_of` draws it.

    Raises:
        DataError: for more folds than documents or examples.
    """
    joined = [(split, record) for split in ("train", "dev") for record in tables.get(split, ("", []))[1]]
    groups = [f"{split}:{record.number}" if record.group is None else record.group for split, record in joined]
    if folds > len(set(groups)):
        what = "documents" if data.group else "examples"
        raise DataError(f"{tables['train'][0]}: {folds} folds need at least as many {what}, not {len(set(groups))}")
    place = fold_of(task_of(data).strata([record.raw for _, record in joined]), groups, folds, data.split_seed)
    # Numbers continue after those of the training file, so that ids made of them stay different.
    last = max(record.number for _, record in joined)
    return [r if split == "train" else replace(r, number=last + r.number) for split, r in joined], place


def find_splits(data: DataConfig) -> Tables:
    """Rows of each split with the place they come from, for messages, before a dev split is made of any.

    Raises:
        DataError: as `read_corpus`, for files and rows.
    """
    if data.path is None:
        _refuse_config(data, "data.path is not set")
    found: Tables = {}
    for split in SPLITS:
        named = getattr(data, split)
        if named is not None:
            found[split] = _read_files([Path(named).expanduser()], _for_split(data, split))
    if data.path is not None:
        path = Path(data.path).expanduser()
        if _names_file(path):
            _refuse_config(data, f"data.path {redact(data.path)!r} is a file")
            found = {"train": _read_files([path], data)} | found
        elif path.is_dir():
            for split, files in find_files(path, data.config).items():
                if split not in found:
                    with _without_hidden(split):
                        found[split] = _read_files(files, _for_split(data, split))
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


def _refuse_config(data: DataConfig, reason: str) -> None:
    if data.config is not None:
        raise DataError(
            f"data.config {brief(data.config)} names a part of a folder or hub corpus, but {reason}; leave data.config "
            "out"
        )


def _names_file(path: Path) -> bool:
    """Whether a corpus is one file: even one that is missing, which is reported later."""
    try:
        return path.is_file() or (path.suffix.lower() in SUFFIXES and not path.is_dir())
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise DataError(f"{redact(str(path))[:200]!r} cannot be looked up: {error.strerror}") from error


def _for_split(data: DataConfig, split: str) -> DataConfig:
    """`data` without the column of weights where no row of the split can come into training."""
    return data if split == "train" or (split == "dev" and data.fold is not None) else replace(data, weight=None)


def _read_files(paths: list[Path], data: DataConfig) -> tuple[str, list[Record]]:
    """The place and the records of a split. Of several files, the rows are numbered through."""
    if len(paths) == 1:
        reader = RecordReader(str(paths[0]), data)
        return reader.where, reader.records(table_rows(paths[0], reader.columns))
    whole, records, last = RecordReader(str(paths[0].parent), data), list[Record](), 0
    for path in paths:
        reader = RecordReader(str(path), data)
        number = 0
        for number, row in table_rows(path, reader.columns, part=True):
            records += [replace(record, number=last + number) for record in reader.read([(number, row)])]
        whole.hidden += [last + number for number in reader.hidden]
        last += number
    return whole.where, whole.checked(records)


@contextmanager
def _without_hidden(split: str) -> Iterator[None]:
    """Leave a test split out whose labels are hidden, as on the hub those of contests are; nobody asked for it."""
    try:
        yield
    except UnlabelledError as error:
        if split != "test":
            raise
        log.warning("%s; there is no test split", error)


def _from_hub(name: str, data: DataConfig) -> Tables:
    loaded = hub_splits(name, data.config)
    found: Tables = {}
    for split, stems in SPLITS.items():
        stem = next((stem for stem in stems if stem in loaded), None)
        if stem is not None:
            reader = RecordReader(f"{name} ({stem})", _for_split(data, split))
            rows = hub_rows(loaded[stem], reader.where, reader.columns)
            with _without_hidden(split):
                found[split] = (reader.where, reader.records(rows))
    return found


def _label_names(tables: Tables, data: DataConfig) -> list[str]:
    """Labels in order of their numbers."""
    task = task_of(data)
    if task.least_labels < 2:  # there are none
        return [data.label]
    places = {split: where for split, (where, _) in tables.items()}
    raw = {
        split: [name for record in records for name in task.names(record.label)]
        for split, (_, records) in tables.items()
    }
    train = set(raw["train"])
    if data.labels is None and len(train) < 2:
        found = f"only one label ({raw['train'][0]!r})" if train else "no label at all"
        raise DataError(f"{places['train']}: {found}; at least 2 are needed")
    if data.labels is None:
        check_looks(sorted(train), places["train"])
    for split, names in raw.items():
        strange = sorted(set(names) - train)
        if strange:
            raise DataError(
                f"{places[split]}: label {strange[0]!r} occurs {names.count(strange[0])} time(s) in {split} but never "
                "in the training split, so it cannot be learnt; add it to data.drop_labels or to the training split"
            )
    if isinstance(data.labels, dict):
        return list(dict.fromkeys(data.labels.values()))
    return list(data.labels) if data.labels is not None else by_number(train)


def corpus_digest(corpus: Corpus) -> str:
    """SHA-256 of labels and examples, in their order: the same wherever the corpus lies and whatever its format."""
    found = hashlib.sha256(json.dumps(corpus.labels).encode())
    for split, examples in corpus.splits.items():
        found.update(f"\0{split} {len(examples)}\0".encode())
        for one in examples:
            found.update(repr((one.id, one.before, one.after, one.label, one.group)).encode("utf-8", "surrogatepass"))
            if one.weight != 1:
                found.update(f"\0weight {one.weight!r}\0".encode())
            if one.pseudo:
                found.update(b"\0pseudo\0")
            if one.context is not None:
                found.update(f"\0context {one.context!r}\0".encode("utf-8", "surrogatepass"))
    return found.hexdigest()
