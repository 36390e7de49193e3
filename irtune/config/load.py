"""Read a YAML file and dotted overrides into a `Config`, collecting every error before raising one."""

import difflib
import functools
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from irtune.config.checks import check_config
from irtune.config.deepspeed_json import read_engine_json
from irtune.config.keys import SECTIONS, declared_limit, declared_type, known_keys
from irtune.config.labels import canonical
from irtune.config.presets import fill_presets
from irtune.config.schema import Config
from irtune.config.template import read_template
from irtune.config.values import implausible
from irtune.config.yaml_file import parse_yaml, read_recipe
from irtune.errors import ConfigError, brief
from irtune.files import write_text
from irtune.redaction import redact, without_secrets

# Written by the launchers themselves; the rank comes from the environment, so the value is not used.
LAUNCHER_OPTIONS = ("--local_rank", "--local-rank")
SEARCH = "search"  # the section with the ranges of `irtune search`, which reads it itself


@functools.cache
def parser() -> jsonargparse.ArgumentParser:
    """The parser that knows every option with its type, default and help."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    built = jsonargparse.ArgumentParser(
        prog="train.py",
        exit_on_error=False,
        description="Fine-tune a language model layer by layer. "
        "Example: deepspeed --num_gpus 2 train.py --config launch/recipes/iterater-smollm2.yaml --optim.lr 1e-4",
    )
    built.add_argument("--config", type=str, help="YAML file with the sections below; other options override it.")
    for name, section in SECTIONS.items():
        built.add_class_arguments(section, name)
    for action in built._actions:
        limit = declared_limit(action.dest) if action.dest in known_keys() else None
        if limit is not None:
            action.help = f"{action.help} Accepted: {limit.words}."
    built.add_argument(
        "--deepspeed", type=str, default=Config.deepspeed, help="DeepSpeed JSON file with the engine's settings."
    )
    return built


def load_config(arguments: Sequence[str]) -> Config:
    """Build the configuration from command-line `arguments` (without the program's name).

    Raises:
        ConfigError: with all problems of the file, the overrides and their combination.
        SystemExit: for `--help`.
    """
    if "--help" in arguments or "-h" in arguments:
        parser().parse_args(["--help"])
    problems: list[str] = []
    file, overrides = _split_arguments(arguments, problems)
    values = _read_yaml(file, problems) if file is not None else {}
    checked = typed(values, f"{file}: ", problems, from_command_line=False)
    checked |= typed(overrides, "", problems, from_command_line=True)
    if checked.get("optim.warmup_fraction") is not None:
        checked = {"optim.warmup_steps": 0} | checked  # in place of the default; a number beside it is a contradiction
    if checked.get("data.template") is not None:
        checked["data.template"], unread = read_template(checked["data.template"])
        problems += unread
        if unread:
            del checked["data.template"]
    config = _instantiate(fill_presets(checked))
    problems += check_config(config)
    problems += read_engine_json(config, world_size=None)[1]
    if problems:
        raise ConfigError([redact(problem) for problem in problems])
    return config


def write_config(config: Config, path: Path) -> None:
    """Write the resolved `config` as YAML; `--config` reads it again.

    What looks like a password is left out, should a configuration that `load_config` has not seen hold one.
    """
    plain = {name: dict(vars(getattr(config, name))) for name in SECTIONS} | {"deepspeed": config.deepspeed}
    write_text(path, yaml.safe_dump(without_secrets(plain), sort_keys=False, allow_unicode=True))


def _split_arguments(arguments: Sequence[str], problems: list[str]) -> tuple[str | None, dict[str, str]]:
    """Take `--key value` and `--key=value` apart; returns the configuration file and the overrides as text."""
    overrides: dict[str, str] = {}
    file = None
    queue = list(arguments)
    while queue:
        token = queue.pop(0)
        if not token.startswith("--"):
            problems.append(f"unexpected argument {brief(token)}: options are written --section.key VALUE")
            continue
        key, equals, value = token.partition("=")
        if not equals:
            if not queue or (queue[0].startswith("--")):
                problems.append(f"option {key[:100]} needs a value")
                continue
            value = queue.pop(0)
        if key in LAUNCHER_OPTIONS:
            continue
        if key == "--config":
            file = value
        else:
            overrides[key.removeprefix("--")] = value
    return file, overrides


def _read_yaml(file: str, problems: list[str]) -> dict[str, Any]:
    """Read a YAML file into dotted keys."""
    content = read_recipe(file, problems)
    content = {} if content is None else content
    if not isinstance(content, dict):
        problems.append(f"{file!r} must hold sections ({', '.join(SECTIONS)}), not a {type(content).__name__}")
        return {}
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if name == SEARCH:
            continue
        if isinstance(name, str) and name in SECTIONS and isinstance(value, dict):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        elif name in SECTIONS and value is not None:
            problems.append(f"{file}: section {name!r} must hold keys and values, not {brief(value)}")
        elif name not in SECTIONS:
            flat[str(name)] = value
    return flat


def typed(values: dict[str, Any], where: str, problems: list[str], *, from_command_line: bool) -> dict[str, Any]:
    """The values of dotted keys by their declared types. Each is checked on its own, so that one bad value does not
    hide the next; what is wrong goes into `problems`, behind `where`.
    """
    good: dict[str, Any] = {}
    keys = known_keys()
    for key, value in values.items():
        if key not in keys:
            near = difflib.get_close_matches(key[:100], keys, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else f"; sections are {', '.join(SECTIONS)}"
            problems.append(f"{where}unknown option {brief(key)}{hint}")
            continue
        try:
            if from_command_line and not (_takes_lists(key) and value.startswith(("[", "{"))):
                parsed = _parser_of(key).parse_args([f"--value={value}"]).value
            else:
                value = parse_yaml(value) if from_command_line else value
                value = _labels_as_text(value) if key in ("data.labels", "data.drop_labels") else value
                if key == "optim.class_weights" and isinstance(value, dict):
                    value = _by_label(value)
                if value is None and type(None) not in typing.get_args(declared_type(key)):
                    raise TypeError("null")  # which jsonargparse takes for no value at all
                parsed = _parser_of(key).parse_object({"value": value}).value
        except Exception:  # jsonargparse raises several kinds for a value of the wrong type
            problems.append(f"{where}{key}: {_accepted(key)}, not {brief(value)}{_nearest(key, value)}")
            continue
        said = implausible(key, parsed)
        if said is not None:
            problems.append(where + said)
        if said is None or key == "data.path":  # a corpus was named, if not well
            good[key] = parsed
    return good


def _labels_as_text(value: Any) -> Any:
    """Labels that YAML reads as numbers are names all the same."""

    def text(item: Any) -> Any:
        return str(item) if isinstance(item, int) and not isinstance(item, bool) else item

    if isinstance(value, dict):
        return {text(key): text(item) for key, item in value.items()}
    return [text(item) for item in value] if isinstance(value, list) else value


def _by_label(weights: dict[Any, Any]) -> dict[str, Any]:
    """A map whose keys are labels that YAML may read as numbers or truth values.

    Raises:
        TypeError: for a key that cannot be a label, and two that are one.
    """
    if not all(isinstance(key, str | int | float) for key in weights):
        raise TypeError("not a label")
    named = {key if isinstance(key, str) else str(canonical(key)): value for key, value in weights.items()}
    if len(named) < len(weights):
        raise TypeError("two keys are one label")
    return named


@functools.cache
def _parser_of(key: str) -> jsonargparse.ArgumentParser:
    """A parser of one option's value; the whole `parser` takes fifty times as long for it."""
    built = jsonargparse.ArgumentParser(exit_on_error=False)
    built.add_argument("--value", type=declared_type(key))
    return built


def _takes_lists(key: str) -> bool:
    """Whether the value of an option may be a list or a map."""
    return any(kind in str(declared_type(key)) for kind in ("list", "dict"))


def _accepted(key: str) -> str:
    """What the option takes, in words, from its declared type."""
    declared = declared_type(key)
    text = getattr(declared, "__name__", None) if isinstance(declared, type) else str(declared)
    text = (text or str(declared)).replace("typing.Literal", "one of ").replace("NoneType", "null")
    text = text.removeprefix("typing.Union[").replace("], one of", "] or one of")
    return "takes " + text.replace("None", "null")


def _nearest(key: str, value: Any) -> str:
    """The choice of an option that `value` may have been meant for."""
    declared = declared_type(key)
    choices = [choice for choice in typing.get_args(declared) if isinstance(choice, str)]
    near = difflib.get_close_matches(str(value)[:100], choices, n=1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else ""


def _instantiate(flat: dict[str, Any]) -> Config:
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    rest: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, field = key.rpartition(".")
        (sections[section] if section else rest)[field] = value
    return Config(**{name: SECTIONS[name](**sections[name]) for name in SECTIONS}, **rest)
