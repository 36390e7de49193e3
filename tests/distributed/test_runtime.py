"""Ranks, seeds and shared errors."""

import pytest
import torch

from irtune.distributed import runtime
from irtune.errors import ConfigError, DataError, DistributedError
from irtune.train.learning_rate import learning_rate
from tests.support.ranks import run_ranks


@pytest.mark.quick
def test_more_ranks_than_gpus_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for variable in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):  # torchrun, deepspeed
        with monkeypatch.context() as launcher:
            launcher.setenv(variable, "3")
            for rank in "012":
                launcher.setenv("LOCAL_RANK", rank)
                with pytest.raises(ConfigError, match=r"3 ranks on a node with 2 GPU\(s\)"):
                    runtime.read_world()


@pytest.mark.quick
def test_launcher_variables_must_be_numbers(monkeypatch):
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="'RANK': 'first'"):
        runtime.read_world()


@pytest.mark.quick
def test_derived_seeds_are_stable_and_different():
    assert runtime.derived_seed(1, "a", 2) == runtime.derived_seed(1, "a", 2)
    assert len({runtime.derived_seed(0, "micro-batch", step, m) for step in range(50) for m in range(8)}) == 400
    assert 0 <= runtime.derived_seed("x") < 2**63


@pytest.mark.quick
def test_learning_rates_by_hand():
    options = {"peak": 1.0, "warmup_steps": 2, "max_steps": 6}
    rates = {
        schedule: [learning_rate(step, schedule=schedule, **options) for step in range(6)]
        for schedule in ("linear", "cosine", "constant")
    }
    assert rates["linear"] == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    assert rates["cosine"] == pytest.approx([0.5, 1.0, 1.0, 0.8535534, 0.5, 0.1464466])
    assert rates["constant"] == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0])


def fail_on_rank_one():
    world = runtime.read_world()
    runtime.start(world, 30)
    made = [work_together(world.rank, busy) for busy in (None, 0)]
    try:
        with runtime.shared_errors():
            if world.rank == 1:
                raise DataError("row 7 is bad")
    except (DataError, DistributedError) as error:
        return f"{type(error).__name__}: {error}", made
    finally:
        runtime.stop()
    return None, made


def work_together(rank, busy):
    """The squares of 0 to 9, which ranks make three at a time, and those that this rank has made; one does not help."""
    job = runtime.new_job()
    mine = {} if rank == busy else runtime.made_together(job, lambda number: number**2, range(10), 3)
    return runtime.joined(mine), sorted(mine)


def test_an_error_of_one_rank_reaches_all_and_work_is_shared():
    messages, made = zip(*run_ranks(fail_on_rank_one, 3))
    assert messages[1] == "DataError: row 7 is bad"
    assert messages[0] == messages[2] == "DistributedError: rank 1: row 7 is bad"
    for turn in (0, 1):
        assert [ranks[turn][0] for ranks in made] == [[n**2 for n in range(10)]] * 3
        assert sorted(place for ranks in made for place in ranks[turn][1]) == list(range(10))  # each of them once
    assert made[0][1][1] == []
