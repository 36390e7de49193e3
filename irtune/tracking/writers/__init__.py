"""Where a run's numbers and pictures go besides its own files: one writer for each name of `run.trackers`.

A writer's file is imported only when its name is asked for, and so is the package behind it.
"""

import importlib
import importlib.util
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from irtune.errors import ConfigError, one_line
from irtune.files import write_json
from irtune.redaction import without_secrets
from irtune.tracking.writers.writer import Session, Writer

IDS = "trackers.json"  # in the run's folder: a resumed run goes on under its names in each tracker


def check_installed(names: Sequence[str]) -> None:
    """Raise a ConfigError for a tracker whose package is missing."""
    missing = [name for name in names if name != "tensorboard" and importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"run.trackers: {', '.join(missing)} is not installed; pip install 'irtune[trackers]', or leave it out"
        )


def open_writers(names: Sequence[str], folder: Path, start_step: int) -> list[Writer]:
    """The writers of a run in `folder`, which continues at `start_step`.

    Raises:
        ConfigError: for one that cannot start, with what its package says.
    """
    others = [name for name in names if name != "tensorboard"]
    key = _key(folder / IDS, new=start_step == 0) if others else ""
    session = Session(folder=folder, start_step=start_step, key=key, config=_config(folder))
    writers: list[Writer] = []
    for name in names:
        module = importlib.import_module(f"irtune.tracking.writers.{name}_writer")
        try:
            writers.append(module.open_writer(session))
        except Exception as error:  # no login, no server: each package has its own kinds
            for writer in writers:
                writer.close()
            raise ConfigError(f"run.trackers: {name} cannot start: {one_line(error)}") from error
    return writers


def _key(file: Path, *, new: bool) -> str:
    """A name that no other run has."""
    if new or not file.is_file():
        write_json(file, {"key": secrets.token_hex(6)})
    return json.loads(file.read_text(encoding="utf-8"))["key"]


def _config(folder: Path) -> dict[str, Any]:
    """The run's resolved configuration, without what looks like a password."""
    file = folder / "config.yaml"
    return without_secrets(yaml.safe_load(file.read_text(encoding="utf-8"))) if file.is_file() else {}
