"""Faults in the middle of a run, with real processes: numbers that are not finite, signals, ranks, memory, disks."""

import json
import math
import os
import signal
import subprocess
import time

import pytest
import torch

from irtune.cli import train as command_line
from irtune.config import Config, OptimConfig
from irtune.distributed import runtime
from irtune.engine.losses import cross_entropy
from irtune.errors import StoppedError
from irtune.train import failures as faults
from irtune.train.checkpoint import TRAINABLE, read_tensors
from irtune.train.run import run
from irtune.train.trainer import Trainer
from tests.support.ranks import run_cases, run_ranks
from tests.support.runs import bare, launch, losses, records, selections, train
from tests.support.tiny import Rig, tiny_config

# ----- numbers that are not finite -----


def spoil(factor):
    """A loss multiplied with `factor`."""
    return lambda logits, labels: cross_entropy(logits, labels) * factor


def skip_one_step(model, stage, dtype, accumulation, factor):
    rig = Rig(model, stage, dtype, accumulation, weight_decay=0.1)
    rig.engine.reselect([1, 4])
    rig.train(2)
    before, state = rig.layer_weights(), rig.engine.full_state()
    if rig.world.rank == rig.world.size - 1:
        rig.engine.loss = spoil(factor)
    rig.train(1)
    skipped, norm = not rig.engine.applied, rig.engine.grad_norm()
    after, (tensors, steps) = rig.layer_weights(), rig.engine.full_state()
    same = tensors.keys() == state[0].keys() and all(torch.equal(tensors[name], state[0][name]) for name in tensors)
    rig.engine.loss = cross_entropy
    rig.train(1)
    later = rig.layer_weights()
    result = {
        "skipped": [skipped, not rig.engine.applied],
        "norm": norm,
        "moved by the skipped step": [not torch.equal(old, new) for old, new in zip(before, after)],
        "state is the same": same and steps == state[1],
        "steps": steps["head"],
        "moved by the next step": [not torch.equal(old, new) for old, new in zip(before, later)],
    }
    rig.close()
    return result


def test_a_step_that_one_rank_spoils_changes_nothing_anywhere(llama):
    kinds = [(0, "float32", 1), (0, "bfloat16", 1), (1, "float32", 2), (2, "float32", 1), (2, "bfloat16", 1),
             (3, "mixed", 2)]  # fmt: skip
    cases = [(llama, *kind, factor) for kind in kinds for factor in (math.nan, math.inf)]
    for case, reports in zip(cases, run_cases(skip_one_step, 2, cases)):
        for seen in reports:
            assert seen["skipped"] == [True, False], case
            assert not math.isfinite(seen["norm"]), case
            assert not any(seen["moved by the skipped step"]), case
            assert seen["state is the same"] and seen["steps"] == 2, case
            # 1, 4 and the head
            assert seen["moved by the next step"] == [False, True, False, False, True, False, True], case


def train_spoiled(config, spoiled):
    """A run whose loss is NaN on rank 1 in the steps `spoiled`; returns its state at each step."""
    original = Trainer._train_step
    seen = []

    def step(self):
        here = self.progress.step + 1
        bad = here in spoiled and runtime.rank() == 1
        self.engine.loss = spoil(math.nan) if bad else cross_entropy
        batches = original(self)
        seen.append((here, not self.engine.applied, list(self.engine.selected)))
        return batches

    Trainer._train_step = step
    with bare():
        run(config)
    return seen


def test_skipped_steps_are_counted_and_never_choose_layers(llama, corpus, tmp_path):
    config = tiny_config(llama, corpus, tmp_path / "run", optim__max_steps=8, tuning__interval=2)
    seen, _ = run_ranks(train_spoiled, 2, config, [3, 4])
    assert [step for step, skipped, _ in seen if skipped] == [3, 4]
    chosen = [json.loads(line) for line in (tmp_path / "run/selection.jsonl").read_text().splitlines()]
    spoiled = next(record for record in chosen if record["step"] == 4)
    assert spoiled["scores"] == [None] * 6  # not NaN, which no other JSON reader takes
    assert spoiled["selected"] == chosen[1]["selected"] and not spoiled["changed"]
    lines = records(tmp_path / "run", "train")
    assert [line["loss"] is None for line in lines] == [False, False, True, True, False, False, False, False]
    assert lines[2]["grad_norm"] is None
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2, 2, 2, 2, 2]
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["skipped_steps"] == 2
    assert sum(results["steps_per_layer"]) == sum(len(layers) for _, skipped, layers in seen if not skipped)
    weights = read_tensors(tmp_path / "run/checkpoints/step_8", TRAINABLE)
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def train_with_a_broken_layer(config):
    """From step 3 on, layer 3 puts out NaN on rank 1 only."""
    original = Trainer._train_step

    def step(self):
        if self.progress.step == 2 and runtime.rank() == 1:
            self.engine.table.modules[3].register_forward_hook(
                lambda _module, _args, output: output * math.nan if torch.is_tensor(output) else (output[0] * math.nan,)
            )
        return original(self)

    Trainer._train_step = step
    return train(config)


@pytest.mark.parametrize(
    "stage, looks", [(2, {}), (3, {}), (2, {"run__log_every": 10, "tuning__interval": 9})], ids=["2", "3", "2-seldom"]
)
def test_too_many_in_a_row_stop_the_run_and_name_step_examples_and_layer(llama, corpus, tmp_path, stage, looks):
    """The same step is named where nobody looks at the numbers before later ones are done."""
    options = {"optim__max_steps": 12, "run__eval_every": 12, "run__max_skipped_steps": 4} | looks
    config = tiny_config(llama, corpus, tmp_path / "run", stage, **options)
    errors = run_ranks(train_with_a_broken_layer, 2, config)
    for error in errors:
        assert error.startswith("TrainingError: step 6: 4 steps in a row had a loss or gradients that are not finite")
        assert "the output of layer 3, in a batch of the examples" in error
    ids = {json.loads(line)["id"] for line in (corpus / "train.jsonl").read_text().splitlines()}
    named = errors[0].partition("examples ")[2].partition(". Lower")[0].split(", ")
    assert len(named) == 4 and set(named) <= ids
    assert not (tmp_path / "run/results.json").exists()


def test_a_learning_rate_that_is_too_high_saves_nothing_broken(llama, corpus, tmp_path):
    options = {
        "optim__lr": 1e9,
        "optim__weight_decay": 1e9,
        "optim__max_grad_norm": 0,
        "run__eval_every": 6,
        "run__max_skipped_steps": 3,
    }
    error, _ = run_ranks(train, 2, tiny_config(llama, corpus, tmp_path / "run", **options))
    assert "3 steps in a row had a loss or gradients that are not finite" in error and "Lower optim.lr" in error
    assert not list((tmp_path / "run/checkpoints").glob("step_*"))


# ----- signals -----


def signalled(config, rank, step, number):
    """A run in which `rank` gets a signal during `step`; returns the exit status of the command line."""
    original = Trainer._train_step

    def train_step(self):
        batches = original(self)
        if self.progress.step == step and runtime.rank() == rank:
            os.kill(os.getpid(), number)
        return batches

    Trainer._train_step = train_step
    try:
        with bare():
            run(config)
    except StoppedError as stop:
        return stop.signal, stop.step
    return None


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(llama, corpus, tmp_path, number, rank):
    options = {"optim__max_steps": 8, "run__eval_every": 4, "tuning__interval": 1}
    whole = launch(tiny_config(llama, corpus, tmp_path / "whole", **options), 2)
    config = tiny_config(llama, corpus, tmp_path / "run", **options)
    assert run_ranks(signalled, 2, config, rank, 2, number) == [(number, 3)] * 2  # agreed on for the next step
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_3"
    launch(config, 2)
    assert losses(tmp_path / "run") == losses(whole)
    assert selections(tmp_path / "run") == selections(whole)
    assert records(tmp_path / "run", "eval")[0]["step"] == 4  # none is added by the interruption
    for file in ("trainable.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "run/checkpoints/step_8" / file).read_bytes() == (
            whole / "checkpoints/step_8" / file
        ).read_bytes()


def exit_status(config_file, number):
    original = Trainer._train_step

    def train_step(self):
        os.kill(os.getpid(), number)
        return original(self)

    Trainer._train_step = train_step
    return command_line(["--config", str(config_file)])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_exit_status_of_a_signal(llama, corpus, tmp_path, number, status):
    from irtune.config import write_config

    config = tiny_config(llama, corpus, tmp_path / "run")
    write_config(config, tmp_path / "config.yaml")
    assert run_ranks(exit_status, 1, tmp_path / "config.yaml", number) == [status]
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_1"


# ----- ranks that die, hang or lag -----


def fail_at(config, rank, step, how):
    """`rank` does `how` at the beginning of `step`. Returns the others' error and the seconds until it came."""
    original = Trainer._train_step
    at = time.monotonic()

    def train_step(self):
        nonlocal at
        if self.progress.step + 1 == step:
            at = time.monotonic()
            if runtime.rank() == rank:
                how()
        return original(self)

    Trainer._train_step = train_step
    return train(config), time.monotonic() - at


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def halt():
    os.kill(os.getpid(), signal.SIGSTOP)


def dawdle():
    runtime.doing("a nap")
    time.sleep(40)


def no_memory():
    torch.empty(2**50)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("optim", "wanted"),
    [
        ({"micro_batch_size": 8}, "Try optim.micro_batch_size 4 with optim.gradient_accumulation_steps 2, or"),
        ({"micro_batch_size": 1}, "Try data.max_length below 256, or"),
        (
            {"micro_batch_tokens": 2048},
            "Try optim.micro_batch_tokens 1024 with optim.gradient_accumulation_steps 2, or",
        ),
        ({"micro_batch_tokens": 300}, "Try data.max_length below 256, or"),
    ],
)
def test_short_memory_comes_with_a_smaller_batch(optim, wanted):
    assert wanted in str(faults.as_user_error(MemoryError("no room"), Config(optim=OptimConfig(**optim)), 2))


@pytest.mark.parametrize(
    ("how", "rank", "timeout", "wanted"),
    [
        (die, 1, 60, ["rank 0, at: gradients of step 3, a micro-batch of 4 x", "no sign of life from rank 1"]),
        (die, 0, 60, ["rank 1, at: ", "rank 0, or the launcher that keeps the ranks' common store, is gone"]),
        pytest.param(halt, 1, 8, ["gradients of step 3", "rank 1"], marks=pytest.mark.slow),
        (dawdle, 1, 6, ["gradients of step 3", "rank 1 is at: a nap"]),
        (no_memory, 1, 60, ["rank 1, at: ", "out of memory under ZeRO 2. Try optim.micro_batch_size 2 with"]),
    ],
    ids=["killed", "rank-0-killed", "stopped", "slow", "out-of-memory"],
)
def test_the_other_rank_says_who_failed(llama, corpus, tmp_path, how, rank, timeout, wanted):
    config = tiny_config(llama, corpus, tmp_path / "run", run__timeout_seconds=timeout)
    survivor = 1 - rank
    error, seconds = run_ranks(fail_at, 2, config, rank, 3, how, only=survivor)[survivor]
    assert error.startswith("DistributedError: "), error
    assert all(part in error for part in wanted), error
    assert seconds < timeout


# ----- disks -----


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MiB, which only root can make."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk):
    with (disk / "filler").open("wb", buffering=0) as out:
        while True:
            try:
                out.write(bytes(4096))
            except OSError:
                return


def freeze(disk):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


def train_on(config, disk, harm):
    """A run whose disk is harmed by rank 0 in step 3."""
    original = Trainer._train_step

    def train_step(self):
        if self.progress.step == 2 and runtime.rank() == 0:
            harm(disk)
        return original(self)

    Trainer._train_step = train_step
    return train(config)


@pytest.mark.parametrize(("harm", "reason"), [(fill, "No space left on device"), (freeze, "Read-only file system")])
def test_a_disk_that_gives_out_costs_only_the_steps_since_the_last_checkpoint(
    llama, corpus, tmp_path, small_disk, harm, reason
):
    options = {"run__save_every": 2, "run__eval_every": 6, "run__log_every": 6}
    whole = launch(tiny_config(llama, corpus, tmp_path / "whole", **options), 2)
    config = tiny_config(llama, corpus, small_disk / "run", **options)
    errors = run_ranks(train_on, 2, config, small_disk, harm)
    assert errors[0].startswith("OutputError: cannot write ") and reason in errors[0]
    assert errors[1].startswith("DistributedError: ") and reason in errors[1]
    checkpoints = small_disk / "run/checkpoints"
    assert (checkpoints / "latest").read_text() == "step_2"
    if harm is fill:
        assert {path.name for path in checkpoints.glob("*step_*")} == {"step_2"}  # the half-written one is gone
        (small_disk / "filler").unlink()
    else:
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    launch(config, 2)
    assert losses(small_disk / "run") == losses(whole)
    assert selections(small_disk / "run") == selections(whole)
