"""Optimizer state of deselected layers in host memory.

From a GPU it is copied into pinned memory on a stream of its own, so that the next step computes meanwhile, and comes
back on the stream of the step: the host waits for neither. torch rounds each pinned allocation up to a power of two
bytes, which nearly doubles many a tensor; a layer's are laid end to end in a few buffers that it hardly rounds.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, TypeVar

import torch

from irtune.engine.shards import StepState

PIECES = 5  # at most, per layer
FLOAT = 4  # bytes of an element: all state is fp32

Key = TypeVar("Key", bound=Hashable)


def pinned_pieces(elements: int) -> list[int]:
    """Sizes that make up `elements`: powers of two, but for the last, which is rounded up to one by 1/16 at most."""
    sizes: list[int] = []
    rest = elements
    while rest:
        power = 1 << (rest.bit_length() - 1)
        last = rest == power or 16 * (2 * power - rest) <= elements or len(sizes) == PIECES - 1
        sizes.append(rest if last else power)
        rest -= sizes[-1]
    return sizes


def pinned_bytes(elements: int) -> int:
    """Bytes of pinned memory that fp32 state of so many elements takes, torch's rounding included."""
    return FLOAT * sum(1 << (size - 1).bit_length() for size in pinned_pieces(elements))


class _Pinned:
    """State of one layer, from a GPU, and when its copy is done."""

    def __init__(self, states: Sequence[StepState], stream: torch.cuda.Stream):
        """Begin to copy it on `stream`, after all that the current stream has been given."""
        self._states = [
            ({name: torch.empty_like(tensor, device="meta") for name, tensor in state.tensors.items()}, state.step)
            for state in states
        ]
        tensors = [tensor for state in states for tensor in state.tensors.values()]
        elements = sum(tensor.numel() for tensor in tensors)
        self._buffers = [torch.empty(size, pin_memory=True) for size in pinned_pieces(elements)]
        self.nbytes, start = pinned_bytes(elements), 0
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for tensor in tensors:
                tensor.record_stream(stream)  # its memory is not given away before the copy is done
                self._copy(tensor, start, out=True)
                start += tensor.numel()
            self._done = torch.cuda.Event()
            self._done.record(stream)

    def _copy(self, tensor: torch.Tensor, start: int, *, out: bool) -> None:
        """Copy a tensor, in the order of its memory, to (`out`) or from the place that begins at element `start`."""
        for held, part in self._places(tensor.as_strided((tensor.numel(),), (1,)), start):
            if out:
                held.copy_(part, non_blocking=True)
            else:
                part.copy_(held, non_blocking=True)

    def _places(self, flat: torch.Tensor, start: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for buffer in self._buffers:
            low, high = max(start, 0), min(start + flat.numel(), buffer.numel())
            if low < high:
                yield buffer[low:high], flat[low - start : high - start]
            start -= buffer.numel()

    def states(self, device: torch.device) -> list[StepState]:
        """Copies on `device`: on the GPU its stream waits until they are whole, for the CPU the host does."""
        if device.type == "cuda":
            torch.cuda.current_stream().wait_event(self._done)
        else:
            self._done.synchronize()
        start, states = 0, []
        for likes, step in self._states:
            tensors = {name: torch.empty_like(like, device=device) for name, like in likes.items()}
            for tensor in tensors.values():
                self._copy(tensor, start, out=False)
                start += tensor.numel()
            states.append(StepState(tensors, step))
        return states


class Parking(Generic[Key]):
    """Optimizer state of layers that do not train, by layer.

    peak: the most bytes of host memory that it took at a time.
    """

    def __init__(self, device: torch.device):
        """`device`: where the state comes from and goes back to."""
        self._device, self.peak = device, 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._held: dict[Key, list[StepState] | _Pinned] = {}

    def put(self, key: Key, states: Sequence[StepState]) -> None:
        """Copy the states of a layer; the originals may be freed right away."""
        if self._stream is not None and all(tensor.is_cuda for state in states for tensor in state.tensors.values()):
            self._held[key] = _Pinned(states, self._stream)
        else:  # of a run on a CPU, of an offloaded optimizer, or of a checkpoint
            self._held[key] = [
                StepState({name: tensor.to("cpu", copy=True) for name, tensor in state.tensors.items()}, state.step)
                for state in states
            ]
        self.peak = max(self.peak, self.nbytes())

    def take(self, key: Key) -> list[StepState]:
        """The states of a layer, which are not parked any more; empty if there are none."""
        held = self._held.pop(key, [])
        return held.states(self._device) if isinstance(held, _Pinned) else held

    def keys(self) -> list[Key]:
        """Layers whose state is parked."""
        return list(self._held)

    def on_host(self, key: Key) -> list[StepState]:
        """The states of a parked layer, in host memory; they stay parked."""
        held = self._held[key]
        return held.states(torch.device("cpu")) if isinstance(held, _Pinned) else held

    def nbytes(self) -> int:
        """Bytes of host memory, what pinned memory is rounded by included."""
        return sum(
            held.nbytes if isinstance(held, _Pinned) else sum(state.nbytes() for state in held)
            for held in self._held.values()
        )

    def clear(self) -> None:
        """Free all of it. Copies that are under way keep their memory until they are done."""
        self._held.clear()
