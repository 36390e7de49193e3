"""Folders of what is made once and used by many runs."""

import contextlib
import shutil
from pathlib import Path


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
