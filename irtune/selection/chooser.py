"""What every chooser is: scores in, layer ids out, with a state that can be saved. No torch, no processes."""

import abc
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


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

    def __init__(self, num_layers: int, interval: int, seed: int):
        """Choose among `num_layers` layers, every `interval` optimizer steps (0: only once, at the start)."""
        self.num_layers = num_layers
        self.interval = interval
        self.seed = seed

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
