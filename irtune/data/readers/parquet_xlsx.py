"""Rows of .parquet and .xlsx files. Both are packed: what they unpack to is looked at before it is unpacked."""

import zipfile
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from defusedxml import DefusedXmlException

from irtune.data.readers.cells import MAX_CHARACTERS, Columns, Row, check_names
from irtune.errors import DataError

SHEET_ROWS = 1_048_576  # what a spreadsheet can have
BATCH = 256  # rows of a .parquet file that are Python objects at a time
FREE = 2**26  # bytes to which any file may unpack
RATIO = 100  # to which larger ones may, times their size; text packs to a tenth, sheets to a thirtieth
MOST = 2**30  # to which an .xlsx file may: openpyxl holds all texts of a book at once


def parquet_rows(path: Path, columns: Columns) -> Iterator[tuple[int, Row]]:
    """Rows of a .parquet file, numbered from 1. Only `columns` are read.

    Raises:
        DataError: for texts of more than a million characters, also where a few bytes stand for many of them.
    """
    import pyarrow.parquet

    names = pyarrow.parquet.read_schema(path).names
    check_names(names, path)
    wanted = set(columns(names)) & set(names)
    # Texts stay numbers into a dictionary until its longest entry is known.
    file = pyarrow.parquet.ParquetFile(path, read_dictionary=sorted(wanted))
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    chunks = [group.column(j) for group in groups for j in range(group.num_columns)]
    unpacked = [chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".list.")[0] in wanted]
    _check_size(path, sum(unpacked), None)
    number = 0
    for batch in file.iter_batches(batch_size=BATCH, columns=[name for name in names if name in wanted]):
        places = [f"{path}, column {name!r}" for name in batch.schema.names]
        longest = max((_longest(array, place) for array, place in zip(batch.columns, places)), default=0)
        step = max(1, min(BATCH, FREE // (longest + 1)))
        for start in range(0, batch.num_rows, step):
            for row in batch.slice(start, step).to_pylist():
                number += 1
                yield number, row


def _longest(array: Any, where: str) -> int:
    """Bytes of the longest text of a column; 0 for other columns."""
    import pyarrow.compute

    values = array.dictionary if isinstance(array, pyarrow.DictionaryArray) else array
    if not (pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type)):
        return 0
    longest = pyarrow.compute.max(pyarrow.compute.binary_length(values)).as_py() or 0
    if longest > 4 * MAX_CHARACTERS:
        raise DataError(f"{where}: a text of {longest:,} bytes; accepted: at most {MAX_CHARACTERS:,} characters")
    return longest


def xlsx_rows(path: Path, columns: Columns) -> Iterator[tuple[int, Row]]:
    """Rows of the first sheet below its header, with the sheet's own numbers; rows without any content are skipped.

    Raises:
        DataError: for formulas and error values, bombs, and sheets larger than a spreadsheet program can make.
    """
    _check_book(path)
    try:
        yield from _sheet_rows(path, columns)
    except ValueError as error:
        if isinstance(error.__cause__ or error, DefusedXmlException):  # entities: a few bytes become many
            raise DataError(f"{path}: its XML has a DOCTYPE, which no spreadsheet program writes") from error
        raise


def _sheet_rows(path: Path, columns: Columns) -> Iterator[tuple[int, Row]]:
    import openpyxl  # takes defusedxml, which is installed, for all XML

    book = openpyxl.load_workbook(path, read_only=True, keep_links=False)
    try:
        sheet = book.worksheets[0]
        sheet.reset_dimensions()  # a size that the file claims for itself would be filled up with empty cells
        lines = sheet.iter_rows()
        header = [str(cell.value) if cell.value is not None else "" for cell in next(lines, ())]
        check_names(header, path)
        wanted = set(columns(header)) if header else set()
        for number, line in enumerate(lines, 2):
            if number > SHEET_ROWS:
                raise DataError(f"{path}: more than {SHEET_ROWS:,} rows, which no sheet has")
            row = {}
            if not line:  # not in the file
                continue
            for name, cell in zip_longest(header, line[: len(header)]):
                value = None if cell is None else cell.value
                if value is not None and cell.data_type in ("f", "e"):
                    _refuse(f"{path}, row {number}, column {name!r}", cell)
                row[name] = "" if value is None else value
            if any(value != "" for value in row.values()):
                yield number, {name: value for name, value in row.items() if name in wanted}
    finally:
        book.close()


def _refuse(where: str, cell: Any) -> None:
    if cell.data_type == "f":  # nothing is computed here, and a stored result may be missing or old
        raise DataError(f"{where}: a formula ({str(cell.value)[:80]}); save values only")
    raise DataError(f"{where}: the error value {cell.value} of a formula; correct it, or clear the cell")


def _check_book(path: Path) -> None:
    """Refuse an archive that is a bomb."""
    with zipfile.ZipFile(path) as archive:
        _check_size(path, sum(member.file_size for member in archive.infolist()), MOST)


def _check_size(path: Path, unpacked: int, most: int | None) -> None:
    limit = max(FREE, RATIO * path.stat().st_size)
    limit = limit if most is None else min(limit, most)
    if unpacked > limit:
        raise DataError(f"{path} would unpack to {unpacked / 2**20:,.0f} MiB; accepted for a file of "
                        f"{path.stat().st_size / 2**20:,.1f} MiB: at most {limit / 2**20:,.0f}")  # fmt: skip
