"""Seeded draws without replacement, shared by the choosers that sample layers."""

import math
import random
from collections.abc import Sequence


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
