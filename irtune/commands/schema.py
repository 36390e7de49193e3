"""`python -m irtune schema`: the JSON schema of a recipe, by which editors complete and check keys."""

import json
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter

from irtune.commands.common import parser, show
from irtune.config.keys import SECTIONS, declared_limit, declared_type, known_keys, value_of
from irtune.config.limits import OneOf, Range
from irtune.config.load import SEARCH
from irtune.config.load import parser as trainer_options
from irtune.config.presets import MODELS
from irtune.config.schema import Config

LABELS = ("data.labels", "data.drop_labels")  # names that YAML may read as numbers or truth values


def main(arguments: Sequence[str]) -> int:
    """Print it."""
    parser(
        "schema",
        "The JSON schema of a recipe: types, ranges, defaults and help of every key. Editors with a YAML language "
        "server use it where a recipe begins with `# yaml-language-server: $schema=recipe.schema.json`.",
        "python -m irtune schema > recipe.schema.json",
    ).parse_args(list(arguments))
    show(json.dumps(recipe_schema(), indent=1))
    return 0


def recipe_schema() -> dict[str, Any]:
    """The schema, of JSON Schema draft 7, which YAML language servers read."""
    said = {action.dest: action.help for action in trainer_options()._actions}
    default = Config()
    properties: dict[str, Any] = {
        name: {"type": "object", "description": section.__doc__, "additionalProperties": False, "properties": {}}
        for name, section in SECTIONS.items()
    }
    for key in known_keys():
        section, _, name = key.rpartition(".")
        (properties[section]["properties"] if section else properties)[name] = {
            **_values(key), "description": " ".join(str(said[key]).split()), "default": value_of(default, key),
        }  # fmt: skip
    properties[SEARCH] = {
        "type": "object",
        "description": "Ranges of `irtune search` by dotted key: a list of values, {low: A, high: B, log: true} or "
        "{subset: [...]}.",
        "propertyNames": {"enum": known_keys()},
        "additionalProperties": {"type": ["array", "object"]},
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "irtune recipe",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _values(key: str) -> dict[str, Any]:
    """What a key takes."""
    limit = declared_limit(key)
    if isinstance(limit, OneOf):
        return {"enum": list(limit.names())}
    found = TypeAdapter(declared_type(key)).json_schema()
    if key in LABELS:
        found = json.loads(json.dumps(found).replace('"type": "string"', '"type": ["string", "number", "boolean"]'))
    if isinstance(limit, Range):
        for part in [part for part in found.get("anyOf", [found]) if part.get("type") in ("integer", "number")]:
            part["exclusiveMinimum" if limit.above else "minimum"] = limit.low
            if limit.high is not None:
                part["exclusiveMaximum" if limit.below else "maximum"] = limit.high
    if key == "model.name_or_path":
        found["examples"] = list(MODELS)
    return found
