"""Loaders and configuration under whatever hypothesis thinks of: a clear error or the right result, never a crash.

IRTUNE_FUZZ_EXAMPLES=5000 python -m pytest tests/data/test_fuzz.py     a long run, with new examples each time
"""

import csv
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from irtune.config import DataConfig, load_config, write_config
from irtune.config.keys import declared_type, known_keys
from irtune.config.labels import canonical
from irtune.data import read_corpus, read_table
from irtune.data.readers.cells import as_label, as_name, as_text, check_looks
from irtune.errors import ConfigError, DataError
from irtune.redaction import redact

pytestmark = pytest.mark.quick
LENGTH = os.environ.get("IRTUNE_FUZZ_EXAMPLES")
FUZZ = settings(
    max_examples=int(LENGTH or 25),
    derandomize=LENGTH is None,  # the suite tries the same examples each time
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
COLUMNS = ("before", "after", "label")
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xlsx")


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def attempt(function: Callable[[], Any], kind: type[Exception]) -> tuple[Any, Any]:
    """The result, or the error of the one `kind` that may come."""
    try:
        return function(), None
    except kind as error:
        return None, error


# ----- corpora -----

Texts = tuple[str, str, str]


def encode(rows: list[Texts], suffix: str) -> bytes:
    """Rows as a file of this format."""
    if suffix in (".jsonl", ".json"):
        lines = [json.dumps(dict(zip(COLUMNS, row)), ensure_ascii=len(row[0]) % 2 == 0) for row in rows]
        return ("\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]").encode()
    if suffix in (".csv", ".tsv"):
        text = io.StringIO(newline="")
        csv.writer(text, delimiter="," if suffix == ".csv" else "\t").writerows([COLUMNS, *rows])
        return text.getvalue().encode()
    out = io.BytesIO()
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(dict(zip(COLUMNS, map(list, zip(*rows))))), out)
    else:
        book = openpyxl.Workbook()
        for row in [COLUMNS, *rows]:
            book.active.append(row)
        book.save(out)
    return out.getvalue()


def texts(suffix: str) -> st.SearchStrategy[str]:
    """What a format can hold: any character but half ones; XML has no control characters, TSV no line ends."""
    kinds = ["Cs", "Cc"] if suffix in (".xlsx", ".tsv") else ["Cs"]
    characters = st.characters(exclude_categories=kinds, exclude_characters="\0\uffff\ufffe")
    # What openpyxl would write as a formula, an error value or an escape is not a text to begin with.
    plain = st.text(characters, max_size=30).filter(
        lambda text: suffix != ".xlsx" or not (text.startswith(("=", "#")) or "_x" in text)
    )
    return plain.map(lambda text: text.lstrip("\ufeff"))


@pytest.mark.parametrize("suffix", SUFFIXES)
@FUZZ
@given(data=st.data())
def test_any_text_survives_every_format(suffix, data):
    row = st.tuples(texts(suffix), texts(suffix), st.sampled_from(["x", "y"]))
    rows = data.draw(st.lists(row, min_size=1, max_size=6))
    with folder() as place:
        (place / f"t{suffix}").write_bytes(encode(rows, suffix))
        found = read_table(place / f"t{suffix}")
    assert [tuple(row[name] or "" for name in COLUMNS) for _, row in found] == rows


GOOD = [("a b", "a c", "x"), ("c", "", "y"), ("", "d", "x"), ("caf\u00e9", "e", "y")]
FILES = {suffix: encode(GOOD, suffix) for suffix in SUFFIXES}


@st.composite
def damaged(draw: Any, suffix: str) -> bytes:
    """A good file with some bytes replaced, left out, put in, or cut off; or no such file at all."""
    content = FILES[suffix]
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + draw(st.sampled_from([0, 1, 8, 10**6])))))
        content = content[:start] + draw(st.binary(max_size=8)) + content[end:]
    return draw(st.sampled_from([content, content[: len(content) // 2]]) | st.binary(max_size=200))


@pytest.mark.parametrize("suffix", SUFFIXES)
@FUZZ
@given(data=st.data())
def test_damaged_files_give_an_error_or_rows(suffix, data):
    content = data.draw(damaged(suffix))
    with folder() as place:
        (place / f"train{suffix}").write_bytes(content)
        (place / "dev.jsonl").write_bytes(FILES[".jsonl"])
        corpus, error = attempt(lambda: read_corpus(DataConfig(path=str(place))), DataError)
        if error is not None:
            assert 10 < len(str(error)) < 3_000
        else:
            assert len(corpus.labels) >= 2 and corpus.splits["train"]
        assert {path.name for path in place.iterdir()} == {f"train{suffix}", "dev.jsonl"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(st.lists(st.dictionaries(st.sampled_from([*COLUMNS, "id", "doc"]) | st.text(max_size=4), JSON), max_size=5))
def test_cells_of_any_kind_give_an_error_or_rows(rows):
    with folder() as place:
        (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (place / "dev.jsonl").write_bytes(FILES[".jsonl"])
        corpus, error = attempt(lambda: read_corpus(DataConfig(path=str(place), group="doc")), DataError)
        if error is not None:
            assert str(place) in str(error)
        else:
            assert all(type(e.before) is str and type(e.group) is str for e in corpus.splits["train"])


@FUZZ
@given(st.text(max_size=20) | JSON)
def test_a_label_can_be_seen_shown_and_stored(value):
    try:
        name = as_label(value, "here")
    except DataError:
        return
    assert name in (str(value), str(canonical(value))) and name.strip() and len(name.splitlines()) == 1  # "0." is "0"
    assert json.loads(json.dumps(name, ensure_ascii=False).encode()) == name
    with pytest.raises(DataError, match="look alike"):
        check_looks([name, f"{name}\u200b"], "here")


@FUZZ
@given(st.text(st.characters(), max_size=20) | JSON)
def test_texts_and_ids_can_be_stored(value):
    for check in (as_text, lambda v, where: as_name(v, where, "id", "data.id")):
        try:
            text = check(value, "here")
        except DataError:
            continue
        assert text.encode().decode() == text and "\0" not in text


# ----- configuration -----


def values(key: str) -> st.SearchStrategy[Any]:
    """Good and bad values of an option."""
    choices = [choice for choice in get_args(declared_type(key)) if isinstance(choice, str)]
    numbers = st.integers(-2, 20) | st.floats(0, 1) | st.integers() | st.floats()
    return st.sampled_from(choices or ["x"]) | numbers | st.booleans() | st.none() | st.text(max_size=6) | JSON


KEYS = [key for key in known_keys() if key != "deepspeed"]
OVERRIDES = st.lists(st.sampled_from(KEYS), max_size=6, unique=True).flatmap(
    lambda keys: st.fixed_dictionaries({key: values(key) for key in keys})
)


def check_load(arguments: list[str], place: Path) -> None:
    """A valid configuration survives writing and reading; an invalid one names what is wrong."""
    config, error = attempt(lambda: load_config(arguments), ConfigError)
    if error is not None:
        assert error.problems and all(10 < len(problem) < 3_000 for problem in error.problems)
        return
    write_config(config, place / "written.yaml")
    assert load_config(["--config", str(place / "written.yaml")]) == config


@FUZZ
@given(OVERRIDES)
def test_random_recipes(chosen):
    sections: dict[str, dict[str, Any]] = {"data": {"path": "x"}}
    for key, value in chosen.items():
        section, _, field = key.rpartition(".")
        sections.setdefault(section, {})[field] = value
    with folder() as place:
        (place / "recipe.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
        check_load(["--config", str(place / "recipe.yaml")], place)


@FUZZ
@given(OVERRIDES)
def test_random_options(chosen):
    with folder() as place:
        texts = (f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in chosen.items())
        check_load(["--data.path=x", *texts], place)


@FUZZ
@given(
    st.binary(max_size=300)
    | st.text(alphabet="abc:-[]{}&*!|>%@\n\t '\"<#?,.0123456789~=", max_size=200).map(str.encode)
)
def test_random_bytes_as_recipe(content):
    with folder() as place:
        (place / "recipe.yaml").write_bytes(content)
        check_load(["--data.path=x", "--config", str(place / "recipe.yaml")], place)


@FUZZ
@given(
    JSON | st.dictionaries(st.sampled_from(["zero_optimization", "bf16", "gradient_clipping", "steps_per_print"]), JSON)
)
def test_random_engine_files(content):
    with folder() as place:
        (place / "engine.json").write_text(json.dumps(content))
        check_load(["--data.path=x", "--deepspeed", str(place / "engine.json")], place)


@pytest.mark.parametrize("key", known_keys())
def test_null_is_refused_where_it_is_no_value(key):
    section, _, field = key.rpartition(".")
    with folder() as place:
        recipe = place / "recipe.yaml"
        recipe.write_text(f"{section}: {{{field}: null}}\n" if section else f"{field}: null\n")
        _, error = attempt(lambda: load_config(["--config", str(recipe), "--data.path=x"]), ConfigError)
    assert (type(None) in get_args(declared_type(key))) == (error is None)
    assert error is None or f"{key}: takes" in str(error)


WRONG = {
    "optim.lr": "fast",
    "optim.micro_batch_size": 0,
    "run.seed": -1,
    "tuning.method": "irr",
    "tuning.ema": 2.0,
    "model.dtype": ["float32"],
    "data.max_length": 3,
    "adapter.type": "lorra",
    "run.output_dir": "a\0b",
    "run.timeout_seconds": 10**12,
    "data.label": 7,
}


@FUZZ
@given(st.sets(st.sampled_from(sorted(WRONG)), min_size=1))
def test_all_mistakes_are_named_at_once(keys):
    sections: dict[str, dict[str, Any]] = {"data": {"path": "x"}}
    for key in keys:
        section, _, field = key.rpartition(".")
        sections.setdefault(section, {})[field] = WRONG[key]
    with folder() as place:
        (place / "recipe.yaml").write_text(yaml.safe_dump(sections))
        with pytest.raises(ConfigError) as caught:
            load_config(["--config", str(place / "recipe.yaml")])
    assert len(caught.value.problems) == len(keys)
    assert all(any(key in problem for problem in caught.value.problems) for key in keys)


WORD = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="/:@?#&'\"="), min_size=1, max_size=20
)


@FUZZ
@given(WORD, WORD.map(lambda word: f"s3cret{word}"))
def test_no_password_is_shown_or_saved(user, password):
    address = f"https://{user}:{password}@host/model"
    assert password not in redact(f"cannot reach {address}, sorry")
    assert password not in redact(f"https://host/x?a=1&token={password}#end")
    with pytest.raises(ConfigError) as caught:
        load_config(["--data.path=x", f"--model.name_or_path={address}"])
    assert password not in str(caught.value) and "holds a password" in str(caught.value)
