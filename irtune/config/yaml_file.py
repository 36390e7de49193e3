"""Read a recipe (YAML) that may be damaged or hostile: no tag builds an object, no alias grows without bound."""

from pathlib import Path
from typing import Any

import yaml

from irtune.config.packaged import find_packaged
from irtune.errors import one_line
from irtune.files import read_text

MAX_BYTES = 2**18  # recipes have some 2,000; PyYAML reads about 100,000 a second
MAX_VALUES = 20_000  # with every alias written out; a long text counts as one for each 256 characters


def read_recipe(file: str, problems: list[str]) -> Any:
    """The content of a YAML file, or of the recipe of irtune's that `file` means, in plain types.

    {} and a sentence in `problems` when it cannot be used.
    """
    try:
        path = Path(file).expanduser()
        text = read_text(path if path.exists() else find_packaged("recipes", file) or path, MAX_BYTES)
    except UnicodeDecodeError as error:
        problems.append(f"{file!r} is not valid YAML: byte {error.start} is not UTF-8; save the file as UTF-8")
    except OSError as error:
        problems.append(f"cannot read the configuration file {file[:200]!r}: {error.strerror}")
    except (RuntimeError, ValueError) as error:  # the home of a user that does not exist; a NUL in a name
        problems.append(f"cannot read the configuration file {file[:200]!r}: {error}")
    else:
        try:
            return parse_yaml(text)
        except (yaml.YAMLError, ValueError) as error:
            problems.append(f"{file!r} is not valid YAML: {one_line(error)}")
        except RecursionError:
            problems.append(f"{file!r} is not valid YAML: its lists are nested too deeply")
    return {}


def parse_yaml(text: str) -> Any:
    """Plain values of one YAML document; None for an empty one.

    Raises:
        yaml.YAMLError: for a text that is not YAML, or has tags that would build objects.
        ValueError: for a key that appears twice, an alias that leads back to itself or grows beyond `MAX_VALUES`, and
            dates and numbers that cannot be one.
        RecursionError: for lists nested hundreds of times.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _count(node, {}) > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES:,} values when its aliases are written out")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Values of a node with its aliases written out; each node is looked at once."""
    place, line = id(node), node.start_mark.line + 1
    if place in known:
        count = known[place]
        if count is None:
            raise ValueError(f"line {line}: an alias leads back to itself")
        return count
    known[place] = None
    count = 1 + len(node.value) // 256 if isinstance(node, yaml.ScalarNode) else 1
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        count += sum(_count(key, known) + _count(value, known) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        count += sum(_count(item, known) for item in node.value)
    known[place] = count
    return count


def _check_keys(node: yaml.MappingNode) -> None:
    """YAML itself takes the last of two equal keys without a word."""
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: the key {key.value!r} appears twice")
            seen.add(key.value)
