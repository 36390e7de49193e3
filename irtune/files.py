"""Files that are complete or not there: atomic writes, checksums, errors of a disk as one sentence."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from irtune.errors import IrtuneError, OutputError, one_line


def fingerprint(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256")
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def read_text(file: Path, most: int) -> str:
    """The UTF-8 text of a file of at most `most` bytes, without a byte-order mark. An endless one is not read on.

    Raises:
        OSError, ValueError: when it cannot be read, is larger, or is not UTF-8 (UnicodeDecodeError).
    """
    with file.open("rb") as source:
        content = source.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return content.decode("utf-8-sig")


def read_object(file: Path, most: int, error: type[IrtuneError]) -> dict[str, Any]:
    """The JSON object of a file of at most `most` bytes.

    Raises:
        `error`: when it is missing, damaged or larger.
    """
    try:
        found = json.loads(read_text(file, most))
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{file} cannot be read: {one_line(problem)}") from problem
    if not isinstance(found, dict):
        raise error(f"{file} is damaged: it holds a {type(found).__name__}, not an object")
    return found


@contextlib.contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turn the errors of a full disk or a read-only folder into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {what}: {getattr(error, 'strerror', None) or error}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path`, with its suffix, for a file or folder that takes its place when the block ends.

    Where the block fails, `path` is as before and nothing else is left.
    """
    scratch = path.with_name(f".{path.name}")
    _remove(scratch)  # of a process that was killed
    try:
        yield scratch
        if scratch.is_file():
            flush(scratch)
        os.replace(scratch, path)
    finally:
        _remove(scratch)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush(file: Path) -> None:
    """Force a file or folder to the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any, indent: int | None = None, *, other: Callable[[Any], Any] | None = None) -> str:
    """JSON text of `value`. NaN and infinities, for which JSON has no words, become null.

    Text is as it is, or \\uXXXX where it holds half a surrogate pair, which UTF-8 does not have.

    `other` makes something of values that JSON does not have, such as dates; without it they are a TypeError.
    """
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False, default=other)
    except ValueError:
        value = _finite(value)
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False, default=other)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent, allow_nan=False, default=other)
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, complete or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, complete or not at all."""
    write_text(path, to_json(value, indent=2) + "\n")
