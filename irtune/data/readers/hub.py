"""A corpus of the hub, through `datasets`, which runs no code that comes with a corpus."""

from collections.abc import Iterator
from typing import Any

from irtune.data.readers.cells import Columns, Row, check_names
from irtune.errors import DataError, one_line
from irtune.redaction import redact


def hub_splits(name: str) -> dict[str, Any]:
    """The splits of a hub corpus by their own names.

    Raises:
        DataError: when there is none of that name, or it cannot be reached.
    """
    import datasets

    try:
        return dict(datasets.load_dataset(name))
    except Exception as error:  # the hub client raises many kinds: no such id, no network, no access
        raise DataError(
            f"{redact(name)!r} is neither a file, a folder nor a hub dataset that can be reached: {one_line(error)}"
        ) from error


def hub_rows(part: Any, label: str, where: str, columns: Columns) -> Iterator[tuple[int, Row]]:
    """Rows of a split, numbered from 1; a column of classes holds numbers, which become names.

    Raises:
        DataError: for a split without rows, or one that cannot be decoded.
    """
    check_names(part.column_names, where)
    wanted = set(columns(part.column_names))
    classes = getattr(part.features.get(label), "names", None)
    number = 0
    try:
        for number, row in enumerate(part.select_columns([name for name in part.column_names if name in wanted]), 1):
            value = row.get(label)
            # Hidden labels of a test split are -1, which must not become the last class.
            if classes is not None and isinstance(value, int) and 0 <= value < len(classes):
                row[label] = classes[value]
            yield number, row
    except Exception as error:  # decoding raises whatever its library raises
        raise DataError(f"{where}, row {number + 1}: cannot be decoded: {one_line(error)}") from error
    if number == 0:
        raise DataError(f"{where} has no rows")
