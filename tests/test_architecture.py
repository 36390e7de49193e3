"""The rules of the house: who imports whom, how large files are, what stands at the top level."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick
ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "irtune").rglob("*.py"))
# Floors from the ground up; a room imports only from floors below its own.
FLOORS = [
    {
        "cache",
        "errors",
        "launcher",
        "kernels",
        "logs",
        "norms",
        "pictures",
        "recompute",
        "slow_imports",
        "update",
        "zero",
    },
    {"machine", "watch"},
    {"config", "runtime", "schedule"},
    {"quantization"},
    {"anatomy"},
    {
        "selection",
        "models",
        "data",
        "checkpoint",
        "tracking",
        "losses",
        "memory",
        "optimizer_state",
        "progress",
        "faults",
    },
    {"adapters", "shapes"},
    {"engine_state", "importance", "evaluation", "nodes", "signal_noise", "planner"},
    {"engine"},
    {"layer_choice", "diagnosis"},
    {"trainer", "prepare"},
    {"app"},
    {"compare", "inference"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
ONLY = {
    "deepspeed": {"engine", "zero"},
    "bitsandbytes": {"quantization", "slow_imports"},
    "tensorboard": {"tracking"},
    "matplotlib": {"compare", "pictures"},
}


def room(file: Path) -> str:
    return file.relative_to(ROOT / "irtune").parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_rooms_import_only_from_floors_below(file):
    mine = room(file)
    if mine == "__init__":
        return
    level = next(number for number, floor in enumerate(FLOORS) if mine in floor)
    below = set().union(*FLOORS[:level]) | {mine, "__version__"}
    used = {name.split(".")[1] for name in imports(file) if name.startswith("irtune.") and name.count(".") >= 1}
    assert used <= below, f"{mine} must not import {used - below}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_packages_have_their_room(file):
    found = imports(file)
    for package, rooms in ONLY.items():
        used = any(name.split(".")[0] == package or f".{package}" in name for name in found)
        assert not used or room(file) in rooms
    if room(file) == "selection":
        assert not any(name.startswith(("torch", "deepspeed")) for name in found)
    if room(file) != "launcher":
        assert "os.environ" not in file.read_text()


@pytest.mark.parametrize("file", [*FILES, ROOT / "train.py"], ids=lambda f: str(f.relative_to(ROOT)))
def test_sizes(file):
    text = file.read_text()
    assert text.count("\n") <= (80 if file.name == "train.py" else 450)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 80, f"{node.name} is too long"


def test_public_things_have_docstrings():
    for file in FILES:
        for outer in ast.walk(ast.parse(file.read_text())):
            if not isinstance(outer, ast.Module | ast.ClassDef):
                continue  # a function inside a function is nobody's interface
            for node in outer.body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    assert ast.get_docstring(node), f"{file}: {node.name}"


def test_the_top_level_is_what_was_asked_for():
    allowed = {"train.py", "ds_configs", "irtune", "launch", "tests", "requirements.txt", "README.md", "LICENSE",
               "pyproject.toml", ".ci", ".gitignore", "docs", "benchmarks", "CITATION.cff", "CHANGELOG.md",
               "CONTRIBUTING.md"}  # fmt: skip
    ignored = {".git", ".venv", "runs", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis", "__pycache__"}
    present = {path.name for path in ROOT.iterdir()} - ignored
    assert {"train.py", "ds_configs", "irtune", "launch", "tests", "requirements.txt", "README.md"} <= present
    assert present <= allowed
