"""SIGTERM and SIGINT end a run after a step that all ranks agree on, so that its checkpoint is whole."""

import contextlib
import signal
from collections.abc import Iterator

import torch.distributed as dist


class StopSignals:
    """What told this rank to stop, and when all ranks do.

    received: number of the signal; None where there was none.
    """

    def __init__(self, store: dist.Store | None):
        """`store`: common to all ranks; None for a single rank."""
        self.received: int | None = None
        self._store = store
        self._announced = False

    def remember(self, number: int, _frame: object = None) -> None:
        """A signal handler: the run ends at the end of a step. The same signal again ends it at once."""
        self.received = number
        signal.signal(number, signal.SIG_DFL)

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """SIGTERM and SIGINT are remembered inside the block, instead of ending the process."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self.remember) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stops_after(self, step: int, behind: int = 0) -> int | None:
        """The signal on which all ranks end after optimizer step `step`, or None.

        No rank can end step s + 1 before all have begun it, since its gradients are summed over ranks. So what a rank
        announces between s and s + 1 is seen by all at the end of s + 1, and costs no collective.

        Args:
            step: the caller has begun it.
            behind: steps that the caller's device may not have ended yet, `step` among them; the same on all ranks.
                A stop is announced for so many steps later.
        """
        if self._store is None:
            return self.received
        if not self._store.check(["stop"]):
            if self.received is not None and not self._announced:
                self._announced = True
                self._store.compare_set("stop", "", f"{step + 1 + behind} {self.received}")
            return None
        at, number = self._store.get("stop").split()
        return int(number) if step >= int(at) else None
