"""Adapter types and methods say what they are in one file, and nobody else knows their names."""

import ast
import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from irtune.config import Config, TuningConfig
from irtune.config.checks import check_config
from irtune.config.declarations import (
    AdapterKind,
    Method,
    adapter_kinds,
    implementation,
    methods,
    read_declarations,
)
from irtune.config.keys import declared_limit, declared_type, known_keys, value_of
from irtune.config.limits import Range
from irtune.errors import ConfigError
from irtune.selection import build_chooser
from tests.support import ROOT

pytestmark = pytest.mark.quick
DECLARED = [*adapter_kinds().values(), *methods().values()]
OWN_ROOMS = ("adapters", "selection")
NAMES = {declaration.name for declaration in DECLARED}


@pytest.mark.parametrize("read", DECLARED, ids=lambda found: f"{type(found).__name__}-{found.name}")
def test_what_is_read_is_what_is_imported(read):
    imported = implementation(read)
    assert imported == read
    for item in dataclasses.fields(read):
        if item.metadata:  # a function: what was read only knows that there is one
            assert callable(getattr(imported, item.name)) == callable(getattr(read, item.name)), item.name
    assert (imported.build if isinstance(imported, AdapterKind) else imported.from_config) is not None


def test_every_declaration_of_a_file_is_read():
    for read in DECLARED:
        values = vars(importlib.import_module(read.module)).values()
        assert {value.name for value in values if type(value) is type(read)} == {
            other.name for other in DECLARED if other.module == read.module and type(other) is type(read)
        }


def test_declarations_name_keys_that_exist():
    for declaration in DECLARED:
        refused = [key for values, _ in declaration.refuses for key in values]
        together = [key for values in getattr(declaration, "fills_with", {}).values() for key in values]
        assert {*declaration.fills, *declaration.keys, *declaration.needs, *refused, *together} <= set(known_keys())
        assert getattr(declaration, "shapes_of", "") in {"", *adapter_kinds()}


@pytest.mark.parametrize("name", methods())
def test_choosers_do_what_their_method_declares(name):
    method = methods()[name]
    tuning = TuningConfig(method=name, layers="0-2" if method.names_layers else None)
    chooser = build_chooser(tuning, 6, 0)
    assert (chooser.interval > 0) == method.repeats
    assert any(chooser.trials(step) for step in range(1, 50)) == method.suppresses


def _mentions(node: ast.AST) -> bool:
    """Whether an expression reads adapter.type or tuning.method."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and part.attr in ("type", "method"):
            owner = part.value.attr if isinstance(part.value, ast.Attribute) else getattr(part.value, "id", "")
            if (owner, part.attr) in (("adapter", "type"), ("tuning", "method")):
                return True
        if isinstance(part, ast.Constant) and part.value in ("adapter.type", "tuning.method"):
            return True
    return False


def _comparisons(tree: ast.AST) -> list[tuple[ast.AST, list[ast.AST]]]:
    found: list[tuple[ast.AST, list[ast.AST]]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            found.append((node, [node.left, *node.comparators]))
        elif isinstance(node, ast.Match):
            found.append((node, [node.subject, *node.cases]))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("startswith", "endswith"):
                found.append((node, [node.func.value, *node.args]))
        elif isinstance(node, ast.Subscript):
            found.append((node, [node.slice, node.value]))
    return found


def names_compared(code: str) -> list[int]:
    """Lines that compare adapter.type or tuning.method with a text, or look it up in a table of names."""
    lines = []
    for node, parts in _comparisons(ast.parse(code)):
        texts = [
            item.value
            for part in parts
            for item in ast.walk(part)
            if isinstance(item, ast.Constant) and isinstance(item.value, str)
        ]
        if any(map(_mentions, parts)) and set(texts) - {"adapter.type", "tuning.method"}:
            lines.append(node.lineno)
    return lines


def lists_of_names(code: str) -> list[int]:
    """Lines with a list, set, tuple or table of three or more names of types or methods."""
    lines = []
    for node in ast.walk(ast.parse(code)):
        items = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
        if len(NAMES & {item.value for item in items if isinstance(item, ast.Constant)}) >= 2:
            lines.append(node.lineno)
    return lines


def test_nobody_else_compares_a_type_or_method_with_a_name():
    for file in sorted((ROOT / "irtune").rglob("*.py")):
        if file.relative_to(ROOT / "irtune").parts[0] in OWN_ROOMS:
            continue
        code = file.read_text(encoding="utf-8")
        assert not names_compared(code), f"{file}: ask the declaration in lines {names_compared(code)}"
        assert not lists_of_names(code), f"{file}: names in lines {lists_of_names(code)} belong to declarations"


@pytest.mark.parametrize(
    "code",
    ['config.adapter.type == "lora"', 'tuning.method in ("topk", "grass")', 'adapter.type.startswith("ltuning")',
     'filled.get("tuning.method") == "lisa"', '{"ir": 1}[tuning.method]', 'if "none" != config.adapter.type: pass'],
)  # fmt: skip
def test_a_comparison_would_be_found(code):
    assert names_compared(code) == [1]


def test_a_list_of_names_would_be_found():
    assert lists_of_names('OWN = ("none", "bitfit", "spafit")') == [1]
    assert lists_of_names('BUDGETS = {"rst": 0.125, "ist": 0.25}') == [1]


# ----- files that are not right -----

BROKEN = {
    "nothing": ("x = 1\n", "declares nothing: it must have NAME = AdapterKind"),
    "a syntax error": ("x = (\n", "cannot be read"),
    "an unknown keyword": ('K = AdapterKind(name="x", summary="y", colour=3)', "line 1: AdapterKind has no colour"),
    "no literal": ('K = AdapterKind(name="x", summary="y", below=not True)', "line 1: below must be a literal"),
    "no name": ('K = AdapterKind(summary="y")', "AdapterKind needs name=TEXT and summary=TEXT"),
    "no keywords": ('K = AdapterKind("x", "y")', "AdapterKind needs name=TEXT and summary=TEXT"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_declaration_that_cannot_be_read_names_the_line(tmp_path, case):
    content, message = BROKEN[case]
    file = tmp_path / "kind.py"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"kind\.py") as raised:
        read_declarations(file, "kind", AdapterKind)
    assert message in str(raised.value)


def test_a_file_is_not_run(tmp_path):
    file = tmp_path / "method.py"
    file.write_text('raise SystemExit\nM: Method = Method(name="x", summary="y", from_config=unknown, budget=0.5)\n')
    (read,) = read_declarations(file, "method", Method)
    assert (read.name, read.budget, read.module) == ("x", 0.5, "method")
    with pytest.raises(AssertionError, match="read only"):
        read.from_config(None, None)


def install(folder: Path, module: str, content: str | None, group: str = "irtune.methods") -> None:
    """Make `folder` a place of sys.path in which a package with one entry point is installed."""
    about = folder / f"{module}-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text(f"[{group}]\n{module} = {module}\n")
    if content is not None:
        (folder / f"{module}.py").write_text(content)


def loaded(folder: Path, *options: str) -> subprocess.CompletedProcess:
    code = (
        "import sys; from irtune.config import load_config; c = load_config(sys.argv[1:]); "
        "print(c.tuning.method, 'torch' in sys.modules, 'added' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "--data.path=x", *options]
    environment = {"PYTHONPATH": f"{folder}:{ROOT}", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_entry_points_are_found_without_an_import(tmp_path):
    install(tmp_path, "added", 'import torch\nM = Method(name="added", summary="new")\n')
    assert loaded(tmp_path, "--tuning.method=added").stdout.split() == ["added", "False", "False"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "the entry point added = added of group irtune.methods names no module with a source file"),
     ('M = Method(name="ir", summary="again")\n', "both declare the Method 'ir'")],
)  # fmt: skip
def test_entry_points_that_are_not_right(tmp_path, content, message):
    install(tmp_path, "added", content)
    done = loaded(tmp_path)
    assert done.returncode != 0 and message in done.stderr


# ----- limits -----


def test_ranges_fit_their_types_and_defaults():
    for key in known_keys():
        limit, default = declared_limit(key), value_of(Config(), key)
        assert limit is None or default is None or limit.allows(default), key
        if isinstance(limit, Range):
            kinds = set(get_args(declared_type(key)) or [declared_type(key)]) - {type(None)}
            assert kinds == {type(limit.low)}, f"{key}: {limit} of {kinds}"


@pytest.mark.parametrize(
    ("limit", "words", "good", "bad"),
    [(Range(1), "a whole number of at least 1", [1, 10**9], [0, -1]),
     (Range(1, 8), "a whole number from 1 to 8", [1, 8], [0, 9]),
     (Range(0, 2**31 - 1), "a whole number from 0 to 2147483647", [0, 2**31 - 1], [-1, 2**31]),
     (Range(0.0, above=True), "a number above 0", [1e-9, 5.0], [0.0, -1.0, float("inf"), float("nan")]),
     (Range(0.0), "a number of at least 0", [0.0], [-1e-9, float("nan"), float("inf")]),
     (Range(0.0, 1.0, below=True), "a number from 0 to below 1", [0.0, 0.99], [1.0, -0.1]),
     (Range(0.0, 0.5, above=True), "a number above 0, at most 0.5", [0.5], [0.0, 0.51]),
     (Range(0.0, 1.0, above=True, below=True), "a number between 0 and 1", [0.5], [0.0, 1.0])],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_ranges_say_what_they_accept(limit, words, good, bad):
    assert limit.words == words
    assert all(map(limit.allows, good)) and not any(map(limit.allows, bad))
    assert limit.complaint("a.key", bad[0]) == f"a.key is {bad[0]!r}; accepted: {words}"


def test_every_limit_is_checked():
    wrong = {"adapter.r": 0, "run.seed": -1, "optim.betas": [0.9], "data.fold": "3/2", "model.name_or_path": " "}
    config = Config()
    for key, value in wrong.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    found = check_config(config)
    for key, value in wrong.items():
        assert declared_limit(key).complaint(key, value) in found
