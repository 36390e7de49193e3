"""Cut sorted layer scores into a low and a high group; the high group is trained. Pure functions."""

import math
from collections.abc import Sequence

import numpy as np

# The published code searches its cut between these fractions of the layers, whatever the user asks for.
REFERENCE_WINDOW = (0.35, 0.65)


def split_layers(
    scores: Sequence[float],
    rule: str = "otsu",
    num_splits: int = 1,
    min_fraction: float = 0.10,
    max_fraction: float = 0.65,
) -> list[int]:
    """Return the layers whose scores stand out.

    Args:
        scores: one finite score per layer, length L; higher is more important.
        rule: `otsu` minimises the within-group sum of squares c*Var(low) + (L-c)*Var(high) (Otsu 1979; Jenks natural
            breaks for two classes); `reference` reproduces the published code of IR-Tuning, its quirks included.
        num_splits: the selected group is cut this many times (2: cut once more).
        min_fraction, max_fraction: with `otsu`, smallest and largest share of L in the high group (at least one layer).

    Returns:
        Ascending layer ids.

    Raises:
        ValueError: for an unknown rule, no layers, a score that is not finite, or `num_splits` below 1.
    """
    if rule not in ("otsu", "reference"):
        raise ValueError(f"unknown split rule {rule!r}; accepted: otsu, reference")
    if len(scores) == 0 or not all(math.isfinite(score) for score in scores):
        raise ValueError(f"scores must be finite and at least one, not {list(scores)}")
    if num_splits < 1:
        raise ValueError(f"num_splits must be at least 1, not {num_splits}")
    chosen = sorted(range(len(scores)), key=lambda layer: (scores[layer], layer))
    for _ in range(num_splits):
        ordered = np.array([scores[layer] for layer in chosen], dtype=np.float64)
        if rule == "reference":
            chosen = chosen[_reference_cut(ordered) :]
        else:
            chosen = chosen[_otsu_cut(ordered, min_fraction, max_fraction) :]
    return sorted(chosen)


def raise_lowest(scores: Sequence[float], chosen: Sequence[int], cost_weight: float) -> list[int]:
    """Trade a little score for a shorter backward pass, which ends at the lowest trained layer.

    Of all sets of as many layers as `chosen`, take the one with the greatest

        mass(S) / mass(chosen) - cost_weight * depth(S) / L,    mass(S) = sum over S of (score - smallest score),

    where depth(S) = L - min(S) is the number of layers that the backward pass goes through. For each lowest layer that
    is the set of the highest scores from there upwards.

    Args:
        scores: one finite score per layer, length L; higher is more important.
        chosen: the layers of the split.
        cost_weight: share of the score mass that is given up for the same share of the layers; 0 returns `chosen`.

    Returns:
        Ascending layer ids, as many as `chosen`. Ties go to the higher lowest layer.
    """
    floor, count = min(scores), len(scores)
    whole = sum(scores[layer] - floor for layer in chosen)
    if not cost_weight or not whole:
        return sorted(chosen)
    best, most = sorted(chosen), -math.inf
    for lowest in range(count - len(chosen) + 1):
        above = sorted(range(lowest, count), key=lambda layer: (-scores[layer], -layer))[: len(chosen)]
        mass = sum(scores[layer] - floor for layer in above)
        worth = mass / whole - cost_weight * (count - min(above)) / count
        if worth >= most:
            best, most = sorted(above), worth
    return best


def _otsu_cut(ordered: np.ndarray, min_fraction: float, max_fraction: float) -> int:
    """Size of the low group, from float64 `ordered` scores, shape [L]. Ties go to the smaller low group."""
    count = len(ordered)
    if count == 1:
        return 0
    # An epsilon keeps .65 * 20 = 13.000000000000002 from counting as more than 13.
    largest = min(count - 1, max(1, math.floor(max_fraction * count + 1e-9)))
    smallest = min(largest, max(1, math.ceil(min_fraction * count - 1e-9)))
    costs = {low: low * ordered[:low].var() + (count - low) * ordered[low:].var()
             for low in range(count - largest, count - smallest + 1)}  # fmt: skip
    return min(costs, key=lambda low: (costs[low], low))


def _reference_cut(ordered: np.ndarray) -> int:
    """Index from which the published code takes the layers; one layer of the low group comes along (its quirk)."""
    count = len(ordered)
    costs = [float(ordered[:low].var() + ordered[low:].var()) for low in range(1, count)]
    first, last = (int(fraction * count) for fraction in REFERENCE_WINDOW)
    window = costs[first : last + 1]
    # The smallest value of the window is looked up in the whole list, so an equal cost outside the window wins.
    return costs.index(min(window)) if window else 0
