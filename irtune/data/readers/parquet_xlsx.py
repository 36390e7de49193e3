"""Rows of .parquet, .arrow and .xlsx files. Packed ones: what they unpack to is looked at before it is unpacked."""

import json
import math
import struct
import zipfile
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from defusedxml import DefusedXmlException

from irtune.data.readers.cells import MAX_CHARACTERS, Columns, Hidden, Row, check_names, distinct
from irtune.errors import DataError, brief

SHEET_ROWS = 1_048_576  # what a spreadsheet can have
BATCH = 256  # rows of a .parquet file that are Python objects at a time
FREE = 2**26  # bytes to which any file may unpack
RATIO = 100  # to which larger ones may, times their size; text packs to a tenth, sheets to a thirtieth
MOST = 2**30  # to which an .xlsx file may: openpyxl holds all texts of a book at once


def parquet_rows(path: Path, columns: Columns) -> Iterator[tuple[int, Row]]:
    """Rows of a .parquet file, numbered from 1. Only `columns` are read.

    Raises:
        DataError: for texts of more than a million characters, even if a few bytes expand to them.
    """
    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(path)
    names = schema.names
    check_names(names, path)
    wanted = set(columns(names)) & set(names)
    # Texts stay numbers into a dictionary until its longest entry is known.
    texts = sorted(name for name in wanted if _is_text(schema.field(name).type))
    file = pyarrow.parquet.ParquetFile(path, read_dictionary=texts)
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    chunks = [group.column(j) for group in groups for j in range(group.num_columns)]
    nested = tuple(f"{name}." for name in wanted)
    read = [c for c in chunks if c.path_in_schema in wanted or c.path_in_schema.startswith(nested)]
    _check_size(path, sum(chunk.total_uncompressed_size for chunk in read))
    batches = file.iter_batches(batch_size=BATCH, columns=[name for name in names if name in wanted])
    yield from _batch_rows(path, batches, class_names(schema, path))


def arrow_rows(path: Path, columns: Columns) -> Iterator[tuple[int, Row]]:
    """Rows of an .arrow file, as `datasets` saves them, numbered from 1. Only `columns` become Python objects.

    Raises:
        DataError: as `parquet_rows`.
    """
    import pyarrow

    with pyarrow.memory_map(str(path)) as content:
        for message in pyarrow.ipc.MessageReader.open_stream(content):
            if message.type in HEADERS and _is_compressed(message.metadata.to_pybytes(), HEADERS[message.type]):
                raise DataError(f"{path} is compressed inside, which `datasets` never does; save it as .parquet")
        content.seek(0)
        batches = pyarrow.ipc.open_stream(content)
        names = batches.schema.names
        check_names(names, path)
        wanted = set(columns(names))
        kept = [name for name in names if name in wanted]
        pieces = (
            batch.slice(start, BATCH).select(kept) for batch in batches for start in range(0, batch.num_rows, BATCH)
        )
        yield from _batch_rows(path, pieces, class_names(batches.schema, path))


# Fields that lead from a message of an .arrow stream to BodyCompression (Message.fbs and Schema.fbs of Apache Arrow).
HEADERS = {"record batch": (2, 3), "dictionary": (2, 1, 3)}


def _is_compressed(message: bytes, fields: tuple[int, ...]) -> bool:
    """Whether a message's columns are packed: what they unpack to would be known only when they are.

    A FlatBuffers table begins with the distance to its vtable, which has the place of each field (0: not there).
    """
    (table,) = struct.unpack_from("<I", message, 0)
    for field in fields:
        vtable = table - struct.unpack_from("<i", message, table)[0]
        entry = 4 + 2 * field
        if entry >= struct.unpack_from("<H", message, vtable)[0]:
            return False
        place = struct.unpack_from("<H", message, vtable + entry)[0]
        if place == 0:
            return False
        table += place
        table += struct.unpack_from("<I", message, table)[0]
    return True


def _batch_rows(path: Path, batches: Iterable[Any], classes: dict[str, list[str]]) -> Iterator[tuple[int, Row]]:
    """Rows of record batches, a few Python objects at a time; numbers of classes become their names."""
    number = 0
    for batch in batches:
        places = [f"{path}, column {name!r}" for name in batch.schema.names]
        longest = max((_longest(array, place) for array, place in zip(batch.columns, places)), default=0)
        step = max(1, min(BATCH, FREE // (longest + 1)))
        for start in range(0, batch.num_rows, step):
            for row in batch.slice(start, step).to_pylist():
                number += 1
                yield number, named_classes(row, classes)


def class_names(schema: Any, path: Path) -> dict[str, list[str]]:
    """Names of the classes of each column that holds numbers of classes, from what `datasets` notes in a schema.

    Raises:
        DataError: for a note that is not JSON.
    """
    note = (schema.metadata or {}).get(b"huggingface")
    if note is None:
        return {}
    try:
        features = json.loads(note)["info"]["features"]
        kinds = {name: kind.get("feature") or kind for name, kind in features.items()}  # of lists, that of their items
        classes = {name: kind["names"] for name, kind in kinds.items() if kind.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: what the schema notes under 'huggingface' is damaged: {brief(note)}") from error
    listed = {column: names for column, names in classes.items() if isinstance(names, list)}
    return {column: names for column, names in listed.items() if all(isinstance(name, str) for name in names)}


def named_classes(row: Row, classes: dict[str, list[str]]) -> Row:
    """`row` with names for its numbers of classes, also in lists; -1, a label that is not given, becomes `Hidden`."""

    def named(value: Any, names: list[str]) -> Any:
        if not isinstance(value, int):
            return value
        return names[value] if 0 <= value < len(names) else Hidden(value) if value == -1 else value

    for column, names in classes.items():
        value = row.get(column)
        if column in row:
            row[column] = [named(item, names) for item in value] if isinstance(value, list) else named(value, names)
    return row


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_string(kind) or types.is_large_string(kind)


def _longest(array: Any, where: str) -> int:
    """Bytes of the longest text of a column; 0 for other columns."""
    import pyarrow.compute

    values = array.dictionary if isinstance(array, pyarrow.DictionaryArray) else array
    if not _is_text(values.type):
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
    with zipfile.ZipFile(path) as archive:
        _check_size(path, sum(member.file_size for member in archive.infolist()), MOST)
    try:
        yield from _sheet_rows(path, columns)
    except ValueError as error:
        if isinstance(error.__cause__ or error, DefusedXmlException):  # entities: a few bytes become many
            raise DataError(f"{path}: its XML has a DOCTYPE, which no spreadsheet program writes") from error
        raise


def _sheet_rows(path: Path, columns: Columns) -> Iterator[tuple[int, Row]]:
    book = _open_book(path)
    try:
        sheet = book.worksheets[0]
        sheet.reset_dimensions()  # a size that the file claims for itself would be filled up with empty cells
        lines = sheet.iter_rows()
        header = [str(unescaped(cell.value)) if cell.value is not None else "" for cell in next(lines, ())]
        check_names(header, path)
        header = distinct(header)
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
                row[name] = "" if value is None else unescaped(value)
            if any(value != "" for value in row.values()):
                yield number, {name: value for name, value in row.items() if name in wanted}
    finally:
        book.close()


def _open_book(path: Path) -> Any:
    """A book of openpyxl's, which takes defusedxml, since that is installed, for all XML.

    With the texts that cells share as they are: openpyxl itself takes every "x005F_" out of them, by which an escape
    that is meant as text is told from the character.
    """
    from openpyxl.cell.text import Text
    from openpyxl.reader.excel import SHARED_STRINGS, ExcelReader
    from openpyxl.xml.constants import SHEET_MAIN_NS
    from openpyxl.xml.functions import iterparse

    class Reader(ExcelReader):
        def read_strings(self) -> None:
            """Texts of the table that cells share."""
            part = self.package.find(SHARED_STRINGS)
            if part is None:
                return
            with self.archive.open(part.PartName[1:]) as source:
                for _, node in iterparse(source):
                    if node.tag == f"{{{SHEET_MAIN_NS}}}si":
                        self.shared_strings.append(Text.from_tree(node).content)
                        node.clear()

    reader = Reader(path, read_only=True, keep_links=False)
    reader.read()
    return reader.wb


def unescaped(value: Any) -> Any:
    """The text of a cell without Office Open XML's escapes (_x000D_ for a carriage return; ST_Xstring of ECMA-376)."""
    from openpyxl.utils.escape import unescape

    if not isinstance(value, str) or "_x" not in value:
        return value
    # A character outside of the first 65,536 is two escapes.
    return unescape(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _refuse(where: str, cell: Any) -> None:
    if cell.data_type == "f":  # nothing is computed here, and a stored result may be missing or old
        raise DataError(f"{where}: a formula ({str(cell.value)[:80]}); save values only")
    raise DataError(f"{where}: the error value {cell.value} of a formula; correct it, or clear the cell")


def _check_size(path: Path, unpacked: int, most: float = math.inf) -> None:
    """Refuse a bomb."""
    limit = min(max(FREE, RATIO * path.stat().st_size), most)
    if unpacked > limit:
        raise DataError(f"{path} would unpack to {unpacked / 2**20:,.0f} MiB; accepted for a file of "
                        f"{path.stat().st_size / 2**20:,.1f} MiB: at most {limit / 2**20:,.0f}")  # fmt: skip
