"""The rules of the house: who imports whom, how large files are, what stands at the top level."""

import ast
from pathlib import Path

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.quick
PACKAGE = ROOT / "irtune"
FILES = sorted(PACKAGE.rglob("*.py"))
# Rooms from the ground up. A room imports only from rooms below its own, from itself, and from the package's top.
FLOORS = (
    "redaction",
    "errors",
    "files",
    "config",
    "tasks",
    "tracking",
    "data",
    "distributed",
    "console",
    "models",
    "adapters",
    "evaluation",
    "selection",
    "engine",
    "memory",
    "commands",
    "train",
    "cli",
    "__main__",
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms.split()}
# Packages that only these rooms or files may import.
ONLY = {
    "deepspeed": ("engine/", "distributed/partitioned.py"),
    "bitsandbytes": ("models/quantization.py",),
    "tensorboard": ("tracking/",),
    "torch.utils.tensorboard": ("tracking/",),
    "matplotlib": ("tracking/", "commands/compare/", "commands/search/"),
}
TORCH_FREE = ("config/", "selection/methods/", "selection/split.py", "selection/chooser.py", "selection/registry.py",
              "selection/__init__.py", "errors.py", "redaction.py", "distributed/environment.py",
              "distributed/network.py")  # fmt: skip


def place(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def room(name: str) -> str:
    return name.split(".")[1]


def module(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(file): file for file in FILES}


def imports(file: Path) -> set[str]:
    """Full names of what a file imports, inside functions too, except for the type checker only."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def imported_modules(file: Path) -> set[str]:
    """Modules of irtune that `file` imports; a package counts where a name of its own is asked for."""
    found = imports(file)
    return {name for name in found if name in MODULES and name != "irtune"} - {
        package for package in found if package in MODULES and MODULES[package].name == "__init__.py"
        and all(f"{package}.{name}" in MODULES for name in _names(file, package))
    }  # fmt: skip


def _names(file: Path, package: str) -> list[str]:
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return [alias.name for node in nodes if isinstance(node, ast.ImportFrom) and node.module == package
            for alias in node.names]  # fmt: skip


def test_every_room_has_a_floor():
    assert {room(name) for name in MODULES if name != "irtune"} <= set(LEVEL), "say on which floor the new room is"


@pytest.mark.parametrize("level", range(len(FLOORS)), ids=FLOORS)
def test_a_room_imports_only_from_floors_below(level):
    for name, file in MODULES.items():
        if name == "irtune" or LEVEL[room(name)] != level:
            continue
        used = {room(other) for other in imports(file) if other.startswith("irtune.") and room(other) in LEVEL}
        higher = {other for other in used if other != room(name) and LEVEL[other] >= level}
        assert not higher, f"{place(file)} must not import from {higher}"


def test_no_import_leads_back():
    graph = {name: imported_modules(file) - {name} for name, file in MODULES.items()}
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                walk(other, (*path, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_packages_have_their_room():
    for file in FILES:
        found = imports(file)
        for package, places in ONLY.items():
            used = any(name == package or name.startswith(f"{package}.") for name in found)
            assert not used or place(file).startswith(places), f"{place(file)} must not import {package}"
        if place(file).startswith("selection/"):
            assert not any(name.startswith(("torch.distributed", "deepspeed")) for name in found), place(file)
        if place(file).startswith(TORCH_FREE):
            assert not any(name.split(".")[0] == "torch" for name in found), f"{place(file)} must not import torch"
        if place(file) != "distributed/environment.py":
            assert "os.environ" not in file.read_text(encoding="utf-8"), place(file)


@pytest.mark.parametrize("file", [*FILES, ROOT / "train.py"], ids=lambda f: str(f.relative_to(ROOT)))
def test_sizes(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= (80 if file.name == "train.py" else 400)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 80, f"{node.name} is too long"


def test_public_things_have_docstrings():
    for file in FILES:
        for outer in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(outer, ast.Module | ast.ClassDef):
                continue  # a function inside a function is nobody's interface
            for node in outer.body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    assert ast.get_docstring(node), f"{file}: {node.name}"


def test_the_top_level_is_what_was_asked_for():
    allowed = {"train.py", "ds_configs", "irtune", "launch", "tests", "requirements.txt", "README.md", "LICENSE",
               "pyproject.toml", ".ci", ".gitignore", "docs", "benchmarks", "CITATION.cff", "CHANGELOG.md",
               "CONTRIBUTING.md"}  # fmt: skip
    ignored = {".git", ".venv", "runs", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis", "__pycache__",
               ".gpu", "build", "dist"}  # fmt: skip
    present = {path.name for path in ROOT.iterdir()} - ignored
    assert {"train.py", "ds_configs", "irtune", "launch", "tests", "requirements.txt", "README.md"} <= present
    assert present <= allowed
