"""How a run's time-out is shared out, and a store that does not answer. What ranks do then is in test_faults.py."""

import signal
import threading
import time

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from irtune.distributed.heartbeat import Patience, StoreClient, Watch

pytestmark = pytest.mark.quick


@given(st.floats(1, 1e6))
def test_all_that_follows_from_a_lost_rank_fits_into_the_time_out(timeout):
    parts = Patience.within(timeout)
    assert min(vars(parts).values()) > 0
    # The main thread: a collective, who it was, the end.
    assert parts.collective + parts.explain + parts.leave == pytest.approx(timeout)
    # The watch, where the main thread hangs: the silence is seen at the next look, and by the others at theirs.
    assert parts.silent + 2 * parts.interval + parts.grace + parts.leave <= timeout * (1 + 1e-9)
    # The same where the store is gone.
    assert 3 * (parts.answer + parts.interval) <= parts.silent * (1 + 1e-9)
    assert parts.explain >= 2.5 * parts.interval  # who is alive is seen to be


def test_of_a_long_time_out_the_collectives_get_nearly_all():
    assert Patience.within(1800).collective == 1792
    assert Patience.within(1800).silent == 45


class DeadStore:
    """Takes every request and answers none."""

    def set_timeout(self, _timeout):
        pass

    def check(self, _keys):
        threading.Event().wait()


def refused(line):
    """Seconds until a request is given up."""
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="store"):
        line.check(["key"])
    return time.monotonic() - began


def test_a_request_without_an_answer_is_given_up():
    assert 0.2 <= refused(StoreClient(DeadStore(), 0.2)) < 1


def test_a_closed_line_lets_nobody_wait():
    line = StoreClient(DeadStore(), 60)
    threading.Timer(0.2, line.close).start()
    assert refused(line) < 5
    assert refused(line) < 1


def watch(store, rank, **options):
    return Watch(store, rank, 2, timeout=4, **options)


def test_a_silent_rank_is_named_in_time_and_told_to_the_main_thread():
    left = []
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    one, other = watch(store, 0, leave=left.append), watch(store, 1)
    try:
        one.doing = other.doing = "step 3"
        time.sleep(3 * one.patience.interval)
        other.stop()
        began = time.monotonic()
        assert one.explain() == "no sign of life from rank 1 (when last heard of, at: step 3): it died or was stopped"
        assert time.monotonic() - began < one.patience.explain + 0.5
        deadline = began + 8
        while not left and time.monotonic() < deadline:
            time.sleep(0.05)
        assert left and "rank 1 has given no sign for" in left[0]
    finally:
        one.stop()


@pytest.mark.parametrize("behind, lead", [(0, 0), (1, 0), (1, 1)])
def test_all_ranks_end_after_the_same_step_though_hosts_run_ahead(behind, lead):
    """The host of a device that may be a step behind has looked after step 5 when another announces after step 4."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    told, ahead = watch(store, 0), watch(store, 1)
    try:
        told.signals.received = signal.SIGTERM
        ended = {}
        for step in range(4, 9):
            for name, rank, at in (("ahead", ahead, step + lead), ("told", told, step)):
                if name not in ended and rank.signals.stops_after(at, behind):
                    ended[name] = at
        assert ended == {"ahead": 5 + behind, "told": 5 + behind}
    finally:
        told.stop()
        ahead.stop()
