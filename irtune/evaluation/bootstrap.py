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
    labels: Sequence[int], ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], classes: int, seed: int = 0
) -> Difference:
    """Compare two methods on the same examples (Efron and Tibshirani 1993, ch. 16; Koehn, EMNLP 2004).

    Every resample draws examples with replacement, the same ones for both methods and for all their training
    seeds; a method's macro-F1 is the mean over its seeds. p is twice the smaller share of resamples whose difference
    is at most, or at least, 0.

    Args:
        labels: true class of each of n examples.
        ours, theirs: per training seed, the predicted class of each example.
        classes: number of classes.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    n = len(labels)
    cells = [[_cells(labels, predicted, classes) for predicted in runs] for runs in (ours, theirs)]

    def difference(weights: np.ndarray) -> np.ndarray:
        means = [np.mean([_macro_f1(weights @ cell, classes) for cell in runs], axis=0) for runs in cells]
        return means[0] - means[1]

    observed = float(difference(np.ones((1, n)))[0])
    draws = [rng.multinomial(n, np.full(n, 1 / n), size=BLOCK).astype(float) for _ in range(RESAMPLES // BLOCK)]
    resampled = np.concatenate([difference(weights) for weights in draws])
    low, high = np.quantile(resampled, [0.025, 0.975])
    p = min(1.0, 2 * min(float((resampled <= 0).mean()), float((resampled >= 0).mean())))
    return Difference(observed, float(low), float(high), p)


def intervals(labels: Sequence[int], predicted: Sequence[int], classes: int, seed: int = 0) -> dict[str, list[float]]:
    """95 % intervals [low, high] of accuracy and macro-F1, by a bootstrap over examples."""
    rng = np.random.default_rng(seed)
    n = len(labels)
    cells = _cells(labels, predicted, classes)
    accuracy, macro_f1 = [], []
    for _ in range(RESAMPLES // BLOCK):
        confusion = rng.multinomial(n, np.full(n, 1 / n), size=BLOCK).astype(float) @ cells
        macro_f1.append(_macro_f1(confusion, classes))
        accuracy.append(np.einsum("rcc->r", confusion.reshape(-1, classes, classes)) / n)
    found = {"accuracy": np.concatenate(accuracy), "macro_f1": np.concatenate(macro_f1)}
    return {name: [float(edge) for edge in np.quantile(values, [0.025, 0.975])] for name, values in found.items()}


def _cells(labels: Sequence[int], predicted: Sequence[int], classes: int) -> np.ndarray:
    """One-hot place of each example in the confusion matrix, float64 [n, classes * classes]."""
    return np.eye(classes * classes)[np.asarray(labels) * classes + np.asarray(predicted)]


def _macro_f1(confusion: np.ndarray, classes: int) -> np.ndarray:
    """Macro-F1 of flat confusion matrices [resamples, classes * classes]; classes that do not occur count as 0."""
    matrix = confusion.reshape(-1, classes, classes)
    right = np.einsum("rcc->rc", matrix)
    total = matrix.sum(1) + matrix.sum(2)  # 2 tp + fp + fn
    return np.divide(2 * right, total, out=np.zeros_like(right), where=total > 0).mean(1)
