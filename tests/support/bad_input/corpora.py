"""Corpora in text files: places, encodings, JSON, CSV, and what stands in the cells."""

# ruff: noqa: E501 - tables

import itertools
import json
import os
from collections.abc import Callable

from tests.support.bad_input.case import DEV, TRAIN, Box, Case, Row

ARABIC = "\u0647\u0630\u0627 \u0646\u0635 \u202e(abc)\u202c"
ZERO_WIDTH = "e\u0301\u200b\u200d\ufeff\u2028 \U0001f468\u200d\U0001f469\u200d\U0001f467"
MILLION = 1_000_000


def file(name: str, content: str | bytes, *options: str):
    """A training file of these bytes, beside a good dev file."""

    def build(box: Box) -> list[str]:
        box.lines("corpus/dev.jsonl", DEV)
        box.write(f"corpus/{name}", content)
        return box.on(box.folder / "corpus", *options)

    return build


def rows(train: list[Row], *options: str, dev: list[Row] = DEV):
    return lambda box: box.on(box.corpus(train, dev), *options)


def cell(column: str, value: object, *options: str):
    """The good corpus with another value in the second row."""
    return rows([row | {column: value} if number == 1 else row for number, row in enumerate(TRAIN)], *options)


def survives(text: str) -> Callable[[str, Box], None]:
    def check(output: str, box: Box) -> None:
        from irtune.config import DataConfig
        from irtune.data import read_corpus

        examples = read_corpus(DataConfig(path=str(box.folder / "corpus"))).splits["train"]
        assert [example.before for example in examples].count(text) == 1
        assert json.loads(output)["splits"]["train"]["rows"] == len(TRAIN)

    return check


def text(value: str):
    def build(box: Box) -> list[str]:
        train = [row | {"before": value} if number == 1 else row for number, row in enumerate(TRAIN)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in train)
        box.lines("corpus/dev.jsonl", DEV)
        box.write("corpus/train.jsonl", lines)
        return box.stats()

    return build


def counts(train: int, labels: list[str]) -> Callable[[str, Box], None]:
    def check(output: str, box: Box) -> None:
        found = json.loads(output)
        assert (found["splits"]["train"]["rows"], found["labels"]) == (train, labels)
        assert not (box.folder / "executed").exists()

    return check


def stats_of(name: str, content: str | bytes):
    def build(box: Box) -> list[str]:
        box.lines("corpus/dev.jsonl", DEV)
        box.write(f"corpus/{name}", content)
        return box.stats()

    return build


def csv_lines(rows: list[Row] = TRAIN, end: str = "\n") -> str:
    return "".join(",".join(line) + end for line in (("before", "after", "label"), *(row.values() for row in rows)))


def documents(names: list[object], *options: str):
    def build(box: Box) -> list[str]:
        train = [row | {"doc": name} for row, name in zip(TRAIN, names)]
        return box.on(box.corpus(train, [row | {"doc": 1} for row in DEV]), *options)

    return build


def weights(values: list[object], *options: str):
    return lambda box: box.on(box.corpus([row | {"w": value} for row, value in zip(TRAIN, values)]), *options)


def mixed_labels(box: Box) -> list[str]:
    box.corpus([row | {"label": label} for row, label in zip(TRAIN, (1, "1", 2, "2"))], [DEV[0] | {"label": 1}])
    return box.stats()


def two_files(box: Box) -> list[str]:
    box.write("corpus/train.csv", csv_lines())
    return box.on(box.corpus())


def folder_as_file(box: Box) -> list[str]:
    (box.corpus() / "train.jsonl").unlink()
    (box.folder / "corpus/train.jsonl").mkdir()
    return box.on(box.folder / "corpus")


def pipe(box: Box) -> list[str]:
    os.mkfifo(box.corpus() / "more.jsonl")
    return box.on(box.folder / "corpus", "--data.train", str(box.folder / "corpus/more.jsonl"))


def link_out(box: Box) -> list[str]:
    corpus = box.corpus()
    (corpus / "train.jsonl").rename(box.folder / "elsewhere.jsonl")
    (corpus / "train.jsonl").symlink_to("../elsewhere.jsonl")
    return box.on(corpus)


def link_inside(box: Box) -> list[str]:
    corpus = box.corpus()
    (corpus / "train.jsonl").rename(corpus / "version-2.jsonl")
    (corpus / "train.jsonl").symlink_to("version-2.jsonl")
    return box.stats()


def link_nowhere(box: Box) -> list[str]:
    (box.corpus() / "train.jsonl").unlink()
    (box.folder / "corpus/train.jsonl").symlink_to("/nowhere/at/all")
    return box.on(box.folder / "corpus")


def code(box: Box) -> list[str]:
    """What `datasets` would once have run, and what Python might import or unpickle."""
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, (box.canary(),)

    for name in ("corpus.py", "__init__.py", "sitecustomize.py", "conftest.py"):
        box.write(f"corpus/{name}", box.python_canary())
    for name in ("test.pkl", "test.npz", "test.npy", "train.pickle", "dataset_infos.json"):
        box.write(f"corpus/{name}", pickle.dumps(Evil()))
    box.corpus()
    return box.stats()


def missing_shard(box: Box) -> list[str]:
    box.lines("corpus/data/train-00001-of-00002.jsonl", TRAIN)
    return box.on(box.lines("corpus/data/dev.jsonl", DEV).parents[1])


def saved_outside(box: Box) -> list[str]:
    box.write("corpus/state.json", json.dumps({"_data_files": [{"filename": "../secret.arrow"}]}))
    box.write("secret.arrow", "secret")
    return box.on(box.folder / "corpus", "--data.dev_fraction=0.5")


def giant_cell(box: Box) -> list[str]:
    corpus = box.corpus()
    with (corpus / "train.csv").open("w") as out:
        out.write('before,after,label\n"')
        for _ in range(500_000):
            out.write("word " * 19 + "word\n")
        out.write('",b,x\nc,d,y\n')
    (corpus / "train.jsonl").unlink()
    return box.on(corpus)


def giant_text(suffix: str, size: int):
    def build(box: Box) -> list[str]:
        corpus = box.corpus()
        (corpus / "train.jsonl").unlink()
        start, end = ("[", ', {"before": "c", "after": "d", "label": "y"}]') if suffix == "json" else ("", "\n")
        with (corpus / f"train.{suffix}").open("w") as out:
            out.write(start + '{"after": "b", "label": "x", "before": "')
            for _ in range(size // MILLION):
                out.write("word " * (MILLION // 5))
            out.write('"}' + end)
        return box.on(corpus)

    return build


def million_labels(box: Box) -> list[str]:
    corpus = box.corpus()
    with (corpus / "train.jsonl").open("w") as out:
        for number in range(MILLION):
            out.write(f'{{"before": "a", "after": "b", "label": "l{number}"}}\n')
    return box.on(corpus)


def million_folds(box: Box) -> list[str]:
    return [*million_labels(box), "--data.dev_fraction=0.1"]


def thousands_of_columns(box: Box) -> list[str]:
    names = [f"c{number}" for number in range(5_000)]
    lines = [",".join([*names, "before", "after", "label"])]
    lines += [",".join([*("1" for _ in names), *row.values()]) for row in itertools.islice(itertools.cycle(TRAIN), 400)]
    box.lines("corpus/dev.jsonl", DEV)
    box.write("corpus/train.csv", "\n".join(lines) + "\n")
    return box.stats()


PLACES = [
    Case("no such corpus file", lambda box: box.train("--data.path", "no.jsonl"), "there is no file ..."),
    Case("no such corpus folder", lambda box: box.train("--data.path", "./no/folder"), "there is no file or folder ..."),
    Case("an empty folder", lambda box: box.on(box.write("corpus/notes.txt", "").parent), "no train split; expected a file such as ..."),
    Case("no dev split", lambda box: box.on(box.lines("train.jsonl", TRAIN)), "no dev split; expected a file such as ..."),
    Case("two training files", two_files, "more than one train file: ..."),
    Case("a folder named train.jsonl", folder_as_file, "is a folder, where a file is expected"),
    Case("a folder as training file", lambda box: box.on(box.corpus(), "--data.train", str(box.folder)), "is a folder, where a file is expected"),
    Case("a named pipe as training file", pipe, "is a pipe or a device, where a file is expected"),
    Case("a device as training file", lambda box: box.on(box.corpus(), "--data.train", "/dev/zero"), "is a pipe or a device, where a file is expected"),
    Case("a configuration of a file", lambda box: box.on(box.lines("all.jsonl", TRAIN), "--data.config=en"),
         "data.config 'en' names a part of a folder or hub corpus, but data.path ... is a file; leave data.config out"),
    Case("a configuration beside data.train alone", lambda box: box.train("--data.path=null", f"--data.train={box.lines('a.jsonl', TRAIN)}", "--data.config=en"),
         "data.config 'en' names a part of a folder or hub corpus, but data.path is not set; leave data.config out"),
    Case("a configuration that is not there", rows(TRAIN, "--data.config=en"), "has no configuration 'en' (data.config); it has none; leave data.config out"),
    Case("a shard that is missing", missing_shard, "1 of 2 shards train-*-of-00002 are there; number 0 is missing"),
    Case("a saved folder that leads out of itself", saved_outside, "leads out of its folder, to ..."),
    Case("a format that is not known", lambda box: box.on(box.corpus(), "--data.train", str(box.write("x.txt", "a"))), "format ... is not known; accepted: ..."),
    Case("a packed file (.gz)", lambda box: box.on(box.corpus(), "--data.train", str(box.write("x.jsonl.gz", "a"))), "format ... is not known; unpack it; accepted: ..."),
    Case("a packed file with the wrong ending", file("train.jsonl", b"\x1f\x8b\x08\0rest"), "byte ... is not UTF-8"),
    Case("a link out of the corpus folder", link_out, "is a link that leads out of its folder, to ..."),
    Case("a link inside of the corpus folder", link_inside, "the file is read", check=counts(4, ["x", "y"])),
    Case("a link to nowhere", link_nowhere, "no train split; expected a file such as ..."),
    Case("Python files and pickles in the corpus folder", code, "none of them is opened", check=counts(4, ["x", "y"])),
    Case("a password in a corpus's address", lambda box: box.train("--data.path", "https://me:pass4word@host/corpus.jsonl"),
         "data.path holds a password or token"),
]  # fmt: skip

ENCODINGS = [
    Case("an empty file", file("train.jsonl", ""), "has no rows"),
    Case("a file of empty lines", file("train.jsonl", "\n\n  \n"), "has no rows"),
    Case("a header without rows", file("train.csv", "before,after,label\n"), "has no rows"),
    Case("an empty dev split", lambda box: box.on(box.corpus(dev=[])), "dev.jsonl has no rows"),
    Case("Latin-1", file("train.csv", csv_lines().replace("a b", "caf\u00e9").encode("latin-1")), "byte ... is not UTF-8; save the file as UTF-8"),
    Case("UTF-16", file("train.csv", csv_lines().encode("utf-16")), "is not UTF-8; save the file as UTF-8 (it begins like UTF-16)"),
    Case("a byte-order mark", stats_of("train.csv", b"\xef\xbb\xbf" + csv_lines().encode()), "the mark is left out", check=counts(4, ["x", "y"])),
    Case("line ends of Windows", stats_of("train.csv", csv_lines(end="\r\n")), "as others", check=counts(4, ["x", "y"])),
    Case("NUL characters in a text", cell("before", "a\0b"), "column 'before': ...a NUL character"),
    Case("NUL bytes in a .csv file", file("train.csv", csv_lines().replace("a b", "a\0b")), "a NUL character"),
    Case("half of a surrogate pair", file("train.jsonl", '{"before": "\\ud800", "after": "b", "label": "x"}\n'), "half of a surrogate pair, which is not a character"),
    Case("right-to-left text and an override", text(ARABIC), "the text is kept as it is", check=survives(ARABIC)),
    Case("zero-width and combining characters, line separators", text(ZERO_WIDTH), "the text is kept as it is", check=survives(ZERO_WIDTH)),
    Case("a cell of 50 MB (.csv)", giant_cell, "cannot be read as csv, row ...: field larger than field limit", most_mib=200),
    Case("a text of 50 MB (.jsonl)", giant_text("jsonl", 50 * MILLION), "line ...: more than ... MiB in one line", most_mib=200),
    Case("a text of 50 MB (.json)", giant_text("json", 50 * MILLION), "a text of ... characters; accepted: at most ...", most_mib=200),
    Case("a text of 2 MB", giant_text("jsonl", 2 * MILLION), "a text of ... characters; accepted: at most ..."),
    Case("thousands of columns", thousands_of_columns, "only the columns of the recipe are kept", check=counts(400, ["x", "y"]), most_mib=100),
]  # fmt: skip

FORMATS = [
    Case("a JSON line that is cut", file("train.jsonl", '{"before": 1'), "line ...: not valid JSON (...)"),
    Case("a JSON line that is a list", file("train.jsonl", "[1, 2]\n"), "line ...: expected an object with columns, not ..."),
    Case("a JSON line of 100,000 brackets", file("train.jsonl", "[" * 100_000), "not valid JSON (nested too deeply)"),
    Case("a JSON number of 5,000 digits", file("train.jsonl", f'{{"before": {"1" * 5000}}}'), "not valid JSON (a number with thousands of digits)"),
    Case("a column twice in a JSON line", file("train.jsonl", '{"before": "a", "after": "b", "label": "x", "label": "y"}'),
         "the column ... appears ... times; rename all but one"),
    Case("a .json file that is cut", file("train.json", '[{"before": "a",\n "after": '), "line ...: not valid JSON (...)"),
    Case("a .json file without a list", file("train.json", '{"before": "a"}'), "expected a list of objects with columns"),
    Case("too few cells in a row", file("train.csv", csv_lines() + "a,b\n"), "row ...: does not have ... cells like the header"),
    Case("too many cells in a row", file("train.csv", csv_lines() + "a,b,x,y\n"), "row ...: does not have ... cells like the header"),
    Case("an open quote (.csv)", file("train.csv", csv_lines() + '"a,b,x\n'), "cannot be read as csv, row ...: unexpected end of data"),
    Case("a cell over two lines (.tsv)", file("train.tsv", 'before\tafter\tlabel\n"a\n\tb"\tc\tx\n'), "row ...: a cell runs past the end of its line"),
    Case("a column twice in a header", file("train.csv", "before,after,label,label\na,b,x,y\n"), "the column ... appears ... times"),
    Case("semicolons instead of commas", file("train.csv", csv_lines().replace(",", ";")), "no column 'before'... Columns: before;after;label"),
    Case("a column of another name", rows([{"old": "a", "after": "b", "label": "x"}]), "no column 'before'... Columns: old, after, label"),
    Case("a column with a similar name", rows(TRAIN, "--data.label=lable"), "no column 'lable'; did you mean 'label'?"),
    Case("a column that some rows lack", rows([*TRAIN, {"before": "a", "label": "x"}]), "row ...: no column ..., which other rows have"),
]  # fmt: skip

VALUES = [
    Case("a number where a text belongs", cell("before", 3), "column 'before': expected text, not the int 3"),
    Case("a list where a text belongs", cell("before", ["a"]), "column 'before': expected text, not the list ..."),
    Case("numbers and texts in one column of texts", cell("after", 1.5), "row 2, column 'after': expected text, not the float 1.5"),
    Case("numbers and texts as labels", mixed_labels, '1 and "1" are one label', check=counts(4, ["1", "2"])),
    Case("a label that is not a number (NaN)", file("train.jsonl", '{"before": "a", "after": "b", "label": NaN}\n'), "column 'label': nan is not a label"),
    Case("a label that is null", cell("label", None), "row 2, column 'label': None is not a label"),
    Case("a label that is a list", cell("label", ["x"]), "row 2, column 'label': ['x'] is not a label; an example has exactly one"),
    Case("a label that is a fraction", cell("label", 1.5), "column 'label': 1.5 is not a label; accepted: a text, a whole number"),
    Case("a weight below 0", weights([1, -1, 1, 1], "--data.weight=w"), "row 2, column 'w': -1 is not a weight; accepted: a number from 0 to 1,000,000"),
    Case("a weight that is not a number (NaN)", weights([1, 1, float("nan"), 1], "--data.weight=w"), "row 3, column 'w': nan is not a weight"),
    Case("weights that are all 0", weights([0, 0, 0, 0], "--data.weight=w"), "every weight in column 'w' (data.weight) is 0"),
    Case("a weight of a class that does not exist", rows(TRAIN, "--optim.class_weights={x: 2, z: 3}"), "optim.class_weights: 'z' is not a label; accepted: x, y"),
    Case("fewer weights than classes", rows(TRAIN, "--optim.class_weights=[2]"), "optim.class_weights has 1 weights for 2 labels; accepted: one for each of x, y"),
    Case("no column of weights", rows(TRAIN, "--data.weight=w"), "no column 'w'... Columns: before, after, label"),
    Case("an empty label", cell("label", "  "), "column 'label': '  ' is not a label: it has no visible characters"),
    Case("a label of zero-width characters", cell("label", "\u200b\u200d"), "is not a label: it has no visible characters"),
    Case("a label that would steer a terminal", cell("label", "\u001b[2Jx"), "is not a label: it holds control characters or line breaks"),
    Case("a label of 5,000 characters", cell("label", "x" * 5000), "is not a label: it has ... characters, and at most ... are accepted"),
    Case("labels that look alike", cell("label", "x\u200b"), "the labels ... look alike but are ..."),
    Case("a label with a blank at its end", cell("label", "y "), "the labels ... look alike but are ..."),
    Case("a million labels", million_labels, "is the ...th different label; accepted: at most ...", most_mib=50),
    Case("a million labels to cut into folds", million_folds, "is the ...th different label; accepted: at most ...", most_mib=50),
    Case("one label only", rows(TRAIN[:1] * 3), "only one label ...; at least 2 are needed"),
    Case("a label that the recipe does not know", rows(TRAIN, "--data.labels=[x, z]"), "unknown label 'y'; known: x, z"),
    Case("a label that stands in dev only", rows(TRAIN, dev=[DEV[0] | {"label": "w"}]), "occurs ... time(s) in ... but never in the training split"),
    Case("every label dropped", rows(TRAIN, "--data.drop_labels=[x, y]"), "no rows are left without the labels ..."),
    Case("the same id twice", rows([row | {"id": 7} for row in TRAIN]), "id ... in column ... appears twice"),
    Case("an id that is null", cell("id", None), "column 'id': None is an invalid id"),
    Case("a document that is null", documents([0, 1, None, 3], "--data.group=doc"), "column 'doc': None is an invalid document"),
    Case("more folds than documents", documents([1, 1, 1, 1], "--data.group=doc", "--data.fold=1/5"),
         "folds need at least as many documents, not ..."),
    Case("fewer examples than a batch", rows(TRAIN, "--optim.micro_batch_size=64"), "is larger than the training split of ..."),
    Case("fewer examples than micro-batches by tokens", rows(TRAIN, "--optim.micro_batch_tokens=256", "--optim.gradient_accumulation_steps=100"),
         "100 micro-batches per step are more than the ... examples of the training split"),
    Case("a single text without a token", rows([row | {"before": ""} for row in TRAIN], "--data.after=null"), "has no text: the model would see nothing at all"),
]  # fmt: skip

CASES = [*PLACES, *ENCODINGS, *FORMATS, *VALUES]
