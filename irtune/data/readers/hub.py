"""A corpus of the hub, through `datasets`, which runs no code that comes with a corpus."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from irtune.data.readers.cells import Columns, Row, check_names
from irtune.data.readers.parquet_xlsx import named_classes
from irtune.errors import DataError, one_line
from irtune.redaction import redact

# How `datasets` lists the configurations of a corpus, when one is missing or unknown.
CONFIGURATIONS = re.compile(r"(?:available configs|Available): \[(.*?)\]")


@contextmanager
def hub_from_cache() -> Iterator[None]:
    """Inside, a corpus of the hub comes from this machine's cache, and the network is left alone."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def hub_splits(name: str, config: str | None = None) -> dict[str, Any]:
    """The splits of a hub corpus by their own names; `config`: which of its configurations.

    Raises:
        DataError: when there is none of that name, it cannot be reached, or it has several configurations and none is
            named. Those are listed.
    """
    import datasets

    try:
        return dict(datasets.load_dataset(name) if config is None else datasets.load_dataset(name, config))
    except Exception as error:  # the hub client raises many kinds: no such id, no network, no access
        said = redact(" ".join(str(error).split()))
        known = CONFIGURATIONS.search(said)
        if known is not None:
            problem = "has several configurations" if config is None else f"has no configuration {config!r}"
            raise DataError(f"{name}: the corpus {problem}; set data.config to one of {known[1][:1000]}") from error
        raise DataError(
            f"{redact(name)!r} is neither a file, a folder nor a hub dataset that can be reached: {one_line(error)}"
        ) from error


def hub_rows(part: Any, where: str, columns: Columns) -> Iterator[tuple[int, Row]]:
    """Rows of a split, numbered from 1; columns of classes hold numbers, which become names.

    Raises:
        DataError: for a split without rows, or one that cannot be decoded.
    """
    check_names(part.column_names, where)
    wanted = set(columns(part.column_names))
    kinds = {name: getattr(kind, "feature", kind) for name, kind in part.features.items()}  # of lists, of their items
    classes = {name: kind.names for name, kind in kinds.items() if getattr(kind, "names", None)}
    number = 0
    try:
        for number, row in enumerate(part.select_columns([name for name in part.column_names if name in wanted]), 1):
            yield number, named_classes(row, classes)
    except Exception as error:  # decoding raises whatever its library raises
        raise DataError(f"{where}, row {number + 1}: cannot be decoded: {one_line(error)}") from error
    if number == 0:
        raise DataError(f"{where} has no rows")
