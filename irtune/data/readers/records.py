"""From the rows of a file to checked records: the columns that a configuration names, and nothing else of a row."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from irtune.config.labels import canonical
from irtune.config.schema import DataConfig
from irtune.data.readers.cells import MAX_LABELS, Hidden, Row, as_label, as_name, as_text, as_weight, listed
from irtune.errors import DataError
from irtune.tasks import task_of


@dataclass(frozen=True, slots=True)
class Record:
    """A row that was read: its number in its file, and its label as it is there and as `data.labels` calls it.

    raw, label: a text each; of other tasks, what `Task.read` returns.
    """

    number: int
    id: str | None
    before: str
    after: str | None
    raw: Any
    label: Any
    group: str | None
    weight: float = 1.0
    context: str | None = None


class UnlabelledError(DataError):
    """No row of a split has a label, or one that is kept."""


class RecordReader:
    """Reads the records of one split. hidden: numbers of rows without a label that it met."""

    def __init__(self, where: str, data: DataConfig):
        self.where, self.data, self.task = where, data, task_of(data)
        columns = (data.before, data.after, data.label, data.group, data.weight, data.context)
        self.needed = [name for name in columns if name is not None]
        self.hidden: list[int] = []
        self._labels: dict[str, str] = {}  # raw labels that were checked, and their names
        self._known = known_labels(data)

    def columns(self, names: Sequence[str]) -> set[str]:
        """Those of the columns `names` that are needed.

        Raises:
            DataError: for a needed one that is missing; names the nearest.
        """
        for column in self.needed:
            if column in names:
                continue
            near = difflib.get_close_matches(column, [str(name)[:100] for name in names], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise DataError(f"{self.where}: no column {column!r}{hint} Columns: {listed(names)}")
        return {*self.needed, self.data.id}

    def records(self, rows: Iterable[tuple[int, Row]]) -> list[Record]:
        """The records of `rows`, without those whose raw label is dropped.

        Raises:
            DataError: naming the row and the column; when no row is left, or some have no label.
        """
        return self.checked(self.read(rows))

    def checked(self, records: list[Record]) -> list[Record]:
        """`records`, of which there must be some, if no row was without a label."""
        if self.hidden:
            hidden, column = self.hidden, f"column {self.data.label!r}"
            if not records:
                raise UnlabelledError(f"{self.where}: no row has a label: {column} is -1, the hub's mark for that")
            raise DataError(
                f"{self.where}, row {hidden[0]}, {column}: -1 is the hub's mark for a row without a label "
                f"({len(hidden):,} such rows); leave them out with data.drop_labels [-1]"
            )
        if not records:
            dropped = self.data.drop_labels
            if dropped:
                raise UnlabelledError(f"{self.where}: no rows are left without the labels {dropped}")
            raise DataError(f"{self.where} has no rows")
        return records

    def read(self, rows: Iterable[tuple[int, Row]]) -> list[Record]:
        """As `records`, of a part of a split, of which nothing need be left."""
        dropped = {canonical(name) for name in self.data.drop_labels}
        records = []
        for number, row in rows:
            for column in self.needed:
                if column not in row:
                    raise DataError(f"{self.where}, row {number}: no column {column!r}, which other rows have")
            place = f"{self.where}, row {number}, column {self.data.label!r}"
            raw = self.task.values(row[self.data.label], place) if dropped else []
            if any(str(canonical(value)) in dropped for value in raw):
                continue
            if isinstance(row[self.data.label], Hidden):
                self.hidden.append(number)
            else:
                records.append(self._record(number, row))
        return records

    def _record(self, number: int, row: Row) -> Record:
        data = self.data

        def place(column: str) -> str:
            return f"{self.where}, row {number}, column {column!r}"

        raw, label = self.task.read(row[data.label], place(data.label), self._label)
        return Record(
            number=number,
            id=as_name(row[data.id], place(data.id), "id", "data.id") if data.id in row else None,
            before=as_text(row[data.before], place(data.before)),
            after=None if data.after is None else as_text(row[data.after], place(data.after)),
            raw=raw,
            label=label,
            group=None if data.group is None else as_name(row[data.group], place(data.group), "document", "data.group"),
            weight=1.0 if data.weight is None else as_weight(row[data.weight], place(data.weight)),
            context=None if data.context is None else as_text(row[data.context], place(data.context)),
        )

    def _label(self, value: object, place: str) -> tuple[str, str]:
        """A label as it is in the file and as `data.labels` calls it."""
        if type(value) is str and value in self._labels:
            return value, self._labels[value]
        raw = as_label(value, place)
        known = self._known
        if known is not None and raw not in known:
            raise DataError(f"{place}: unknown label {raw!r}; known: {listed(known)}")
        if known is None and raw not in self._labels and len(self._labels) >= MAX_LABELS:
            count = f"{MAX_LABELS + 1:,}th different label; accepted: at most {MAX_LABELS:,}"
            raise DataError(f"{place}: {raw!r} is the {count} (is this the column of labels?)")
        self._labels[raw] = raw if known is None else known[raw]
        return raw, self._labels[raw]


def known_labels(data: DataConfig) -> dict[str, str] | None:
    """From a label as `as_label` gives it to its name in `data.labels`; None where any label is accepted.

    Raises:
        DataError: for two entries that are one label and would get different names.
    """
    if data.labels is None:
        return None
    pairs = data.labels.items() if isinstance(data.labels, dict) else ((name, name) for name in data.labels)
    known: dict[str, str] = {}
    for raw, name in pairs:
        if known.setdefault(canonical(raw), name) != name:
            raise DataError(f"data.labels: {raw!r} is the label {canonical(raw)!r}, which has another entry; leave one")
    return known
