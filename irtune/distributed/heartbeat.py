"""Ranks that watch each other: who died, who hangs.

A thread on every rank counts in the store that the ranks met in, and looks whether the next rank's count still moves:
two small messages per rank and interval, however many ranks there are. So a dead rank is named even where a collective
only hangs. `doing` is the name of what a rank is at, which a time-out reports.

On a GPU a collective that hangs raises nothing: whatever comes after it waits, and with it the host, at its next read
or as soon as the queue of kernels is full, which for a large model is within a step. torch's own watchdog would end the
process without saying where. So the thread looks at the device, too: one that stays busy for as long as a collective
may wait, while the main thread does not get on either, hangs.
"""

import dataclasses
import datetime
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from irtune.distributed import environment, logs
from irtune.distributed.signals import StopSignals


@dataclasses.dataclass(frozen=True)
class Patience:
    """How a run's time-out is spent, in seconds: all that follows from a lost rank fits into it.

    A collective waits for a lost rank, then `explain` does; where the main thread hangs, it is `silent` and `grace`.
    """

    interval: float  # between two looks of a rank at the next one
    silent: float  # without a sign, after which a rank counts as dead
    grace: float  # that a rank has to end by itself when another one failed
    answer: float  # that the store has for an answer; three go unanswered before it is given up
    explain: float  # to find out who does not answer, when a collective has timed out
    leave: float  # to say so and end
    collective: float  # that a collective waits

    @classmethod
    def within(cls, timeout: float) -> "Patience":
        """The parts of `timeout`: all have a share of a short one, the collectives what is left of a long one."""
        interval, explain = min(2.0, timeout / 20), min(5.0, timeout / 6)
        grace, leave = min(10.0, timeout / 8), min(3.0, timeout / 8)
        silent = min(45.0, timeout - grace - leave - 2 * interval)
        return cls(
            interval=interval,
            silent=silent,
            grace=grace,
            answer=min(10.0, silent / 3 - interval),
            explain=explain,
            leave=leave,
            collective=timeout - explain - leave,
        )


class StoreClient:
    """A connection to the store whose every request is given up after `seconds`, with a RuntimeError.

    torch's own time-outs do not hold for all requests: over a cable that was cut, they wait until the kernel gives the
    connection up, which takes a quarter of an hour.
    """

    def __init__(self, store: dist.Store, seconds: float):
        store.set_timeout(datetime.timedelta(seconds=seconds))
        self._store, self.seconds = store, seconds
        self._waiting: set[queue.SimpleQueue] = set()
        self._closed = False
        self._requests: queue.SimpleQueue[tuple[str, tuple, queue.SimpleQueue]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="irtune-store", daemon=True).start()

    def _serve(self) -> None:
        while True:
            method, arguments, answer = self._requests.get()
            if method == "close":
                return
            try:
                answer.put((getattr(self._store, method)(*arguments), None))
            except RuntimeError as error:
                answer.put((None, error))

    def _ask(self, method: str, *arguments: Any) -> Any:
        answer: queue.SimpleQueue[tuple[Any, RuntimeError | None]] = queue.SimpleQueue()
        self._waiting.add(answer)
        if self._closed:
            answer.put((None, RuntimeError("the ranks' store is left")))
        self._requests.put((method, arguments, answer))
        try:
            value, error = answer.get(timeout=self.seconds)
        except queue.Empty:
            raise RuntimeError(f"no answer from the ranks' store in {self.seconds:.0f} s") from None
        finally:
            self._waiting.discard(answer)
        if error is not None:
            raise error
        return value

    def set(self, key: str, value: str) -> None:
        """Set a key."""
        self._ask("set", key, value)

    def get(self, key: str) -> bytes:
        """Value of a key that is there."""
        return bytes(self._ask("get", key))

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""
        return bool(self._ask("check", keys))

    def compare_set(self, key: str, expected: str, wanted: str) -> None:
        """Set a key where it has the value `expected`; an empty one: where it is not there."""
        self._ask("compare_set", key, expected, wanted)

    def close(self) -> None:
        """Nothing is asked any more, and who waits for an answer gets none."""
        self._closed = True
        self._requests.put(("close", (), queue.SimpleQueue()))
        for answer in list(self._waiting):
            answer.put((None, RuntimeError("the ranks' store is left")))


class Watch:
    """One rank's view of the others, and what told it to stop (`signals`). Alone, it watches nobody."""

    def __init__(
        self,
        store: dist.Store | None,
        rank: int,
        size: int,
        *,
        timeout: float = 1800.0,
        leave: Callable[[str], None] | None = None,
        busy: Callable[[], bool] = lambda: False,
    ):
        """Start to watch.

        Args:
            store: where the ranks met; None for a single rank.
            rank: number of this process.
            size: number of ranks.
            timeout: seconds within which this rank ends when another one is lost.
            leave: what ends this process when another rank failed and the main thread hangs.
            busy: whether the device has not done yet all that it was given, found out without waiting.
        """
        self.rank, self.size, self.patience = rank, size, Patience.within(timeout)
        self.doing, self._moves = "start", 0
        self.nodes: Sequence[str] = ()  # of each rank, where there are several
        self._leave, self._busy = leave or _leave, busy
        self._ended = threading.Event()
        self._lost = False  # the store, so that nobody can be reached
        self._store: dist.Store | None = None
        self.signals = StopSignals(None)
        if store is None or size == 1:
            return
        self._store = dist.PrefixStore("irtune/watch", store)
        self.signals = StopSignals(self._store)
        # A connection of its own: the other one may be waiting in a collective's set-up.
        own = dist.PrefixStore("irtune/watch", store.clone())  # type: ignore[attr-defined]
        self._pulse = StoreClient(own, self.patience.answer)
        self._thread = threading.Thread(target=self._keep_watch, name="irtune-watch", daemon=True)
        self._thread.start()

    def at(self, what: str) -> None:
        """The main thread begins something else."""
        self.doing = what
        self._moves += 1

    # ----- signs of life -----

    def _keep_watch(self) -> None:
        after = (self.rank + 1) % self.size
        last, count, failures, interval = b"", 0, 0, self.patience.interval
        heard = looked = moved = time.monotonic()
        moves, hangs = self._moves, False
        while not self._ended.wait(interval):
            now = time.monotonic()
            if now - looked > 3 * interval:
                heard = moved = now  # this process was halted itself: the others deserve another look
            looked, count = now, count + 1
            if moves != self._moves or not self._busy():
                moves, moved = self._moves, now
            elif not hangs and now - moved > self.patience.collective - interval:
                hangs = True  # told by another thread: were this one to stop, the others would blame this rank
                threading.Thread(target=self._tell_of_hang, args=(now - moved,), daemon=True).start()
            try:
                self._pulse.set(f"beat/{self.rank}", f"{count} {self.doing}")
                failure = self.failure()
                beat = self._pulse.get(f"beat/{after}") if self._pulse.check([f"beat/{after}"]) else b""
                failures = 0
            except RuntimeError:
                failures += 1
                if failures == 3 and not self._ended.is_set():
                    gone = f"{self.name(0)}, its launcher or the way to it is gone"
                    self._give_up(f"the ranks' common store does not answer: {gone}")
                continue
            if failure is not None:
                self._give_up(failure)
                return
            if beat != last or not beat:
                last, heard = beat, now
            elif now - heard > self.patience.silent:
                self.report(
                    f"{self.name(after)} has given no sign for {now - heard:.0f} s ({_place(beat)}); it died, hangs, "
                    "or its machine is gone"
                )

    def _give_up(self, why: str) -> None:
        """The main thread gets a while to notice by itself; a collective on a GPU never does."""
        if not self._ended.wait(self.patience.grace):
            self._leave(why)

    def _tell_of_hang(self, seconds: float) -> None:
        """End this process, whose device hangs: the main thread waits where Python cannot reach it."""
        what = f"{self.name(self.rank)}, at: {self.doing}: its device has not come to an end in {seconds:.0f} s"
        self._leave(f"{what}; {self.explain()}")

    def report(self, what: str) -> None:
        """Report to all ranks why the job fails; the first report is kept."""
        if self._store is not None and not self._lost:
            try:
                self._pulse.compare_set("failure", "", what)
            except RuntimeError:  # the store died with rank 0: the others will notice that
                return

    def failure(self) -> str | None:
        """What some rank reported, or None."""
        return self._pulse.get("failure").decode() if self._pulse.check(["failure"]) else None

    def explain(self) -> str:
        """Why a collective failed or timed out: a report, ranks without a sign of life, or where the ranks are."""
        if self._store is None:
            return "there is only this rank"
        deadline = time.monotonic() + self.patience.explain
        self._pulse.seconds = min(self._pulse.seconds, self.patience.explain)
        try:
            before = self._beats()
            while time.monotonic() < deadline:
                failure = self.failure()
                if failure is not None:
                    return failure
                time.sleep(min(0.2, self.patience.interval))
            now = self._beats()
        except RuntimeError:
            self._lost = True
            return f"{self.name(0)}, or the launcher that keeps the ranks' common store, is gone"
        silent = [rank for rank, beat in enumerate(now) if rank != self.rank and beat == before[rank]]
        if silent:
            places = ", ".join(f"{self.name(rank)} ({_place(now[rank])})" for rank in silent)
            return f"no sign of life from {places}: it died or was stopped"
        others = [rank for rank, beat in enumerate(now) if rank != self.rank and _what(beat) != self.doing]
        places = "; ".join(f"{self.name(rank)} is at: {_what(now[rank])}" for rank in others or range(self.size))
        return f"{places}; this is {self.name(self.rank)}, at: {self.doing}"

    def name(self, rank: int) -> str:
        """A rank's number, and its node where there are several."""
        return f"rank {rank}" + (f" on {self.nodes[rank]}" if self.nodes else "")

    def _beats(self) -> list[bytes]:
        keys = [f"beat/{rank}" for rank in range(self.size)]
        return [self._pulse.get(key) if self._pulse.check([key]) else b"" for key in keys]

    def stop(self) -> None:
        """End the thread; nothing is reported any more."""
        self._ended.set()
        if self._store is not None:
            self._pulse.close()
            self._thread.join(timeout=15)


def _what(beat: bytes) -> str:
    return beat.decode().partition(" ")[2]


def _place(beat: bytes) -> str:
    return f"when last heard of, at: {_what(beat)}" if beat else "never heard of"


def _leave(why: str) -> None:
    logs.last_words(why)
    sys.stderr.write(f"error on {environment.here()}: {why}\n")
    sys.stderr.flush()
    environment.leave()
