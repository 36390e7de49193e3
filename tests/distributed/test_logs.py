"""RUN/logs/rank_N.log: what a rank said, and why it ended."""

import logging
import warnings

import pytest

from irtune.distributed import logs
from irtune.engine import Engine
from irtune.errors import DataError
from irtune.train.trainer import Trainer
from tests.support.ranks import run_ranks
from tests.support.runs import train
from tests.support.tiny import tiny_config


@pytest.fixture(autouse=True)
def closed():
    yield
    logs.close_log(None)


@pytest.mark.quick
def test_lines_warnings_and_the_error_are_in_it(tmp_path):
    log = logging.getLogger("irtune")
    log.setLevel(logging.INFO)
    logs.open_log(tmp_path / "logs", 3, "cpu", clean=lambda text: text.replace("hidden", "***"))
    log.info("a line with hidden words")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("be careful", stacklevel=1)
    try:
        raise DataError("row 7 is bad")
    except DataError as error:
        logs.close_log(error)
    log.info("after the end")
    text = (tmp_path / "logs/rank_3.log").read_text()
    first, *rest = text.splitlines()
    assert " START rank 3 on " in first and first.endswith(", cpu")
    assert " INFO a line with *** words" in rest[0] and " WARNING UserWarning: be careful (" in rest[1]
    assert "Traceback (most recent call last)" in text and rest[-1].endswith(" ERROR DataError: row 7 is bad")
    assert "hidden" not in text and "after the end" not in text


@pytest.mark.quick
def test_a_second_start_goes_on_in_the_same_file(tmp_path):
    for _ in range(2):
        logs.open_log(tmp_path, 0, "cpu")
        logs.close_log(None)
    lines = (tmp_path / "rank_0.log").read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["START", "END", "START", "END"]


@pytest.mark.quick
def test_a_disk_that_takes_no_log_stops_no_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    logs.open_log(tmp_path / "file", 0, "cpu")
    logs.last_words("nowhere to write")
    logs.close_log(None)
    assert caplog.text.count("no log of rank 0") == 1


def fails_on_rank_one(config):
    """The third forward pass of rank 1 raises what nobody expects."""
    with pytest.MonkeyPatch.context() as patch:
        forward, calls = Engine.forward_backward, []

        def broken(self, batch, weight):
            calls.append(1)
            if len(calls) == 3 and self.ds.global_rank == 1:
                raise DataError("a bad example on this rank alone")
            return forward(self, batch, weight)

        patch.setattr(Engine, "forward_backward", broken)
        return train(config)


def stops_at_two(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_is_over", lambda self: self.progress.step == 2)
        return train(config)


def test_every_rank_has_a_log_and_a_failure_is_in_all(llama, corpus, tmp_path):
    config = tiny_config(llama, corpus, tmp_path / "run", run__save_every=1)
    said = run_ranks(fails_on_rank_one, 2, config)
    assert "rank 1: a bad example on this rank alone" in said[0] and "a bad example" in said[1]
    logs_of = [(tmp_path / f"run/logs/rank_{rank}.log").read_text() for rank in (0, 1)]
    assert all(text.splitlines()[-1].endswith(told.replace("\n", " ")) for text, told in zip(logs_of, said))
    assert "step 1  loss" in logs_of[0] and "step 1  loss" not in logs_of[1]
    assert run_ranks(train, 2, config) == [None, None]
    for rank in (0, 1):
        text = (tmp_path / f"run/logs/rank_{rank}.log").read_text()
        assert text.startswith(logs_of[rank]) and text.splitlines()[-1].endswith(" END finished")
    assert sorted(path.name for path in (tmp_path / "run/logs").iterdir()) == ["rank_0.log", "rank_1.log"]
