"""What a run needed, measured: peaks of the process, and bytes of live tensors counted one by one."""

import contextlib
import resource
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_before: dict[str, int] = {}  # peaks before something that does not count, "cuda" and "host"
RESET_PEAK = Path(
    "/proc/self/clear_refs"
)  # of Linux; "5" makes what is resident now the peak, see man proc_pid_clear_refs


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory of this process so far: allocated on the GPU, or resident in the host for a CPU run."""
    if device.type == "cuda":
        return max(_before.get("cuda", 0), int(torch.cuda.max_memory_allocated(device)))
    return peak_host_memory_bytes()


@contextlib.contextmanager
def uncounted(device: torch.device) -> Iterator[None]:
    """Memory that is used inside does not count as a peak; in the host, only where Linux lets peaks be reset."""
    if device.type == "cuda":
        _before["cuda"] = peak_memory_bytes(device)
    host = peak_host_memory_bytes()
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with contextlib.suppress(OSError):
            RESET_PEAK.write_text("5")
            _before["host"] = host


def device_memory_bytes(device: torch.device) -> int | None:
    """Memory of a GPU in all; None for a CPU, whose memory other processes use too."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def peak_host_memory_bytes() -> int:
    """Highest resident host memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(_before.get("host", 0), peak if sys.platform == "darwin" else peak * 1024)  # kilobytes on Linux


def host_memory_bytes() -> int:
    """Resident host memory of this process now."""
    return int(psutil.Process().memory_info().rss)


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, on any device: `with LiveTensors() as live: ...`.

    A storage counts from the operation that makes it until its last reference is gone, once, however many views it
    has. On the meta device that is what an allocator without rounding would hold, without its memory. What a kernel
    allocates for itself is not seen.

    now: bytes alive. peak: the most that were alive at a time.
    """

    def __init__(self, ignored: Iterable[torch.Tensor] = ()):
        """Count all but the storages of `ignored`, for example a model's weights."""
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._ignored = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in ignored)}

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, unless it counts already."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._alive or key in self._ignored:
            return
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        self._alive[key] = weakref.ref(storage, self._forget(key, size))

    def _forget(self, key: int, size: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            self.now -= size
            del self._alive[key]

        return forget

    def reset_peak(self) -> None:
        """Look for the highest value from now on."""
        self.peak = self.now

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it makes."""
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor):  # nearly always; a tree of them costs more to walk
            self.add(result)
        else:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.add(leaf)
        return result
