"""Corpora that are packed: .xlsx and .parquet files. And those of the hub."""

# ruff: noqa: E501 - tables

import io
import zipfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import openpyxl
import pyarrow
import pyarrow.parquet

from tests.support.bad_input.case import DEV, TRAIN, Box, Case
from tests.support.bad_input.corpora import counts

HEADER = ("before", "after", "label")
GOOD = [tuple(row.values()) for row in TRAIN]
NAMESPACE = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"


def book(*lines: Sequence[object]) -> bytes:
    made = openpyxl.Workbook()
    for line in lines:
        made.active.append(line)
    content = io.BytesIO()
    made.save(content)
    return content.getvalue()


def with_part(content: bytes, name: str, change) -> bytes:
    """A book with another text for one of its parts."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, change(old.read(member)) if member == name else old.read(member))
    return out.getvalue()


def beside_dev(box: Box, name: str, content: bytes) -> Path:
    box.lines("corpus/dev.jsonl", DEV)
    return box.write(f"corpus/{name}", content).parent


def xlsx(*lines: Sequence[object]):
    return lambda box: box.on(beside_dev(box, "train.xlsx", book(*lines)))


def raw(name: str, content: bytes):
    return lambda box: box.on(beside_dev(box, name, content))


SHEET = "xl/worksheets/sheet1.xml"
CELL = b'<c r="A2" t="inlineStr"><is><t>a b</t></is></c>'


def replaced(old: bytes, new: bytes) -> bytes:
    """The good book with `new` for `old` in its sheet."""

    def change(sheet: bytes) -> bytes:
        assert old in sheet
        return sheet.replace(old, new, 1)

    return with_part(book(HEADER, *GOOD), SHEET, change)


def error_value(box: Box) -> list[str]:
    return box.on(beside_dev(box, "train.xlsx", replaced(CELL, b'<c r="A2" t="e"><v>#REF!</v></c>')))


def sheet_bomb(box: Box) -> list[str]:
    """256 MiB of blanks beside a good sheet, in a file of 256 KiB."""
    out = io.BytesIO(book(HEADER, *GOOD))
    with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED) as archive, archive.open("xl/sharedStrings.xml", "w") as part:
        for _ in range(64):
            part.write(b" " * 2**22)
    return box.on(beside_dev(box, "train.xlsx", out.getvalue()))


def text_bomb(box: Box) -> list[str]:
    """A cell of 40 MiB, which is small enough to be unpacked."""
    content = replaced(CELL, CELL.replace(b"a b", b"a" * 40 * 2**20))
    return box.on(beside_dev(box, "train.xlsx", content))


def entities(box: Box) -> list[str]:
    laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10 if i else "ha" * 10}">' for i in range(10))
    start = f"<!DOCTYPE worksheet [{laughs}]><worksheet ".encode()
    made = replaced(b"<worksheet ", start)
    content = with_part(made, SHEET, lambda old: old.replace(b"<t>a b</t>", b"<t>&l9;</t>"))
    return box.on(beside_dev(box, "train.xlsx", content))


def outside_file(box: Box) -> list[str]:
    secret = box.write("secret.txt", "secret")
    start = f'<!DOCTYPE worksheet [<!ENTITY x SYSTEM "{secret.as_uri()}">]><worksheet '.encode()
    return box.on(beside_dev(box, "train.xlsx", replaced(b"<worksheet ", start)))


def claims(box: Box) -> list[str]:
    """A sheet of four rows that says it has 16,384 columns and a million rows."""
    beside_dev(box, "train.xlsx", replaced(b'<dimension ref="A1:C5"', b'<dimension ref="A1:XFD1048576"'))
    return box.stats()


def far_row(box: Box) -> list[str]:
    return box.on(beside_dev(box, "train.xlsx", replaced(b'<row r="5"', b'<row r="999999999"')))


def parquet(table: pyarrow.Table, **options: object) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out, **options)
    return out.getvalue()


def columns(**changed: object) -> pyarrow.Table:
    whole = {name: [row[name] for row in TRAIN] for name in HEADER}
    return pyarrow.table(whole | changed)


def table(**changed: object):
    return lambda box: box.on(beside_dev(box, "train.parquet", parquet(columns(**changed))))


def table_with(note: bytes):
    made = columns().replace_schema_metadata({b"huggingface": note})
    return lambda box: box.on(beside_dev(box, "train.parquet", parquet(made)))


def dictionary_bomb(box: Box) -> list[str]:
    """A hundred thousand rows that are all the same text of 5 MB."""
    indices = pyarrow.array([0] * 10**5, pyarrow.int32())
    giant = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["word " * 10**6]))
    small = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["x"]))
    content = parquet(pyarrow.table({"before": giant, "after": small, "label": small}), compression="zstd")
    return box.on(beside_dev(box, "train.parquet", content))


def page_bomb(box: Box) -> list[str]:
    """A text of 100 MB in a file of some kilobytes."""
    whole = columns(before=["a" * 10**8, "c", "e", "g"])
    return box.on(beside_dev(box, "train.parquet", parquet(whole, compression="zstd", use_dictionary=False)))


def arrow(table: pyarrow.Table, compression: str | None = None) -> bytes:
    out = io.BytesIO()
    with pyarrow.ipc.new_stream(out, table.schema, options=pyarrow.ipc.IpcWriteOptions(compression=compression)) as to:
        to.write_table(table)
    return out.getvalue()


def arrow_bomb(box: Box) -> list[str]:
    """A text of 100 MB in a file of some kilobytes."""
    content = arrow(columns(before=["a" * 10**8, "c", "e", "g"]), "zstd")
    assert len(content) < 10**5
    return box.on(beside_dev(box, "train.arrow", content))


def pickled_type(box: Box) -> list[str]:
    """A column whose type old versions of pyarrow unpickled."""
    import os
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, (box.canary(),)

    evil = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Evil())}
    fields = [pyarrow.field(name, pyarrow.string(), metadata=evil) for name in HEADER]
    whole = pyarrow.table([columns().column(name) for name in HEADER], schema=pyarrow.schema(fields))
    beside_dev(box, "train.parquet", parquet(whole))
    return box.stats()


def broken_text(box: Box) -> list[str]:
    bad = pyarrow.array([b"\xff\xfe", b"c", b"e", b"g"]).view(pyarrow.string())
    return table(before=bad)(box)


def twice(box: Box) -> list[str]:
    whole = pyarrow.table([columns().column(name) for name in (*HEADER, "label")], names=[*HEADER, "label"])
    return box.on(beside_dev(box, "train.parquet", parquet(whole)))


def good_cut(made: bytes) -> bytes:
    return made[: len(made) // 2]


def hub(box: Box) -> list[str]:
    """No network, and a client that shows an address with a token. It does so in the test's own process only."""
    import datasets

    def load_dataset(name: str) -> None:
        datasets.load_dataset = usual
        raise ConnectionError(f"no answer from https://user:pass4word@hub/{name}?token=hf_AbCdEfGhIj0123456789")

    usual, datasets.load_dataset = datasets.load_dataset, load_dataset
    return box.train("--data.path", "someone/corpus")


CASES = [
    Case("a formula", xlsx(HEADER, *GOOD, ("=1+1", "b", "x")), "row 6, column 'before': a formula (=1+1); save values only"),
    Case("a formula that would run a program", xlsx(HEADER, *GOOD, ("=cmd|'/c calc'!A1", "b", "x")), "a formula (...); save values only"),
    Case("the error value of a formula", error_value, "row 2, column 'before': the error value #REF! of a formula"),
    Case("a date where a text belongs", xlsx(HEADER, *GOOD, (date(2024, 1, 2), "b", "x")), "row 6, column 'before': expected text, not the datetime ..."),
    Case("a column twice in a sheet", xlsx((*HEADER, "label"), ("a", "b", "x", "y")), "the column 'label' appears 2 times"),
    Case("a book that is no archive", raw("train.xlsx", b"PK\x03\x04 nonsense"), "cannot be read as xlsx: ..."),
    Case("a book that is cut", raw("train.xlsx", good_cut(book(HEADER, *GOOD))), "cannot be read as xlsx: ..."),
    Case("an archive without a book", raw("train.xlsx", b"PK\x05\x06" + b"\0" * 18), "cannot be read as xlsx: ..."),
    Case("an empty sheet", xlsx(), "has no rows"),
    Case("a zip bomb, 256 MiB unpacked", sheet_bomb, "would unpack to ... MiB; accepted for a file of ... MiB: at most ...", most_mib=50),
    Case("a cell of 40 MiB (.xlsx)", text_bomb, "a text of ... characters; accepted: at most ...", most_mib=200),
    Case("XML entities of entities, a billion written out", entities, "its XML has a DOCTYPE, which no spreadsheet program writes", most_mib=50),
    Case("an XML entity that is another file", outside_file, "its XML has a DOCTYPE, which no spreadsheet program writes"),
    Case("a sheet that claims a million rows of 16,384 columns", claims, "the rows that are there are read", check=counts(4, ["x", "y"]), most_mib=50),
    Case("a row with the number 999,999,999", far_row, "more than ... rows, which no sheet has", most_mib=50),
    Case("a .parquet file that is cut", raw("train.parquet", good_cut(parquet(columns()))), "cannot be read as parquet: ..."),
    Case("a .parquet file of four bytes", raw("train.parquet", b"PAR1"), "cannot be read as parquet: ..."),
    Case("an .arrow file that is cut", raw("train.arrow", good_cut(arrow(columns()))), "cannot be read as arrow: ..."),
    Case("an .arrow file of another kind", raw("train.arrow", b"ARROW1\0\0 nonsense"), "cannot be read as arrow: ..."),
    Case("a text of 100 MB that packs to kilobytes (.arrow)", arrow_bomb, "is compressed inside, which `datasets` never does", most_mib=50),
    Case("a hundred thousand times the same text of 5 MB", dictionary_bomb, "a text of ... bytes; accepted: at most ...", most_mib=50),
    Case("a text of 100 MB that packs to kilobytes", page_bomb, "would unpack to ... MiB; accepted for a file of ... MiB: at most ...", most_mib=50),
    Case("bytes where a text belongs", table(before=[b"a", b"c", b"e", b"g"]), "column 'before': expected text, not the bytes ..."),
    Case("labels with a gap (1.0 and NaN)", table(label=[1.0, 2.0, float("nan"), 1.0]), "row 3, column 'label': nan is not a label: the cell is empty"),
    Case("lists as labels (.parquet)", table(label=[["x"], ["y"], ["x"], ["y"]]), "row 1, column 'label': ['x'] is not a label; an example has exactly one"),
    Case("a damaged note on classes (.parquet)", table_with(b"{'info': 1}"), "what the schema notes under 'huggingface' is damaged: ..."),
    Case("a text that is not UTF-8 (.parquet)", broken_text, "a text in it is not UTF-8"),
    Case("a column twice (.parquet)", twice, "the column 'label' appears 2 times"),
    Case("a pickled type in a .parquet file", pickled_type, "it is not unpickled", check=counts(4, ["x", "y"])),
    Case("a hub corpus that cannot be reached", hub, "is neither a file, a folder nor a hub dataset that can be reached: no answer from https://user:***@hub"),
]  # fmt: skip
