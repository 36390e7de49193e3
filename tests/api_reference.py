"""The page of everything public in irtune, made from signatures and docstrings; nothing is imported.

python -m tests.api_reference > docs/api.md
"""

import ast
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "irtune"
LEFT_OUT = ("commands", "__main__")  # a command's interface is its --help
WIDTH = 120
KEPT = "\N{NO-BREAK SPACE}"
INTRODUCTION = """\
# API reference

This page is made by `python -m tests.api_reference > docs/api.md`; tests/test_docs.py compares the two. It has what is
public in irtune: each module, its classes with their methods, its functions. The commands are left out: they have
`--help`. Rooms, and who may import whom, are in [design.md](design.md); worked examples in
[extending.md](extending.md). Names may change until version 1.0; a run's files and the options of
[configuration.md](configuration.md) are what scripts should rely on.

"""


def reference() -> str:
    """The whole page as Markdown."""
    pages = {name: list(_module(file, name)) for file, name in _modules()}
    rooms = dict.fromkeys(".".join(name.split(".")[:2]) for name in pages)
    index = "Rooms: " + ", ".join(f"[{room.removeprefix('irtune.')}](#{room.replace('.', '')})" for room in rooms)
    parts = [textwrap.fill(index, WIDTH, break_long_words=False, break_on_hyphens=False)]
    return INTRODUCTION + "\n\n".join([*parts, *(part for page in pages.values() for part in page)]) + "\n"


def _modules() -> Iterator[tuple[Path, str]]:
    """Public modules, a package before what is in it."""
    files = sorted(PACKAGE.rglob("*.py"), key=lambda file: file.parent / ("" if _is_package(file) else file.stem))
    for file in files:
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        parts = parts[:-1] if _is_package(file) else parts
        if not parts or not any(part in LEFT_OUT or part.startswith("_") for part in parts):
            yield file, ".".join(["irtune", *parts])


def _is_package(file: Path) -> bool:
    return file.name == "__init__.py"


def _module(file: Path, name: str) -> Iterator[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    yield f"## {name}"
    yield _text(tree).split("\n\n")[0]
    passed_on = sorted(set(_exported(tree)) - {node.name for node in _public(tree.body)})
    if passed_on:
        yield textwrap.fill("From its modules: " + ", ".join(f"`{item}`" for item in passed_on), WIDTH)
    for node in _public(tree.body):
        yield from _class(node) if isinstance(node, ast.ClassDef) else _function(node)


def _exported(tree: ast.Module) -> list[str]:
    """The names in `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def _public(body: Iterable[ast.stmt]) -> list[ast.ClassDef | ast.FunctionDef]:
    kinds = (ast.ClassDef, ast.FunctionDef)
    return [node for node in body if isinstance(node, kinds) and not node.name.startswith("_")]


def _class(node: ast.ClassDef) -> Iterator[str]:
    bases = [ast.unparse(base) for base in node.bases]
    yield f"### class {node.name}" + (f"({', '.join(bases)})" if bases else "")
    annotated = [item for item in node.body if isinstance(item, ast.AnnAssign)]
    start = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
    fields = [text for text in map(ast.unparse, annotated) if not text.startswith("_")]
    if start is not None:
        yield _signature(node.name, start, method=True)
    elif fields:
        yield _code("\n".join(fields))
    yield _text(node)
    for method in _public(node.body):
        if isinstance(method, ast.FunctionDef):
            yield _signature(f"{node.name}.{method.name}", method, method=True)
            yield _text(method)


def _function(node: ast.FunctionDef) -> Iterator[str]:
    yield f"### {node.name}"
    yield _signature(node.name, node, method=False)
    yield _text(node)


def _signature(name: str, node: ast.FunctionDef, *, method: bool) -> str:
    """Decorators, name, arguments with their defaults as the source has them, and what comes back."""
    decorators = [ast.unparse(item) for item in node.decorator_list]
    bound = method and "staticmethod" not in decorators
    arguments = ast.unparse(node.args).split(", ", 1)[1:] if bound else [ast.unparse(node.args)]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    line = f"{name}({''.join(arguments)}){returns}"
    wrapped = textwrap.wrap(_unbroken(line), WIDTH, subsequent_indent=" " * 4, break_on_hyphens=False)
    return _code("\n".join([*(f"@{item}" for item in decorators), *wrapped]).replace(KEPT, " "))


def _unbroken(line: str) -> str:
    """A signature with spaces only between arguments: `KEPT` stands for all others."""
    depth, characters = 0, []
    for before, character in zip(" " + line, line):
        depth += (character in "([{") - (character in ")]}")
        characters.append(KEPT if character == " " and (depth != 1 or before != ",") else character)
    return "".join(characters)


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _text(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    """The docstring, its lists of arguments as lists; what would be markup outside of backticks is escaped."""
    said = re.sub(r"^    (?=\S)", "- ", ast.get_docstring(node) or "", flags=re.MULTILINE)
    parts = re.split(r"(`[^`\n]*`)", re.sub(r"^        (?=\S)", "  ", said, flags=re.MULTILINE))
    return "".join(part if part.startswith("`") else re.sub(r"([*<]|__)", r"\\\1", part) for part in parts)


if __name__ == "__main__":
    sys.stdout.write(reference())
