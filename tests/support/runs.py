"""Runs on real processes, and what they leave in their folders."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from irtune.cli import train as command_line
from irtune.errors import IrtuneError
from irtune.tracking import pictures
from irtune.tracking.tracker import Tracker
from irtune.train import setup as prepare
from irtune.train import trainer
from irtune.train.run import run
from tests.support.ranks import run_ranks

FIGURES = ("score_map", "trained_map", "share_bars", "confusion_map", "f1_bars")


@contextlib.contextmanager
def bare() -> Iterator[None]:
    """Inside, runs make no memory plan, draw no pictures and do not load what they write: half of a short run.

    Those are tested in test_planner.py, test_tensorboard.py and test_first_adapter.py, and with the fixture `base`.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "estimate_memory", lambda *_, **__: None)
        patch.setattr(trainer, "check_what_is_written", lambda *_: None)
        patch.setattr(Tracker, "_picture", lambda *_: None)
        for name in FIGURES:
            patch.setattr(pictures, name, lambda *_, **__: None)
        yield


def train(config, whole=False):
    """Run to the end, bare unless `whole`; a user's error comes back as text."""
    try:
        with contextlib.nullcontext() if whole else bare():
            run(config)
    except IrtuneError as error:
        return f"{type(error).__name__}: {error}"
    return None


@contextlib.contextmanager
def forked_after(first: int) -> Iterator[None]:
    """Inside, `compare` and `crossvalidate` start their first `first` runs as always, and others as forked ranks."""
    count = 0

    def start(command, *, stdout, **options):
        nonlocal count
        count += 1
        if count <= first:
            return subprocess.run(command, stdout=stdout, check=False, **options)
        ranks = int(command[command.index("--nproc_per_node") + 1]) if "--nproc_per_node" in command else 1
        arguments = command[command.index("train") + 1 :]
        return SimpleNamespace(returncode=max(run_ranks(_as_program, ranks, arguments, stdout.name)))

    stand_in = SimpleNamespace(run=start, STDOUT=subprocess.STDOUT, DEVNULL=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("irtune.commands.compare.runs.subprocess", stand_in)
        yield
    assert count > first, "none was forked"


def _as_program(arguments, output):
    """The exit status of `python -m irtune train`, which writes to the file `output`."""
    with open(output, "a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    status = command_line(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def records(folder: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder, "train")]


def selections(folder: Path) -> list[list[int]]:
    return [json.loads(line)["selected"] for line in (folder / "selection.jsonl").read_text().splitlines()]


def cut_back(whole: Path, parts: Path, last: int, kept: int) -> None:
    """Copy the finished run `whole` to `parts`, as if it had been stopped after step `kept` instead of `last`."""
    shutil.copytree(whole, parts)
    (parts / "results.json").unlink()
    shutil.rmtree(parts / f"checkpoints/step_{last}")
    (parts / "checkpoints/latest").write_text(f"step_{kept}")


def launch(config, world: int, whole: bool = False) -> Path:
    assert run_ranks(train, world, config, whole) == [None] * world
    return Path(config.run.output_dir)
