"""Rows of a file as dictionaries, whatever its format. Errors name the file and the row."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from irtune.errors import DataError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xlsx")


def read_table(path: Path) -> list[Row]:
    """Read all rows of `path` in order.

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


def _jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not valid JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object with columns, not {line[:60]!r}")
        rows.append(row)
    return rows


def _json(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a list of objects with columns")
    return rows


def _csv(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    csv.field_size_limit(len(text) + 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    rows = []
    for number, row in enumerate(reader, 2):
        if None in row or None in row.values():
            columns = len(reader.fieldnames or [])
            raise DataError(f"{path}, row {number}: has not {columns} cells like the header")
        rows.append(row)
    return rows


def _parquet(path: Path) -> list[Row]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def _xlsx(path: Path) -> list[Row]:
    import openpyxl

    book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    try:
        lines = book.worksheets[0].iter_rows(values_only=True)
        header = [str(cell) if cell is not None else "" for cell in next(lines, ())]
        rows = [dict(zip(header, ("" if cell is None else cell for cell in line))) for line in lines]
    finally:
        book.close()
    return [row for row in rows if any(cell != "" for cell in row.values())]
