"""What a run remembers between checkpoints, and between log lines."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from irtune.distributed import runtime


@dataclass
class Progress:
    """State of a run, in plain JSON types.

    step: optimizer steps done. best: value of the best dev metric so far, at best_step.
    worse_in_a_row: evaluations since the best one. stopped: whether run.patience ended training.
    losses: mean losses of the steps since the last log line. seconds: wall time of the run, earlier sessions included;
    training_seconds: of these, what steps and later selections took, without evaluations and checkpoints.
    skipped: steps without an update, since loss or gradients were not finite; skipped_in_a_row: the last ones.
    state_bytes: optimizer state after each selection. trained_steps: updates of each layer.
    """

    step: int = 0
    best: float | None = None
    best_step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    training_seconds: float = 0.0
    worse_in_a_row: int = 0
    stopped: bool = False
    skipped: int = 0
    skipped_in_a_row: int = 0
    state_bytes: list[int] = field(default_factory=list)
    trained_steps: list[int] = field(default_factory=list)

    def updated(self, layers: list[int]) -> None:
        """A step has updated `layers`."""
        self.skipped_in_a_row = 0
        for layer in layers:
            self.trained_steps[layer] += 1

    def passed_over(self) -> None:
        """A step was skipped."""
        self.skipped += 1
        self.skipped_in_a_row += 1


@dataclass
class CompletedStep:
    """An optimizer step that was made, as far as the host knows without waiting for the device.

    step: its number, from 1. layers: those that it updated if it was applied. applied: 0-d bool on the device, the same
    on all ranks. loss: this rank's share of its mean loss, fp32 scalar; the mean over ranks is the loss.
    """

    step: int
    layers: list[int]
    applied: torch.Tensor
    loss: torch.Tensor


class Window:
    """Losses and counts of the steps since the last log line. Losses stay on the device until a line is due."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self._done: list[CompletedStep] = []
        self._losses: list[torch.Tensor] = []
        self.tokens = self.examples = self.positions = 0  # positions: tokens and padding

    def count(self, micro_batches: list[list[int]], *, packed: bool = False) -> None:
        """A step of micro-batches, whose examples have so many tokens; if not `packed`, padded to the longest."""
        for lengths in micro_batches:
            self.tokens += sum(lengths)
            self.examples += len(lengths)
            self.positions += sum(lengths) if packed else max(lengths) * len(lengths)

    def add(self, done: CompletedStep) -> None:
        """A step was made."""
        self._done.append(done)

    def count_applied_steps(self) -> Iterator[int]:
        """Find out which steps were applied, with one host read, and count them; yields the numbers of the skipped.

        To be used up: what is not asked for is not counted.
        """
        done, self._done = self._done, []
        if not done:
            return
        for one, applied in zip(done, torch.stack([one.applied for one in done]).tolist()):
            if applied:
                self._losses.append(one.loss)
                self.progress.updated(one.layers)
            else:
                self.progress.passed_over()
                yield one.step

    def drain(self) -> None:
        """Average the losses of the counted steps over ranks into `progress.losses`. Collective."""
        if self._losses:
            means = runtime.all_reduce(torch.stack(self._losses)) / runtime.launched_world_size()
            self.progress.losses += means.tolist()
            self._losses = []

    def mean(self) -> float | None:
        """Mean loss since the last line, after `drain`; None where every step was skipped. Starts a new window."""
        losses, self.progress.losses = self.progress.losses, []
        self.tokens = self.examples = self.positions = 0
        return sum(losses) / len(losses) if losses else None
