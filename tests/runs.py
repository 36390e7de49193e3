"""Runs on real processes, and what they leave in their folders."""

import json
from pathlib import Path

from irtune.app import run
from irtune.errors import IrtuneError
from tests.ranks import run_ranks


def train(config):
    """Run to the end; a user's error comes back as text."""
    try:
        run(config)
    except IrtuneError as error:
        return f"{type(error).__name__}: {error}"
    return None


def records(folder: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder, "train")]


def selections(folder: Path) -> list[list[int]]:
    return [json.loads(line)["selected"] for line in (folder / "selection.jsonl").read_text().splitlines()]


def launch(config, world: int) -> Path:
    assert run_ranks(train, world, config) == [None] * world
    return Path(config.run.output_dir)
