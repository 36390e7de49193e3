"""What every chooser is: scores in, layer ids out, with a state that can be saved. No torch, no processes."""

import abc
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from irtune.config.schema import TuningConfig


@dataclass(frozen=True)
class Observation:
    """What a chooser may look at. The same on every rank.

    step: optimizer steps done so far.
    scores: one score per layer, higher is more important; None where the layer has no fresh score. None as a whole
        when the chooser did not ask for scores.
    selected: the layers trained at present, ascending.
    trials: for each set of layers that the chooser asked to suppress, the set and the mean loss over all ranks.
    """

    step: int
    scores: Sequence[float | None] | None
    selected: Sequence[int]
    trials: Sequence[tuple[Sequence[int], float]] = ()


@dataclass(frozen=True)
class Candidates:
    """What a method builds its chooser from: the layers that have parameters, numbered from 0.

    num_layers: how many there are, L.
    seed: of everything random.
    count: how many of them the budget lets train at a time; L where there is no budget.
    sizes: trainable parameters of each, length L.
    ratios: L signal-to-noise ratios per module type; empty where the method needs none.
    """

    num_layers: int
    seed: int
    count: int
    sizes: Sequence[int]
    ratios: Mapping[str, Sequence[float]]


class Chooser(abc.ABC):
    """Chooses the layers to train. Ranks agree because they see the same observations and the same seed."""

    needs_scores = False
    bad_in_a_row = 0  # selections whose scores were not finite

    def __init__(self, num_layers: int, interval: int = 10, seed: int = 0, *, count: int = 1):
        """Choose `count` of `num_layers` layers, every `interval` optimizer steps (0: only once, at the start).

        Choosers whose number of layers is not fixed do not look at `count`.
        """
        self.num_layers, self.interval, self.seed, self.count = num_layers, interval, seed, count

    @classmethod
    def from_config(cls, tuning: TuningConfig, candidates: Candidates) -> "Chooser":
        """What most methods declare as theirs: a chooser that takes nothing else than its constructor here."""
        return cls(candidates.num_layers, tuning.interval, candidates.seed, count=candidates.count)

    def first(self) -> list[int] | None:
        """Layers to start with; None: choose from scores of a probe of the first global batch."""
        return None

    def is_due(self, step: int) -> bool:
        """Whether a selection follows optimizer step `step` (counted from 1)."""
        return self.interval > 0 and step % self.interval == 0

    def trials(self, step: int) -> list[list[int]]:
        """Sets of layers whose adapters are to be suppressed for a measurement of the loss after `step`."""
        return []

    @abc.abstractmethod
    def choose(self, seen: Observation) -> list[int]:
        """Return ascending ids of the layers to train from now on."""

    def state_dict(self) -> dict[str, Any]:
        """State in plain JSON types."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  # most choosers have none
        """Go on from a saved `state_dict()`."""

    def random(self, step: int) -> random.Random:
        """A generator that depends on the seed and the step only: equal on all ranks, and nothing to save."""
        return random.Random(f"{type(self).__name__}/{self.seed}/{step}")

    def sample(self, count: int, step: int) -> list[int]:
        """`count` different layers, uniformly at random."""
        return sorted(self.random(step).sample(range(self.num_layers), count))


class ScoreChooser(Chooser):
    """Remembers scores, which survive a checkpoint, and counts selections whose scores are not finite."""

    needs_scores = True
    scores: list[Any]  # of length L

    def are_finite(self, scores: Sequence[float | None]) -> bool:
        """Whether fresh scores can be used; counts those in a row that cannot."""
        finite = all(score is None or math.isfinite(score) for score in scores)
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
        return finite

    def state_dict(self) -> dict[str, Any]:
        """Scores (length L, null where unknown) and the count of bad selections in a row."""
        return {"scores": list(self.scores), "bad_in_a_row": self.bad_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over remembered scores and the count of bad selections."""
        self.scores = list(state["scores"])
        self.bad_in_a_row = int(state["bad_in_a_row"])


def weighted_sample(weights: Sequence[float], count: int, rng: random.Random) -> list[int]:
    """`count` different indices, drawn one after the other with probability proportional to `weights`, ascending.

    Each index gets the key log(u) / weight and the largest keys win, which is the same as drawing without replacement
    (Efraimidis and Spirakis 2006, algorithm A). Indices of weight 0 come last.
    """
    keys = [math.log(1.0 - rng.random()) / weight if weight > 0 else -math.inf for weight in weights]
    order = sorted(range(len(weights)), key=lambda index: (-keys[index], index))
    return sorted(order[:count])


def sigmoid(value: float) -> float:
    """1 / (1 + exp(-value)), without overflow."""
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
