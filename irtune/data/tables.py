"""Rows of a file as dictionaries, whatever its format. Errors name the file and the row."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from irtune.errors import DataError

Row = dict[str, Any]
NumberedRows = list[tuple[int, Row]]
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xlsx")


def read_table(path: Path) -> NumberedRows:
    """Read all rows of `path` in order, each with its number as an editor or a spreadsheet shows it.

    Empty cells of CSV, TSV and .xlsx files are empty strings, which is what an addition or a deletion looks like.

    Raises:
        DataError: for a missing or damaged file, or a format that is not one of `SUFFIXES`.
    """
    if not path.is_file():
        raise DataError(f"there is no file {str(path)!r}")
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet, ".xlsx": _xlsx}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: format {path.suffix!r} is not known; accepted: {', '.join(SUFFIXES)}")
    try:
        rows = reader(path)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except Exception as error:  # pandas, pyarrow and openpyxl raise many kinds for a damaged file
        kind = path.suffix[1:].lower()
        raise DataError(f"{path} cannot be read as {kind}: {' '.join(str(error).split())[:200]}") from error
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def _jsonl(path: Path) -> NumberedRows:
    return parse_json_lines(path.read_text(encoding="utf-8-sig"), str(path))


def parse_json_lines(text: str, path: str) -> NumberedRows:
    """Rows of JSON lines from `path`, which is named in errors.

    Raises:
        DataError: for a line that is no JSON object.
    """
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not valid JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object with columns, not {line[:60]!r}")
        rows.append((number, row))
    return rows


def _json(path: Path) -> NumberedRows:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a list of objects with columns")
    return list(enumerate(rows, 1))


def _csv(path: Path) -> NumberedRows:
    text = path.read_text(encoding="utf-8-sig")
    csv.field_size_limit(len(text) + 1)
    tabs = path.suffix.lower() == ".tsv"
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",", strict=True)
    rows = []
    for number, row in enumerate(reader, 2):
        if None in row or None in row.values():
            columns = len(reader.fieldnames or [])
            raise DataError(f"{path}, row {number}: has not {columns} cells like the header")
        if tabs and any("\n" in cell for cell in row.values()):
            raise DataError(
                f"{path}, row {number}: a cell goes on over the end of its line; close or double the quote it starts "
                "with, or save the corpus as .jsonl"
            )
        rows.append((number, row))
    return rows


def _parquet(path: Path) -> NumberedRows:
    import pyarrow.parquet

    return list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1))


def _xlsx(path: Path) -> NumberedRows:
    import openpyxl

    book = openpyxl.load_workbook(path, read_only=True)
    try:
        lines = book.worksheets[0].iter_rows()
        header = [str(cell.value) if cell.value is not None else "" for cell in next(lines, ())]
        rows = []
        for number, line in enumerate(lines, 2):
            for name, cell in zip(header, line):
                if cell.data_type == "f":  # nothing is computed here, and a stored result may be missing or old
                    where = f"{path}, row {number}, column {name!r}"
                    raise DataError(f"{where}: a formula ({cell.value}); save values only")
            row = dict(zip(header, ("" if cell.value is None else cell.value for cell in line)))
            if any(value != "" for value in row.values()):
                rows.append((number, row))
    finally:
        book.close()
    return rows
