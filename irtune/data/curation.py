"""Which labels of a corpus are probably wrong, from predictions of models that did not train on them.

The input is always out-of-fold probabilities, float [rows, classes], and the numbers of the given labels, int [rows].
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Change:
    """What happens to a row, by its position: it is `suspicious` only, `dropped`, or `relabelled` as `other`.

    given, best: probabilities of the label it has, and of `other`, the likeliest of the other labels. reason: a
    sentence's part, with {label} and {other} for their names.
    """

    row: int
    action: str
    other: int
    given: float
    best: float
    reason: str


def suspicious_rows(probabilities: np.ndarray, labels: np.ndarray) -> list[Change]:
    """Rows that are confidently predicted as another label, those with the least probability of their own first.

    Confident learning (Northcutt et al., JAIR 2021, section 3.1): a row is confidently of class j when p_j is at least
    the mean of p_j over the rows labelled j; of several such classes, the likeliest counts.
    """
    usual = np.full(probabilities.shape[1], np.inf)
    for label in set(labels.tolist()):
        usual[label] = probabilities[labels == label, label].mean()
    found = []
    for row, values in enumerate(probabilities):
        other = int(np.where(values >= usual, values, -1.0).argmax())
        if values[other] >= usual[other] and other != labels[row]:
            given, best = float(values[labels[row]]), float(values[other])
            reason = (
                f"models that did not see it give {{other}} {best:.2f} and {{label}} {given:.2f}; rows labelled "
                f"{{other}} get {usual[other]:.2f} on average"
            )
            found.append(Change(row, "suspicious", other, given, best, reason))
    return sorted(found, key=lambda change: change.given)


def filter_and_correct(probabilities: np.ndarray, labels: np.ndarray, correct: float) -> list[Change]:
    """CLEAR (Chen and Mueller 2024) for classes: what becomes of the rows whose label is less probable than the median.

    They get the likeliest other label where its probability is above `correct`, and are dropped otherwise. Those with
    the least probability of their own label come first.
    """
    own = probabilities[np.arange(len(labels)), labels]
    rest = probabilities.copy()
    rest[np.arange(len(labels)), labels] = -1.0
    median = float(np.median(own))
    found = []
    for row in np.flatnonzero(own < median).tolist():
        other, given = int(rest[row].argmax()), float(own[row])
        best = float(rest[row, other])
        better = best > correct
        reason = (
            f"{{label}} has {given:.2f}, which is below the median of {median:.2f}, and {{other}} {best:.2f}, which is "
            f"{'above' if better else 'not above'} {correct:g}"
        )
        found.append(Change(row, "relabelled" if better else "dropped", other, given, best, reason))
    return sorted(found, key=lambda change: change.given)
