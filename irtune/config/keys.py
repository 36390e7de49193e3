"""What schema.py declares of each dotted key: its section, type, limit and value."""

import functools
from typing import Any, get_args, get_type_hints

from irtune.config.limits import Limit
from irtune.config.schema import Config

# Name -> class.
SECTIONS: dict[str, Any] = {name: kind for name, kind in get_type_hints(Config).items() if name != "deepspeed"}


def known_keys() -> list[str]:
    """All dotted keys, for example `optim.lr`."""
    keys = [f"{name}.{field}" for name, section in SECTIONS.items() for field in section.__dataclass_fields__]
    return [*keys, "deepspeed"]


@functools.cache
def _types(section: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Types of a section's fields, without and with their limits."""
    owner = SECTIONS[section] if section else Config
    return get_type_hints(owner), get_type_hints(owner, include_extras=True)


def declared_type(key: str) -> Any:
    """The type of a key, without its limit."""
    section, _, name = key.rpartition(".")
    return _types(section)[0][name]


def declared_limit(key: str) -> Limit | None:
    """What a key accepts beyond its type, if there is such a limit."""
    section, _, name = key.rpartition(".")
    found = get_args(_types(section)[1][name])
    return next((item for item in found if isinstance(item, Limit)), None)


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    section, _, name = key.rpartition(".")
    return getattr(getattr(config, section) if section else config, name)
