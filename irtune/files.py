"""Files that are complete or not there: atomic writes, checksums, errors of a disk as one sentence."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from irtune.errors import OutputError


def remove_oldest(folder: Path, entries: int) -> None:
    """Keep the `entries` files and folders in `folder` that were used last.

    Raises:
        OSError: when the folder cannot be listed. Another run may remove entries at the same time.
    """
    used = {}
    for entry in folder.iterdir():
        with contextlib.suppress(OSError):
            used[entry] = entry.stat().st_mtime
    for entry in sorted(used, key=used.__getitem__, reverse=True)[entries:]:
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def fingerprint(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


@contextlib.contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turn the errors of a full disk or a read-only folder into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {what}: {getattr(error, 'strerror', None) or error}") from error


def flush(file: Path) -> None:
    """Force a file or folder to the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text of `value`. NaN and infinities, for which JSON has no words, become null; other objects their text."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path`, complete or not at all."""
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(to_json(value, indent=2) + "\n", encoding="utf-8")
    os.replace(scratch, path)
