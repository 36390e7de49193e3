"""How a run's time-out is shared out, and a store that does not answer. What ranks do then is in test_faults.py."""

import signal
import threading
import time

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from irtune.distributed import runtime
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


def test_a_device_that_hangs_is_told_with_what_each_rank_is_at_before_torch_ends_the_process():
    """The main thread waits for the device, where Python cannot reach it; the other rank is not in the collective."""
    left = []
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    began = time.monotonic()
    one = watch(store, 0, leave=left.append, busy=lambda: True)
    other = watch(store, 1, leave=lambda why: left.append(f"the rank that does not wait ended: {why}"))
    try:
        one.at("update of step 7")
        other.at("batch of step 8")
        while not left and time.monotonic() < began + 8:
            time.sleep(0.02)
        took = time.monotonic() - began
        assert left == [
            "rank 0, at: update of step 7: its device has not come to an end in 3 s; rank 1 is at: batch of step 8; "
            "this is rank 0, at: update of step 7"
        ]
        parts = one.patience
        assert parts.collective - parts.interval < took < parts.collective + parts.explain + parts.leave
        assert runtime._of_collectives(4, "nccl").total_seconds() > parts.collective + parts.explain  # torch's own end
        assert runtime._of_collectives(4, "gloo").total_seconds() == pytest.approx(parts.collective)
    finally:
        one.stop()
        other.stop()


def test_a_busy_device_does_not_hang_while_the_main_thread_gets_on():
    left = []
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    one, other = watch(store, 0, leave=left.append, busy=lambda: True), watch(store, 1)
    try:
        until = time.monotonic() + one.patience.collective + 2 * one.patience.interval
        while time.monotonic() < until:
            one.at("evaluation")
            time.sleep(0.05)
        assert left == []
    finally:
        one.stop()
        other.stop()


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
