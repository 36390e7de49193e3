"""The page of all options, made from the dataclasses, their checks and the presets, so that it says what they do.

python docs/make_configuration.py > docs/configuration.md
"""

import ast
import dataclasses
import itertools
import json
import re
import sys
import textwrap
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from irtune.config import schema  # noqa: E402
from irtune.config.checks import ADAPTER_TYPES, check_config  # noqa: E402
from irtune.config.deepspeed_json import KNOBS, RECIPE_ONLY  # noqa: E402
from irtune.config.load import SECTIONS  # noqa: E402
from irtune.config.presets import MODELS, PRESETS, fill_presets  # noqa: E402
from irtune.config.schema import Config  # noqa: E402

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
# Two choices that together fill in what neither does alone.
TOGETHER = ({"tuning.method": "lisa", "adapter.type": "none"},)
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
    cells = (f"`{key}`", _accepted(key, field), f"`{_plain(_default(field))}`", _escaped(_meanings(owner)[field.name]))
    return f"| {' | '.join(cells)} |"


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


def _accepted(key: str, field: dataclasses.Field) -> str:
    """Type and range of a key, in words."""
    if key == "adapter.type":  # one for each file in adapters/kinds, so no Literal
        return ", ".join(f"`{name}`" for name in ADAPTER_TYPES)
    kinds = get_args(field.type) if get_origin(field.type) in (Union, types.UnionType) else (field.type,)
    words = [_words(key, kind) for kind in kinds if kind is not types.NoneType]
    limits = _limits(key, kinds)
    if limits is not None and "number" in limits:  # says the type as well
        words, limits = [limits], None
    text = " or ".join(words) + (", or `null`" if types.NoneType in kinds else "")
    return _escaped(f"{text}; {limits}" if limits is not None else text)


def _words(key: str, kind: Any) -> str:
    if get_origin(kind) is Literal:
        values = {value: f"`{value}`" for value in get_args(kind)}
        refused = [value for value in values if _complaint(key, value) is not None]
        known = ", ".join(text for value, text in values.items() if value not in refused)
        return f"{known} (not yet: {', '.join(values[value] for value in refused)})" if refused else known
    if get_origin(kind) is list:
        return f"list of {PLURALS[get_args(kind)[0]]}"
    if get_origin(kind) is dict:
        return "map of texts to texts"
    return WORDS[kind]


def _limits(key: str, kinds: tuple[Any, ...]) -> str | None:
    """What the checks of the configuration say about a value that is out of any range, or None."""
    probes: dict[Any, Any] = {int: -1, float: -1.0, str: "?", list: [-1]}
    for kind in kinds:
        probe = probes.get(get_origin(kind) or kind)
        complaint = None if probe is None or kind == list[str] else _complaint(key, probe)
        if complaint is not None:
            return complaint
    return None


def _complaint(key: str, value: Any) -> str | None:
    """What is accepted instead of `value`, when the checks refuse it."""
    section, _, name = key.rpartition(".")
    if not section:
        return None
    config = dataclasses.replace(Config(), **{section: SECTIONS[section](**{name: value})})
    said = (re.match(rf"{re.escape(key)} is .*accepted[^:]*: (.+)$", problem) for problem in check_config(config))
    return next((match[1] for match in said if match), None)


def _presets() -> str:
    choices = [{key: name} for key, name in PRESETS] + [dict(choice) for choice in TOGETHER]
    rows = []
    for choice in choices:
        filled = {key: value for key, value in fill_presets(choice).items() if key not in choice}
        rows.append(f"| {_settings(choice)} | {_settings(filled)} |")
    models = [f"| `{name}` | {hub} |" for name, hub in MODELS.items()]
    return PRESET_TEXT + "\n".join(rows) + "\n" + MODEL_TEXT + "\n".join(models) + "\n"


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
