"""What the sides of benchmarks/speed share: turns, clock, memory, and the steps that stand for an epoch."""

import gc
import os
import random
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.memory.cases import Meter as TensorMeter
from irtune.data import BatchSampler
from irtune.distributed import runtime
from irtune.distributed.runtime import World

Batches = list[list[int]]  # the micro-batches of a step on all ranks: positions in the training split


@dataclass
class Turn:
    """What a turn took; counts are of the timed steps on all ranks.

    seconds: of each timed step; only their sum is exact on a GPU, which runs behind the host.
    cpu_seconds: of this process in the timed part, all threads together. Much less than threads x seconds: other work
        disturbed the turn.
    padded_tokens: what went through the model, tokens and padding.
    losses: what the side tells of its own accord, on rank 0.
    digests: of the token ids of every batch this rank saw, where they were asked for; the warm-up's too.
    selected, adapted: layers that trained in each timed step, and those that had trained till then, where the side
        knows.
    shapes: rows and length of this rank's micro-batches in each timed step.
    """

    seconds: list[float]
    examples: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    cpu_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    selected: list[list[int]] = field(default_factory=list)
    adapted: list[list[int]] = field(default_factory=list)
    shapes: list[list[tuple[int, int]]] = field(default_factory=list)


class Clock:
    """Is told of the end of every step; waits for the device at both ends of the timed part."""

    def __init__(self, device: torch.device):
        self.device = device
        self.begin(0, 0)

    def begin(self, warm_up: int, steps: int) -> None:
        """A new turn: after `warm_up` steps, `steps` count."""
        self.count, self.first, self.last = 0, warm_up, warm_up + steps
        self.marks: list[float] = []
        self._cpu: list[float] = []
        runtime.barrier()
        if warm_up == 0:
            self._mark()

    def tick(self) -> None:
        """A step has ended."""
        self.count += 1
        if self.first <= self.count <= self.last:
            self._mark()

    def _mark(self) -> None:
        if self.count in (self.first, self.last):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self._cpu.append(time.process_time())
        self.marks.append(time.perf_counter())

    def turn(self) -> Turn:
        """What was measured."""
        assert len(self.marks) == self.last - self.first + 1, "the side did not make all steps"
        seconds = [after - before for before, after in zip(self.marks, self.marks[1:])]
        return Turn(seconds, cpu_seconds=self._cpu[1] - self._cpu[0])


class Meter:
    """Peak memory of sides in bytes, though others wait beside them.

    On a GPU those of torch's allocator: what a side held before a turn, and the peak above that. On a CPU tensors are
    counted one by one in a turn of its own, since the process keeps what a side gives back.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.held: dict[str, int] = {}
        self.peaks: dict[str, int] = {}
        self._side, self._before = "", 0

    def begin(self, side: str) -> None:
        """From now on memory is that of `side`."""
        if self.on_gpu:
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            self._side, self._before = side, torch.cuda.memory_allocated()

    def end(self) -> None:
        """Count for the side what it took since `begin`, and keep its highest peak."""
        if self.on_gpu:
            held, peak = self.held.get(self._side, 0), torch.cuda.max_memory_allocated()
            self.peaks[self._side] = max(self.peaks.get(self._side, 0), held + peak - self._before)
            self.held[self._side] = held + torch.cuda.memory_allocated() - self._before

    def first_turn(self, name: str, side: Any) -> None:
        """On a CPU, count the tensors of two steps of a side that has not trained yet, the longest batch among them."""
        if not self.on_gpu and name not in self.peaks:
            with TensorMeter("cpu") as meter:
                meter.loaded(side.model)
                side.turn(1, 1)
                self.peaks[name] = meter.peak
            torch._dynamo.reset()  # what ran while tensors were counted is never compiled otherwise


def spread(sizes: Sequence[int], count: int, offset: float, seed: int) -> list[int]:
    """`count` positions at even quantiles of `sizes`, shuffled: few steps that stand for the whole epoch.

    Steps differ several times in length, so steps taken in order would compare lucky draws of lengths. `offset`, from
    0 to 1, moves the quantiles, so that rounds take other steps.
    """
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
    chosen = [order[min(len(order) - 1, int((k + offset) * len(order) / count))] for k in range(count)]
    random.Random(seed).shuffle(chosen)
    return chosen


def chosen_steps(
    epoch: list[Batches], lengths: Sequence[int], warm_up: int, steps: int, turn: int, *, packed: bool = False
) -> list[Batches]:
    """The steps of a turn out of an epoch: the longest and middling ones to warm up, then `steps` for the epoch.

    packed: there is no padding.
    """
    sizes = [
        max(sum(lengths[i] for i in batch) if packed else len(batch) * max(lengths[i] for i in batch) for batch in step)
        for step in epoch
    ]
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    warming = [order[-1] if number == 0 else order[len(order) // 2] for number in range(warm_up)]
    offset = (0.5 + turn * 0.618034) % 1.0
    return [epoch[i] for i in [*warming, *spread(sizes, steps, offset, turn)]]


class ChosenSteps:
    """Stands for irtune's sampler of batches, and takes the turns' steps out of its first epoch."""

    def __init__(self, sampler: BatchSampler):
        self.sampler, self.taken = sampler, []
        self.whole_epoch = [sampler.step(step) for step in range(sampler.steps_per_epoch)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def add_turn(self, warm_up: int, steps: int, turn: int) -> list[Batches]:
        """Choose the steps of another turn; returns its steps."""
        packed = self.sampler.packed
        new = chosen_steps(self.whole_epoch, self.sampler.lengths, warm_up, steps, turn, packed=packed)
        self.taken += new
        return new

    def step(self, step: int) -> Batches:
        """The micro-batches of optimizer step `step` of all turns so far."""
        return self.taken[step]


def counted(
    turn: Turn, steps: list[Batches], lengths: Sequence[int], width: int | None = None, *, packed: bool = False
) -> Turn:
    """Fill in examples and tokens of the timed `steps`; `width`: what every example is padded to; packed: nothing."""
    for batch in (batch for batches in steps for batch in batches):
        turn.examples += len(batch)
        turn.tokens += sum(lengths[i] for i in batch)
        longest = width or max(lengths[i] for i in batch)
        turn.padded_tokens += sum(lengths[i] for i in batch) if packed else len(batch) * longest
    return turn


def watch_batches(model: torch.nn.Module, seen: list[int] | None) -> Callable[[], None]:
    """Note a digest of the token ids of every training batch in `seen`; returns what ends that."""
    if seen is None:
        return lambda: None

    def note(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if module.training:
            seen.append(zlib.crc32(kwargs["input_ids"].cpu().numpy().tobytes()))

    return model.register_forward_pre_hook(note, with_kwargs=True).remove


def without_launcher(world: World) -> dict[str, str]:
    """Take the launcher's variables of a single process away, which make transformers wrap the model in DDP."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE") if world.size == 1 else ()
    return {name: os.environ.pop(name) for name in names if name in os.environ}
