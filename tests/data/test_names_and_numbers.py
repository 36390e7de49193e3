"""Labels, ids and documents are the same text in every format; classes have their names; weights are numbers."""

import json
import re
import zipfile
from decimal import Decimal

import datasets
import openpyxl
import pandas
import pyarrow
import pytest

from irtune.config import DataConfig
from irtune.config.labels import canonical
from irtune.data import read_corpus, read_split, read_table
from irtune.data.readers.cells import by_number
from irtune.errors import DataError
from irtune.files import to_json

pytestmark = pytest.mark.quick
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xlsx")


def write(path, rows):
    frame = pandas.DataFrame(rows)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".xlsx":
        frame.to_excel(path, index=False)
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


def rows(labels, **columns):
    made = [{"before": f"a{i}", "after": f"b{i}", "label": label} for i, label in enumerate(labels)]
    return [row | {name: values[i] for name, values in columns.items()} for i, row in enumerate(made)]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kind", [int, float])
def test_labels_that_are_whole_numbers_are_sorted_by_value(tmp_path, suffix, kind):
    path = write(tmp_path / f"train{suffix}", rows([kind(i % 12) for i in range(24)]))
    corpus = read_corpus(DataConfig(train=str(path), dev=str(path)))
    assert corpus.labels == [str(i) for i in range(12)]
    assert [example.label for example in corpus.splits["dev"]] == [i % 12 for i in range(24)]


def test_the_order_of_labels_by_hand():
    assert by_number({"10", "9", "-1", "2"}) == ["-1", "2", "9", "10"]
    assert by_number({"10", "9", "b"}) == ["10", "9", "b"]  # one of them is a text
    assert by_number({"01", "1", "0"}) == ["0", "01", "1"]


@pytest.mark.parametrize(
    "same",
    [
        ("1", 1, 1.0, "1.0", "1.", "1.00", Decimal("1.0")),
        ("0", 0, -0.0, "0.0", "-0.0", 0.0),
        ("-7", -7, -7.0, "-7.0"),
        ("100000", 100000, 1e5, "1e+05", "1E+05"),
        ("true", True, "True", "TRUE"),
        ("false", False, "False", "FALSE"),
    ],
    ids=lambda same: same[0],
)
def test_one_text_for_one_value(same):
    assert {canonical(value) for value in same} == {same[0]}


@pytest.mark.parametrize("text", ["01", "1.5", "1e5", "12e4", "1.10", "v1.0", "1.0.0", ".0", "", "tRue", "yes", "1,0"])
def test_other_texts_stay(text):
    assert canonical(text) == text


@pytest.mark.parametrize("train", FORMATS)
@pytest.mark.parametrize("dev", FORMATS)
def test_documents_and_ids_are_one_text_whatever_the_format(tmp_path, train, dev):
    """A whole number with a gap elsewhere in its column is a float in one split and none in the other."""
    first = write(tmp_path / f"train{train}", rows("xyxy", doc=[1, 1, 2, 2], id=[11, 12, 13, 14]))
    second = write(tmp_path / f"dev{dev}", rows("xyxy", doc=[1.0, 3.0, 3.0, 2.0], id=[21.0, 22.0, 23.0, 24.0]))
    corpus = read_corpus(DataConfig(train=str(first), dev=str(second), group="doc"))
    assert [example.group for example in corpus.splits["train"]] == ["1", "1", "2", "2"]
    assert [example.group for example in corpus.splits["dev"]] == ["1", "3", "3", "2"]
    assert [example.id for example in corpus.splits["dev"]] == ["21", "22", "23", "24"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_truth_values_are_labels_and_the_same_in_every_format(tmp_path, suffix):
    path = write(tmp_path / f"train{suffix}", rows([True, False, False]))
    corpus = read_corpus(DataConfig(train=str(path), dev=str(path)))
    assert corpus.labels == ["false", "true"]
    assert [example.label for example in corpus.splits["dev"]] == [1, 0, 0]
    named = DataConfig(train=str(path), dev=str(path), labels={"True": "good", "false": "bad"})
    assert read_corpus(named).labels == ["good", "bad"]
    assert [example.label for example in read_corpus(named).splits["train"]] == [0, 1, 1]


@pytest.mark.parametrize("spelled", [" 1", "1 ", " 1.0", "1\u00a0"])
def test_a_blank_beside_it_is_not_another_document(tmp_path, spelled):
    first = write(tmp_path / "train.csv", rows("xyxy", doc=["1", "2", "3", "4"]))
    second = write(tmp_path / "dev.csv", rows("xyxy", doc=[spelled, "5", "6", "7"]))
    corpus = read_corpus(DataConfig(train=str(first), dev=str(second), group="doc"))
    assert corpus.splits["dev"][0].group == corpus.splits["train"][0].group == "1"


def test_settings_name_labels_in_any_spelling(tmp_path):
    path = write(tmp_path / "train.csv", rows([1.0, 2.0, 3.0, 1.0]))
    data = DataConfig(train=str(path), dev=str(path), labels=["2", "1.0"], drop_labels=["3"])
    corpus = read_corpus(data)
    assert corpus.labels == ["2", "1.0"]
    assert [example.label for example in corpus.splits["train"]] == [1, 0, 1]
    assert [e.label for e in read_split(DataConfig(path=str(path), drop_labels=["3.0"]), "test", ["2", "1"])] == [
        1,
        0,
        1,
    ]
    with pytest.raises(DataError, match=r"data.labels: '1.0' is the label '1', which has another entry"):
        read_corpus(DataConfig(train=str(path), dev=str(path), labels={"1": "a", "1.0": "b", "2": "a", "3": "b"}))


CLASSES = datasets.Features(
    {
        "before": datasets.Value("string"),
        "after": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["style", "clarity", "fluency"]),
    }
)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_classes_of_a_file_have_their_names(tmp_path, suffix):
    part = datasets.Dataset.from_list(rows([0, 1, 2, 1]), features=CLASSES)
    path = tmp_path / f"train{suffix}"
    if suffix == ".parquet":
        part.to_parquet(path)
    else:
        part.save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(path)
    corpus = read_corpus(DataConfig(train=str(path), dev=str(path)))
    assert corpus.labels == ["clarity", "fluency", "style"]
    assert [corpus.labels[e.label] for e in corpus.splits["dev"]] == ["style", "clarity", "fluency", "clarity"]


def test_categories_of_a_stream_are_texts(tmp_path):
    """A dictionary batch, which is a message of its own."""
    table = pyarrow.Table.from_pylist(rows("xyx"))
    table = table.set_column(2, "label", table["label"].dictionary_encode())
    with pyarrow.ipc.new_stream(tmp_path / "train.arrow", table.schema) as out:
        out.write_table(table)
    path = str(tmp_path / "train.arrow")
    assert [example.label for example in read_corpus(DataConfig(train=path, dev=path)).splits["dev"]] == [0, 1, 0]


def classes(path, numbers):
    datasets.Dataset.from_list(rows(numbers), features=CLASSES).to_parquet(path)
    return path


def test_a_row_of_a_hidden_class_is_a_row_without_a_label(tmp_path):
    path = classes(tmp_path / "train.parquet", [0, 2, -1, 1, -1])
    said = r"row 3, column 'label': -1 is the hub's mark .* \(2 such rows\); .* data\.drop_labels \[-1\]"
    with pytest.raises(DataError, match=said):
        read_corpus(DataConfig(train=str(path), dev=str(path)))
    with pytest.raises(DataError, match=said):
        read_split(DataConfig(path=str(path)), "test", ["style", "clarity", "fluency"])
    corpus = read_corpus(DataConfig(train=str(path), dev=str(path), drop_labels=["-1"]))
    assert [corpus.labels[e.label] for e in corpus.splits["train"]] == ["style", "fluency", "clarity"]
    lists = CLASSES | {"label": datasets.Sequence(CLASSES["label"])}
    datasets.Dataset.from_list(rows([[0], [2, -1]]), features=datasets.Features(lists)).to_parquet(path)
    with pytest.raises(DataError, match=r"row 2, column 'label': -1 is not a label: on the hub it marks rows without"):
        read_corpus(DataConfig(train=str(path), dev=str(path), multi_label=True))


@pytest.mark.parametrize("drop", [[], ["-1"]])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_test_split_of_hidden_classes_is_left_out_and_said(tmp_path, caplog, shards, drop):
    """As in every corpus of GLUE."""
    (tmp_path / "data").mkdir()
    for split, numbers in {"train": [0, 1, 2, 1], "validation": [1, 2], "test": [-1, -1, -1]}.items():
        for shard in range(shards):
            classes(tmp_path / "data" / f"{split}-{shard:05}-of-{shards:05}.parquet", numbers)
    corpus = read_corpus(DataConfig(path=str(tmp_path), drop_labels=drop))
    assert {split: len(part) for split, part in corpus.splits.items()} == {"train": 4 * shards, "dev": 2 * shards}
    assert "; there is no test split" in caplog.text
    test = tmp_path / "data" / f"test-00000-of-{shards:05}.parquet"
    with pytest.raises(DataError, match="no row has a label: column 'label' is -1" if not drop else "no rows are left"):
        read_corpus(DataConfig(path=str(tmp_path), test=str(test), drop_labels=drop))
    assert to_json(read_table(test)[0][1]) == to_json(rows([-1])[0])  # what predict reads and writes


def share_texts(path):
    """Cells that name a text in a table of the book, as spreadsheet programs write them."""
    with zipfile.ZipFile(path) as book:
        parts = {name: book.read(name).decode() for name in book.namelist()}
    sheet, texts = "xl/worksheets/sheet1.xml", []

    def shared(found):
        texts.append(f"<si>{found[1]}</si>")
        return f't="s"><v>{len(texts) - 1}</v>'

    parts[sheet] = re.sub(r't="inlineStr"><is>(.*?)</is>', shared, parts[sheet], flags=re.DOTALL)
    assert texts
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"
    table = f'<Override PartName="/xl/sharedStrings.xml" ContentType="{kind}" /></Types>'
    parts["[Content_Types].xml"] = parts["[Content_Types].xml"].replace("</Types>", table)
    parts["xl/sharedStrings.xml"] = f'<sst xmlns="{main}">{"".join(texts)}</sst>'
    with zipfile.ZipFile(path, "w") as book:
        for name, part in parts.items():
            book.writestr(name, part)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("two_x000D_\nlines", "two\r\nlines"),
        ("_x0041_BC", "ABC"),
        ("_x005F_x000D_", "_x000D_"),  # the escape of an escape
        ("_xD83D__xDE00_", "\U0001f600"),
        ("_x00e9_t_x00E9_", "\u00e9t\u00e9"),
        ("snake_x_case _x12_ _xyz_", "snake_x_case _x12_ _xyz_"),
    ],
)
def test_escapes_of_a_sheet_are_characters(tmp_path, value, text, shared):
    book = openpyxl.Workbook()
    for line in (["bef_x006F_re", "after", "label"], [value, "b", "x"], ["c", value, "y"]):
        book.active.append(line)
    book.save(tmp_path / "train.xlsx")
    if shared:
        share_texts(tmp_path / "train.xlsx")
    corpus = read_corpus(DataConfig(train=str(tmp_path / "train.xlsx"), dev=str(tmp_path / "train.xlsx")))
    assert (corpus.splits["train"][0].before, corpus.splits["train"][1].after) == (text, text)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("label", [["x"], {"name": "x"}])
def test_a_list_as_label_is_named_with_its_place(tmp_path, suffix, label):
    path = write(tmp_path / f"train{suffix}", rows([label, label]))
    with pytest.raises(DataError, match=rf"train{suffix}, row 1, column 'label': .* is not a label; an example has"):
        read_corpus(DataConfig(train=str(path), dev=str(path)))
    texts = write(tmp_path / f"texts{suffix}", rows("xy", before=[["a"], ["b"]]))
    with pytest.raises(DataError, match=r"row 1, column 'before': expected text, not the list \['a'\]"):
        read_corpus(DataConfig(train=str(texts), dev=str(texts)))


@pytest.mark.parametrize("suffix", [".csv", ".xlsx"])
def test_columns_without_a_name_are_all_kept(tmp_path, suffix):
    path, lines = tmp_path / f"new{suffix}", (["", "before", "", "after"], ["0", "a", "mine", "b"])
    if suffix == ".csv":
        path.write_text("".join(",".join(line) + "\n" for line in lines))
    else:
        book = openpyxl.Workbook()
        for line in lines:
            book.active.append([cell or None for cell in line])
        book.save(path)
    assert read_table(path) == [(2, {"": "0", "before": "a", "column 3": "mine", "after": "b"})]


@pytest.mark.parametrize("suffix", FORMATS)
def test_weights_are_read_for_training_only(tmp_path, suffix):
    train = write(tmp_path / f"train{suffix}", rows("xyx", w=[0.5, 2, 0]))
    dev = write(tmp_path / f"dev{suffix}", rows("xy"))
    corpus = read_corpus(DataConfig(train=str(train), dev=str(dev), weight="w"))
    assert [example.weight for example in corpus.splits["train"]] == [0.5, 2.0, 0.0]
    assert [example.weight for example in corpus.splits["dev"]] == [1.0, 1.0]
    assert len(read_split(DataConfig(path=str(dev), weight="w"), "test", ["x", "y"])) == 2


@pytest.mark.parametrize("value", [-1, 1_000_001, float("nan"), float("inf"), "much", "", None, True, [1]])
def test_a_weight_that_is_none_is_named_with_its_row(tmp_path, value):
    path = write(tmp_path / "train.jsonl", rows("xyx", w=[1, value, 1]))
    with pytest.raises(
        DataError, match=r"row 2, column 'w': .* is not a weight; accepted: a number from 0 to 1,000,000"
    ):
        read_corpus(DataConfig(train=str(path), dev=str(path), weight="w"))


def test_weights_that_are_all_0_are_refused(tmp_path):
    path = write(tmp_path / "train.jsonl", rows("xyx", w=[0, 0, 0]))
    with pytest.raises(DataError, match=r"every weight in column 'w' \(data.weight\) is 0"):
        read_corpus(DataConfig(train=str(path), dev=str(path), weight="w"))


def test_a_label_that_dev_lacks_is_named(tmp_path, caplog):
    train, dev = write(tmp_path / "train.jsonl", rows("xyz")), write(tmp_path / "dev.jsonl", rows("xx"))
    read_corpus(DataConfig(train=str(train), dev=str(dev)))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        "the dev split has no example of 'y', 'z': macro_f1 counts them as 0, macro_f1_present leaves them out"
    )
    caplog.clear()
    read_corpus(DataConfig(train=str(train), dev=str(train)))
    assert not caplog.records
