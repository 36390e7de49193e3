"""Is one method better than another, or were the examples kind to it? A paired bootstrap over examples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
BLOCK = 1_000


@dataclass(frozen=True)
class Difference:
    """Macro-F1 of a method minus that of another: the value, its 95 % interval, and a two-sided p-value."""

    value: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    labels: Sequence[int] | np.ndarray,
    ours: Sequence[Sequence[int] | np.ndarray],
    theirs: Sequence[Sequence[int] | np.ndarray],
    classes: int,
    seed: int = 0,
) -> Difference:
    """Compare two methods on the same examples (Efron and Tibshirani 1993, ch. 16; Koehn, EMNLP 2004).

    Every resample draws examples with replacement, the same ones for both methods and for all their training
    seeds; a method's macro-F1 is the mean over its seeds. p is twice the smaller share of resamples whose difference
    is at most, or at least, 0.

    Args:
        labels: true class of each of n examples, or bool [n, classes] where an example may have several.
        ours, theirs: per training seed, the predicted class, or classes, of each example.
        classes: number of classes.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    n = len(labels)
    cells = [[_cells(labels, predicted, classes) for predicted in runs] for runs in (ours, theirs)]

    def difference(weights: np.ndarray) -> np.ndarray:
        means = [np.mean([_f1(weights @ cell, classes).mean(1) for cell in runs], axis=0) for runs in cells]
        return means[0] - means[1]

    observed = float(difference(np.ones((1, n)))[0])
    draws = [rng.multinomial(n, np.full(n, 1 / n), size=BLOCK).astype(float) for _ in range(RESAMPLES // BLOCK)]
    resampled = np.concatenate([difference(weights) for weights in draws])
    low, high = np.quantile(resampled, [0.025, 0.975])
    p = min(1.0, 2 * min(float((resampled <= 0).mean()), float((resampled >= 0).mean())))
    return Difference(observed, float(low), float(high), p)


def intervals(
    labels: Sequence[int] | np.ndarray, predicted: Sequence[int] | np.ndarray, classes: int, seed: int = 0
) -> dict[str, list[float]]:
    """95 % intervals [low, high] of micro-F1 and macro-F1, by a bootstrap over examples; arguments as above.

    Where every example has one class, micro-F1 is the accuracy and is called so.
    """
    rng = np.random.default_rng(seed)
    n = len(labels)
    cells = _cells(labels, predicted, classes)
    micro_f1, macro_f1 = [], []
    for _ in range(RESAMPLES // BLOCK):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=BLOCK).astype(float) @ cells
        macro_f1.append(_f1(counts, classes).mean(1))
        micro_f1.append(_f1(counts.reshape(BLOCK, 2, classes).sum(2), 1)[:, 0])
    name = "accuracy" if np.ndim(labels) == 1 else "micro_f1"
    found = {name: np.concatenate(micro_f1), "macro_f1": np.concatenate(macro_f1)}
    return {name: [float(edge) for edge in np.quantile(values, [0.025, 0.975])] for name, values in found.items()}


def _cells(labels: Sequence[int] | np.ndarray, predicted: Sequence[int] | np.ndarray, classes: int) -> np.ndarray:
    """What each example adds to every class's hits, and to labels plus predictions, float64 [n, 2 * classes]."""
    wanted, given = (
        np.eye(classes)[np.asarray(values)] if np.ndim(values) == 1 else np.asarray(values, dtype=float)
        for values in (labels, predicted)
    )
    return np.concatenate([wanted * given, wanted + given], axis=1)


def _f1(counts: np.ndarray, classes: int) -> np.ndarray:
    """F1 from sums of cells [resamples, 2 * classes], [resamples, classes]; 0 for classes that do not occur."""
    hits, total = counts[:, :classes], counts[:, classes:]  # total: 2 tp + fp + fn
    return np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0)
