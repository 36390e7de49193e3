"""The `search` section of a recipe: for dotted keys, what `irtune search` may set them to."""

import types
import typing
from dataclasses import dataclass
from typing import Any

from irtune.config.keys import declared_limit, declared_type, known_keys
from irtune.config.load import SEARCH, typed
from irtune.config.yaml_file import read_recipe
from irtune.errors import brief

ACCEPTED = "a list of values, {low: A, high: B}, with log: true for a logarithmic scale, or {subset: [...]}"
# What is measured, on which examples, and where it goes: trials that differ here could not be compared.
FIXED = (
    *(f"data.{name}" for name in (
        "preset", "path", "config", "train", "dev", "test", "label", "label_separator", "task", "multi_label", "group",
        "dev_fraction", "fold", "split_seed", "labels", "drop_labels",
    )),
    *(f"run.{name}" for name in ("output_dir", "seed", "best_metric", "evaluate_test", "resume")),
)  # fmt: skip


@dataclass(frozen=True)
class Choices:
    """One of several values, two at least."""

    values: list[Any]


@dataclass(frozen=True)
class Numbers:
    """Numbers from `low` to `high`, whole ones where both ends are `int`; with `log`, drawn by their logarithm."""

    low: int | float
    high: int | float
    log: bool


@dataclass(frozen=True)
class Subset:
    """Some of several values, each of which is there or not: a list, or a text with commas where `text` is set."""

    values: list[Any]
    text: bool


Space = dict[str, Choices | Numbers | Subset]


def read_space(file: str, problems: list[str]) -> Space:
    """The ranges of a recipe by dotted key; what is wrong with them goes into `problems`."""
    content = read_recipe(file, problems)
    section = content.get(SEARCH) if isinstance(content, dict) else None
    if not isinstance(section, dict) or not section:
        if not problems:
            problems.append(f"{file!r} has no section {SEARCH!r} with a range for at least one key: {ACCEPTED}")
        return {}
    space: Space = {}
    where = f"{file}: {SEARCH}: "
    for key, given in section.items():
        if key not in known_keys():
            typed({str(key): None}, where, problems, from_command_line=False)  # names the nearest
        elif key in FIXED:
            problems.append(f"{where}{key} cannot be searched: trials that differ in it cannot be compared")
        else:
            found = _range(key, given, where, problems)
            if found is not None:
                space[key] = found
    return space


def _range(key: str, given: Any, where: str, problems: list[str]) -> Choices | Numbers | Subset | None:
    if isinstance(given, list):
        values = _values(key, given, where, problems)
        if len(given) < 2 or any(value in given[:i] for i, value in enumerate(given)):
            problems.append(f"{where}{key} is {brief(given)}; accepted: two values or more, each once")
        return Choices(values)
    names = set(given) if isinstance(given, dict) else set()
    if names == {"subset"} and isinstance(given["subset"], list) and len(given["subset"]) >= 2:
        return _subset(key, given["subset"], where, problems)
    if {"low", "high"} <= names <= {"low", "high", "log"} and isinstance(given.get("log", False), bool):
        return _numbers(key, given, where, problems)
    problems.append(f"{where}{key} is {brief(given)}; accepted: {ACCEPTED}")
    return None


def _numbers(key: str, given: dict[str, Any], where: str, problems: list[str]) -> Numbers | None:
    kinds = _kinds(key)
    ends = _values(key, [given["low"], given["high"]], where, problems)
    if len(ends) < 2:
        return None
    if not {int, float} & kinds or not all(isinstance(end, int | float) for end in ends):
        problems.append(f"{where}{key} takes no range of numbers; accepted: a list of values, or {{subset: [...]}}")
        return None
    low, high = ends
    if not low < high or (given.get("log") and low <= 0):
        least = "0 < low < high" if given.get("log") else "low < high"
        problems.append(f"{where}{key} has low {low} and high {high}; accepted: {least}")
        return None
    whole = int in kinds and isinstance(low, int) and isinstance(high, int)
    log = given.get("log", False)
    return Numbers(low, high, log) if whole else Numbers(float(low), float(high), log)


def _subset(key: str, items: list[Any], where: str, problems: list[str]) -> Subset | None:
    """Of a key that takes a list, or a text that is a list."""
    text = key == "tuning.layers"
    if not text and list not in _kinds(key):
        problems.append(f"{where}{key} takes no subset: its value is not a list")
        return None
    values = items if text else [items]
    known = len(problems)
    checked = _values(key, [",".join(map(str, items))] if text else values, where, problems)
    return Subset(items if text else checked[0], text) if len(problems) == known else None


def _kinds(key: str) -> set[Any]:
    """The types that a key takes, without what is in a list or map."""
    kind = declared_type(key)
    parts = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return {typing.get_origin(part) or part for part in parts}


def _values(key: str, given: list[Any], where: str, problems: list[str]) -> list[Any]:
    """Those that the key takes by themselves."""
    good = []
    for value in given:
        parsed = typed({key: value}, where, problems, from_command_line=False)
        limit = declared_limit(key)
        if key in parsed and limit is not None and parsed[key] is not None and not limit.allows(parsed[key]):
            problems.append(where + limit.complaint(key, parsed[key]))
        elif key in parsed:
            good.append(parsed[key])
    return good
