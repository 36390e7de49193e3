"""A long run that selects at every step: memory, files and threads of each process stay what they were.

IRTUNE_SOAK_STEPS sets its length (2000 for the figures in docs/launching.md).
"""

import math
import os
import threading

import pytest

from irtune.distributed.environment import variable
from irtune.memory.measure import host_memory_bytes
from irtune.train.run import run
from irtune.train.trainer import Trainer
from tests.support.ranks import run_ranks
from tests.support.runs import losses, selections
from tests.support.tiny import tiny_config

STEPS = int(variable("IRTUNE_SOAK_STEPS", "120"))


def soak(config):
    """Memory, open files and threads after each step."""
    original = Trainer._train_step
    seen = []

    def train_step(self):
        batches = original(self)
        seen.append((host_memory_bytes(), len(os.listdir("/proc/self/fd")), threading.active_count()))
        return batches

    Trainer._train_step = train_step
    run(config)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2])
def test_nothing_grows(llama, corpus, tmp_path, stage):
    options = {"optim__max_steps": STEPS, "tuning__interval": 1, "run__eval_every": STEPS // 4, "run__log_every": 10}
    config = tiny_config(llama, corpus, tmp_path / "run", stage, **options)
    for rank, seen in enumerate(run_ranks(soak, 2, config, timeout=3600)):
        settled = seen[STEPS // 4 + 1 :]  # after the first evaluation and checkpoint
        memory, files, threads = zip(*settled)
        growth = memory[-1] / memory[0] - 1
        print(f"SOAK rank {rank}: {STEPS} steps, {memory[0] >> 20} -> {memory[-1] >> 20} MiB ({growth:+.2%}), "
              f"files {files[0]} -> {files[-1]}, threads {set(threads)}")  # fmt: skip
        assert memory[-1] <= 1.02 * memory[0]
        assert files[-1] <= files[0]
        assert len(set(threads)) == 1
    chosen = selections(tmp_path / "run")
    assert len(chosen) == STEPS and len({tuple(layers) for layers in chosen}) > 1
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run"))
