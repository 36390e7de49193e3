"""What tests call: runs on the simulated device, one server for the whole session."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from irtune.config import Config
from tests.support import ROOT
from tests.support.ranks import free_port

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the simulated CUDA device")


@dataclass(frozen=True)
class Simulated:
    """A job that has ended: results.json of a run, or what a call returned, on rank 0.

    waits: of each rank, where its host would have waited: what, where, how often.
    """

    results: Any
    waits: list[list[tuple[str, str, int]]]

    def within_steps(self) -> list[tuple[str, str]]:
        """Waits inside a training step that is not a log line, a selection, an evaluation or a save."""
        inside = ("forward_backward", " _loss", " step <", " step", "_train_step", "_micro_batches", "batches")
        return [(what, place) for found in self.waits for what, place, _ in found
                if place.endswith(inside) and "reselect" not in place]  # fmt: skip


class Server:
    """The process that forks runs."""

    def __init__(self, cache: Path):
        environment = os.environ | {"FAKE_CUDA_CACHE": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen([sys.executable, "-m", "tests.support.simulated.server"], cwd=ROOT, text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)  # fmt: skip

    def run(self, arguments: list[str], folder: Path, ranks: int = 1, *, whole: bool = False) -> Simulated:
        """Train with `arguments`, whose run.output_dir is not yet set, into `folder`/run; bare unless `whole`."""
        job = {"arguments": [*arguments, "--run.output_dir", str(folder / "run")], "whole": whole}
        return self._do(job, folder, ranks)

    def call(self, function: Callable[..., Any], folder: Path, *given: Any, ranks: int = 1) -> Simulated:
        """Call a function of a module's on ranks that have the device; it takes and returns what JSON can hold."""
        return self._do({"call": f"{function.__module__}:{function.__name__}", "given": given}, folder, ranks)

    def _do(self, job: dict[str, Any], folder: Path, ranks: int) -> Simulated:
        folder.mkdir(parents=True, exist_ok=True)
        job |= {"ranks": ranks, "port": free_port(), "folder": str(folder)}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        while (line := self._process.stdout.readline()) != "done\n":
            assert line, "the server of simulated runs has ended"
        said = [json.loads((folder / f"rank_{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
        for rank, one in enumerate(said):
            assert one["error"] is None, f"rank {rank}:\n{one['error']}"
        return Simulated(said[0]["results"], [[tuple(wait) for wait in one["waits"]] for one in said])

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=120)  # it may have begun just now


def options_of(config: Config) -> list[str]:
    """The options of train.py that make `config`, but for its folder."""
    sections = {name: vars(section) for name, section in vars(config).items() if name != "deepspeed"}
    flat = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    del flat["run.output_dir"]
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in flat.items()}
    return [*(f"--{key}={text}" for key, text in texts.items()), f"--deepspeed={config.deepspeed}"]


@contextlib.contextmanager
def serving(cache: Path) -> Iterator[Server]:
    """A server that ends with the block."""
    server = Server(cache)
    try:
        yield server
    finally:
        server.close()
