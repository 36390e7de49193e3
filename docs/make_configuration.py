"""The page of all options, made from the dataclasses, the declarations and the presets, so that it says what they do.

python docs/make_configuration.py > docs/configuration.md
"""

import ast
import dataclasses
import itertools
import json
import sys
import textwrap
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from irtune.config import schema
from irtune.config.declarations import adapter_kinds, methods
from irtune.config.deepspeed_json import KNOBS, RECIPE_ONLY
from irtune.config.keys import SECTIONS, declared_limit, declared_type
from irtune.config.limits import OneOf, Range
from irtune.config.presets import MODELS, PRESETS, fill_presets
from irtune.config.schema import Config

INTRODUCTION = """\
# Configuration

This page is made from irtune/config by `python docs/make_configuration.py > docs/configuration.md`, and
tests/documents/test_docs.py compares the two. Change the dataclasses, then make it again.

A recipe is a YAML file with the sections below. Each key can also stand on the command line, where it wins:

    deepspeed --num_gpus 2 train.py --config launch/recipes/iterater-smollm2.yaml --data.path FOLDER --optim.lr 3e-4

| option | meaning |
|---|---|
| `--config FILE` | the recipe; without one, every key has its default |
| `--deepspeed FILE` | the engine's settings, see [below](#the-deepspeed-file); in a recipe, `deepspeed` at its top |
| `--section.key VALUE` | any key; lists and maps as in YAML, for example `--data.labels "[a, b]"`; `null` for nothing |
| `--help` | all keys with their defaults |

A section `search` of a recipe holds ranges for [`irtune search`](scarce-labels.md#searching-settings); training ignores
it.

A key that does not exist, a value of the wrong type, a number out of range and settings that contradict each other are
reported together, before anything is loaded. A run writes what it resolved to `config.yaml` in its folder, and
`--config` reads that file again.
"""
PRESET_TEXT = """\
## Presets

A preset fills in keys that neither the recipe nor the command line sets.

| set | fills in |
|---|---|
"""
MODEL_TEXT = """
`model.name_or_path` also takes these names:

| name | hub id |
|---|---|
"""
ENGINE_TEXT = """
## The DeepSpeed file

`deepspeed` names a JSON file with the engine's own knobs: ds_configs/zero0.json to zero3.json, and zero2_offload.json
and zero3_offload.json, which keep optimizer state (and, with ZeRO 3, weights) in host memory. Batch sizes, clipping and
precision come from the recipe. The file leaves them out or says `"auto"`; another value is an error that shows both.

{knobs}

These belong elsewhere and are refused:

| key | belongs to |
|---|---|
"""
WIDTH = 120
WORDS: dict[Any, str] = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}
PLURALS: dict[Any, str] = {str: "texts", int: "whole numbers", float: "numbers"}


def reference() -> str:
    """The whole page as Markdown."""
    parts = [INTRODUCTION, *(_section(name) for name in SECTIONS)]
    parts.append("\n".join(["## deepspeed", "", *_table([_row("", _field(Config, "deepspeed"))]), ""]))
    return "\n".join(parts) + "\n" + _presets() + _engine_file()


def _section(name: str) -> str:
    section = SECTIONS[name]
    rows = [_row(name, field) for field in dataclasses.fields(section)]
    return "\n".join([f"## {name}", "", str(section.__doc__), "", *_table(rows), ""])


def _table(rows: list[str]) -> list[str]:
    return ["| key | accepted | default | meaning |", "|---|---|---|---|", *rows]


def _field(section: Any, name: str) -> dataclasses.Field:
    return next(field for field in dataclasses.fields(section) if field.name == name)


def _row(section: str, field: dataclasses.Field) -> str:
    key = f"{section}.{field.name}" if section else field.name
    owner = SECTIONS[section] if section else Config
    meaning = _meanings(owner)[field.name] + _declared(key)
    cells = (f"`{key}`", _accepted(key), f"`{_plain(_default(field))}`", _escaped(meaning))
    return f"| {' | '.join(cells)} |"


def _declared(key: str) -> str:
    """What adapter types and methods say of themselves."""
    said = {
        "adapter.type": [f"{name}: {kind.summary}" for name, kind in adapter_kinds().items()],
        "tuning.method": [
            f"{name}: {method.summary}" + (f" (budget {method.budget})" if method.budget else "")
            for name, method in methods().items()
        ],
    }
    return f" {'; '.join(said[key])}." if key in said else ""


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    assert field.default_factory is not dataclasses.MISSING, f"{field.name} has no default"
    return field.default_factory()


def _meanings(section: type) -> dict[str, str]:
    """The text under each field of a dataclass of the schema."""
    tree = ast.parse(Path(schema.__file__).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == section.__name__)
    meanings = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            said = text.value.value if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) else ""
            meanings[field.target.id] = " ".join(str(said).split())
    return meanings


def _accepted(key: str) -> str:
    """Type and limit of a key, in words."""
    kind, limit = declared_type(key), declared_limit(key)
    if isinstance(limit, OneOf):
        return ", ".join(f"`{name}`" for name in limit.names())
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    words = " or ".join(_words(kind) for kind in kinds if kind is not types.NoneType)
    if isinstance(limit, Range):  # says the type as well
        words, limit = limit.words, None
    text = words + (", or `null`" if types.NoneType in kinds else "")
    return _escaped(f"{text}; {limit.words}" if limit is not None else text)


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is list:
        return f"list of {PLURALS[get_args(kind)[0]]}"
    if get_origin(kind) is dict:
        return "map of texts to texts"
    return WORDS[kind]


def _presets() -> str:
    rows = []
    for choice in _choices():
        filled = {key: value for key, value in fill_presets(choice).items() if key not in choice}
        rows.append(f"| {_settings(choice)} | {_settings(filled)} |")
    models = [f"| `{name}` | {hub} |" for name, hub in MODELS.items()]
    return PRESET_TEXT + "\n".join(rows) + "\n" + MODEL_TEXT + "\n".join(models) + "\n"


def _choices() -> list[dict[str, Any]]:
    """All settings, most of a single key, that fill in others."""
    declared = [
        *({"tuning.method": name} for name, method in methods().items() if method.fills),
        *(
            {"tuning.method": name, "adapter.type": kind}
            for name, method in methods().items()
            for kind in method.fills_with
        ),
        *({"adapter.type": name} for name, kind in adapter_kinds().items() if kind.fills),
    ]
    return [*({key: name} for key, name in PRESETS), *declared]


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"`{key}: {_plain(value)}`" for key, value in values.items())


def _engine_file() -> str:
    rows = [f"| `{key}` | {owner} |" for key, owner in RECIPE_ONLY.items()]
    knobs = f"At its top it may hold: {', '.join(f'`{key}`' for key in sorted(KNOBS))}."
    return ENGINE_TEXT.format(knobs=textwrap.fill(knobs, WIDTH)) + "\n".join(rows) + "\n"


def _plain(value: Any) -> str:
    """A value as YAML spells it."""
    return value if isinstance(value, str) else json.dumps(value)


def _escaped(text: str) -> str:
    """Text that neither ends a table's cell nor counts as HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.stdout.write(reference())
