"""Checks that hold for a value whatever its option: text that can be stored, numbers of this world, usable paths."""

import errno
import math
from pathlib import Path
from typing import Any

from irtune.config import template
from irtune.errors import brief
from irtune.redaction import redact

LARGEST = 2**31 - 1
MAX_CHARACTERS = 4_096
PATHS = {"data.path", "data.train", "data.dev", "data.test", "data.synonyms", "data.pseudo", "model.name_or_path",
         "model.head_init", "run.output_dir", "run.resume", "deepspeed"}  # fmt: skip
# Answers of the file system that matter only to those who read the file: a corpus in another's folder does not keep
# anybody from predicting with what was trained on it.
_LATER = (errno.ENOENT, errno.ENOTDIR, errno.EACCES)


def implausible(key: str, value: Any) -> str | None:
    """What is wrong with the value of an option, in one sentence without secrets, or None."""
    for item in _leaves(value):
        if isinstance(item, str):
            said = _text(key, item)
        elif isinstance(item, int | float) and not isinstance(item, bool):
            small = math.isfinite(item) and abs(item) <= LARGEST
            said = None if small else f"is {item!r}; accepted: a finite number of at most {LARGEST:,}"
        else:
            said = None
        if said is not None:
            return f"{key} {said}"
    return _path(key, value) if key in PATHS and isinstance(value, str) else None


def _text(key: str, text: str) -> str | None:
    if redact(text) != text:
        return (
            f"holds a password or token ({redact(text)[:200]!r}), and configurations are saved and shown; log in with "
            "`hf auth login` or the variable HF_TOKEN instead"
        )
    most = template.MAX_CHARACTERS if key == "data.template" else MAX_CHARACTERS
    if len(text) > most:
        return f"has {len(text):,} characters; accepted: at most {most:,}"
    if "\0" in text:
        return f"is {brief(text)}, with a NUL character; accepted: text"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"is {brief(text)}, which is not valid Unicode; accepted: text that can be saved as UTF-8"
    return None


def _path(key: str, text: str) -> str | None:
    """Why the file system does not even look for `text`; whether something is there is seen later."""
    if not text.strip():
        return f"{key} is {text!r}; accepted: a path" if key != "model.name_or_path" else None
    try:
        Path(text).expanduser().stat()
    except OSError as error:
        return (
            None if error.errno in _LATER else f"{key} is {text[:100]!r}, which cannot be looked up: {error.strerror}"
        )
    except RuntimeError:
        return f"{key} is {text!r}: there is no user of that name with a home folder"
    return None


def _leaves(value: Any) -> list[Any]:
    """Texts and numbers of lists and maps (keys too)."""
    if isinstance(value, dict):
        return [leaf for pair in value.items() for item in pair for leaf in _leaves(item)]
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, list) else [value]
