"""Rows of a file as dictionaries, whatever its format, one at a time. Errors name the file and the row.

A file is data and nothing else: no formula is computed, no object unpickled, no other file read on its behalf.
"""

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from irtune.data.readers.cells import Columns, Row, check_names, distinct
from irtune.data.readers.parquet_xlsx import arrow_rows, parquet_rows, xlsx_rows
from irtune.errors import DataError, one_line
from irtune.redaction import redact

NumberedRows = list[tuple[int, Row]]
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xlsx", ".arrow")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".7z")
MAX_LINE = 2**25  # bytes: two texts of a million characters, all of them written as \uXXXX
MAX_JSON = 2**29  # bytes of a .json file, which is read whole


def read_table(path: Path, columns: Columns | None = None) -> NumberedRows:
    """All rows of `path` in order, each with its number as an editor or a spreadsheet shows it.

    Raises:
        DataError: as `table_rows`.
    """
    return list(table_rows(path, columns))


def table_rows(path: Path, columns: Columns | None = None, *, part: bool = False) -> Iterator[tuple[int, Row]]:
    """Rows of `path` one by one, each with its number as an editor or a spreadsheet shows it.

    `part`: of several files of one table, which may be without rows.

    Empty cells of CSV, TSV and .xlsx files are empty strings, which is what an addition or a deletion looks like.

    Raises:
        DataError: for a missing or damaged file, one without rows, or a format that is not one of `SUFFIXES`.
    """
    _check_file(path)
    empty, kind = True, path.suffix[1:].lower()
    readers = {"jsonl": _jsonl, "json": _json, "csv": _csv, "tsv": _csv, "parquet": parquet_rows, "xlsx": xlsx_rows,
               "arrow": arrow_rows}  # fmt: skip
    try:
        for row in readers[kind](path, columns or (lambda names: names)):
            empty = False
            yield row
    except DataError:
        raise
    except UnicodeDecodeError as error:
        packed = kind in ("parquet", "xlsx", "arrow")
        raise DataError(f"{path}: a text in it is not UTF-8" if packed else _not_utf8(path)) from error
    except Exception as error:  # pyarrow and openpyxl raise many kinds for a damaged file
        raise DataError(f"{path} cannot be read as {kind}: {one_line(error)}") from error
    if empty and not part:
        raise DataError(f"{path} has no rows")


def _check_file(path: Path) -> None:
    suffix = path.suffix.lower()
    try:
        if path.is_dir():
            raise DataError(f"{path} is a folder, where a file is expected")
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is a pipe or a device, where a file is expected")
        if not path.is_file():
            raise DataError(f"there is no file {redact(str(path))!r}")
    except (OSError, ValueError) as error:  # a name that is too long, a folder that may not be entered
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{redact(str(path))[:200]!r} cannot be looked up: {reason}") from error
    if suffix not in SUFFIXES:
        hint = "unpack it; " if suffix in PACKED else ""
        raise DataError(f"{path}: format {path.suffix!r} is not known; {hint}accepted: {', '.join(SUFFIXES)}")


def _not_utf8(path: Path) -> str:
    """Where a file stops being UTF-8."""
    decoder, place = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as content:
        start = content.read(2)
        content.seek(0)
        while block := content.read(2**20):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                place += error.start - pending
                break
            place += len(block)
    looks = " (it begins like UTF-16)" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ""
    return f"{path}: byte {place} is not UTF-8; save the file as UTF-8{looks}"


def _jsonl(path: Path, columns: Columns) -> Iterator[tuple[int, Row]]:
    wanted = None
    with path.open("rb") as lines:
        number = 0
        while line := lines.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise DataError(f"{path}, line {number}: more than {MAX_LINE // 2**20} MiB in one line")
            row = _object(line.decode("utf-8-sig" if number == 1 else "utf-8"), path, number)
            if row is not None:
                wanted = wanted if wanted is not None else columns(list(row))
                yield number, {name: row[name] for name in wanted if name in row}


def parse_json_lines(text: str, path: str) -> NumberedRows:
    """Rows of JSON lines from `path`, which is named in errors.

    Raises:
        DataError: for a line that is not a JSON object.
    """
    rows = ((number, _object(line, path, number)) for number, line in enumerate(text.split("\n"), 1))
    return [(number, row) for number, row in rows if row is not None]


def _object(line: str, path: object, number: int) -> Row | None:
    """The object of one JSON line; None for an empty one."""
    if not line.strip():
        return None
    row = _parse(line, path, number)
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: expected an object with columns, not {line[:60].rstrip()!r}")
    return row


def _json(path: Path, columns: Columns) -> Iterator[tuple[int, Row]]:
    size = path.stat().st_size
    if size > MAX_JSON:
        raise DataError(f"{path} has {size // 2**20} MiB; accepted for .json: at most {MAX_JSON // 2**20}; save it as "
                        ".jsonl, which is read line by line")  # fmt: skip
    rows = _parse(path.read_text(encoding="utf-8-sig"), path, None)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a list of objects with columns")
    wanted = columns(list(rows[0])) if rows else ()
    for number, row in enumerate(rows, 1):
        yield number, {name: row[name] for name in wanted if name in row}


def _parse(text: str, path: object, number: int | None) -> Any:
    """A JSON value; `number` is its line where it has only one."""
    where = f"{path}" if number is None else f"{path}, line {number}"

    def unique(pairs: list[tuple[str, Any]]) -> Row:
        row = dict(pairs)
        if len(row) != len(pairs):
            check_names([name for name, _ in pairs], where)
        return row

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number or error.lineno}: not valid JSON ({error.msg})") from error
    except RecursionError as error:
        raise DataError(f"{where}: not valid JSON (nested too deeply)") from error
    except ValueError as error:  # Python reads no whole numbers of more than 4,300 digits
        raise DataError(f"{where}: not valid JSON (a number with thousands of digits)") from error


def _csv(path: Path, columns: Columns) -> Iterator[tuple[int, Row]]:
    tabs = path.suffix.lower() == ".tsv"
    before = csv.field_size_limit(MAX_LINE)
    header: list[str] = []
    wanted: set[str] = set()
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            records = csv.reader(_lines(file, path), delimiter="\t" if tabs else ",", strict=True)
            for number, cells in enumerate(records, 1):
                if not cells:  # an empty line
                    continue
                if not header:
                    check_names(cells, path)
                    header = distinct(cells)
                    wanted = set(columns(header))
                    continue
                if len(cells) != len(header):
                    raise DataError(f"{path}, row {number}: does not have {len(header)} cells like the header")
                if tabs and any("\n" in cell or "\r" in cell for cell in cells):
                    raise DataError(
                        f"{path}, row {number}: a cell runs past the end of its line; close or double the quote it "
                        "starts with, or save the corpus as .jsonl"
                    )
                yield number, {name: cell for name, cell in zip(header, cells) if name in wanted}
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as {path.suffix[1:].lower()}, row {number + 1}: {error}") from error
    finally:
        csv.field_size_limit(before)


def _lines(file: Any, path: Path) -> Iterator[str]:
    """Lines as csv wants them, none of them without end."""
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise DataError(f"{path}: a line of more than {MAX_LINE:,} characters")
        yield line
