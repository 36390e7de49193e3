"""kill -9 at random moments, inside of saves too: the run goes on as if nothing had happened.

IRTUNE_KILLS sets how often per stage (10 for the table in docs/launching.md). Each falls into a run of its own.
"""

import functools
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from irtune.config import write_config
from irtune.distributed.environment import variable
from tests.support.ranks import free_port, kill_ranks
from tests.support.runs import launch, losses, records, selections, train
from tests.support.tiny import tiny_config

KILLS = int(variable("IRTUNE_KILLS", "2"))
OPTIONS = {"optim__max_steps": 12, "run__save_every": 2, "run__eval_every": 4}


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def whole(request, llama, corpus, tmp_path_factory) -> tuple[int, Path]:
    """A stage, and the uninterrupted run under it."""
    stage = request.param
    folder = tmp_path_factory.mktemp(f"whole{stage}") / "run"
    launch(tiny_config(llama, corpus, folder, stage, **OPTIONS), 2)
    return stage, folder


def wait_for_a_save(folder: Path, number: int) -> None:
    """Until a checkpoint after the `number`th is being written."""
    seen: set[str] = set()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        writing = {path.name for path in (folder / "checkpoints").glob(".writing_step_*")}
        if len(seen | writing) > number:
            return
        seen |= writing


def wait_for_step(folder: Path, step: int, seconds: float) -> None:
    """Until `seconds` after `step` has been recorded (0: after the folder was opened)."""
    deadline = time.monotonic() + 120
    metrics = folder / "metrics.jsonl"
    while time.monotonic() < deadline:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        done = sum('"kind": "train"' in line for line in lines)
        if done >= step and (done or (folder / "config.yaml").exists()):
            break
        time.sleep(0.002)
    time.sleep(seconds)


def assert_same(folder: Path, whole: Path) -> None:
    assert losses(folder) == losses(whole)
    assert [record["step"] for record in records(folder, "train")] == list(range(1, 13))
    assert records(folder, "eval") == records(whole, "eval")
    assert selections(folder) == selections(whole)
    for file in ("trainable.safetensors", "optimizer.safetensors"):
        assert (folder / "checkpoints/step_12" / file).read_bytes() == (
            whole / "checkpoints/step_12" / file
        ).read_bytes()
    assert (folder / "predictions.jsonl").read_text() == (whole / "predictions.jsonl").read_text()
    results = [json.loads((run / "results.json").read_text()) for run in (folder, whole)]
    assert results[0]["dev"] == results[1]["dev"] and results[0]["steps_per_layer"] == results[1]["steps_per_layer"]


@pytest.mark.parametrize(
    "number", [number if number == 0 else pytest.param(number, marks=pytest.mark.slow) for number in range(KILLS)]
)
def test_kill_and_resume_is_the_uninterrupted_run(llama, corpus, whole, tmp_path, number):
    stage, folder = whole
    config = tiny_config(llama, corpus, tmp_path / "run", stage, **OPTIONS)
    rng = random.Random(f"{stage}/{number}")
    victims = [[1], [0], [0, 1]][number % 3]
    if number % 2:
        saves = rng.randrange(5)
        moment = f"inside save {saves + 1}"
        took = kill_ranks(train, 2, config, victims=victims, when=lambda: wait_for_a_save(tmp_path / "run", saves))
    else:
        step, delay = rng.randrange(12), rng.uniform(0, 0.3)
        moment = f"{delay:.2f} s after step {step}"
        when = functools.partial(wait_for_step, tmp_path / "run", step, delay)
        took = kill_ranks(train, 2, config, victims=victims, when=when)
    latest = tmp_path / "run/checkpoints/latest"
    step = latest.read_text() if latest.exists() else "no checkpoint"
    print(f"KILL stage {stage}, ranks {victims}, {moment}: gone after {took:.1f} s, {step}")
    launch(config, 2)
    assert_same(tmp_path / "run", folder)


@pytest.mark.parametrize("whole", [2], indirect=True)
def test_a_kill_after_the_last_evaluation_leaves_no_record_twice(llama, corpus, whole, tmp_path):
    stage, folder = whole
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run/results.json").unlink()  # all was done but this
    launch(tiny_config(llama, corpus, tmp_path / "run", stage, **OPTIONS), 2)
    assert_same(tmp_path / "run", folder)
    assert [record["split"] for record in records(folder, "eval")] == ["dev", "dev", "dev", "test"]


@pytest.mark.slow
@pytest.mark.parametrize("whole", [2], indirect=True)
def test_torchrun_restarts_without_a_hand(llama, corpus, whole, tmp_path):
    stage, folder = whole
    config = tiny_config(llama, corpus, tmp_path / "run", stage, **OPTIONS)
    write_config(config, tmp_path / "config.yaml")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "1",
               "--master-port", str(free_port()), "-m", "tests.support.dies_once", str(tmp_path / "died"), "--config",
               str(tmp_path / "config.yaml")]  # fmt: skip
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "died").read_text() == "rank 1 at step 7"
    assert "resumed from" in done.stdout and "at step 6" in done.stdout
    assert_same(tmp_path / "run", folder)
