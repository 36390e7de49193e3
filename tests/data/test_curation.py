"""Which labels are probably wrong: cases worked out by hand."""

import numpy as np
import pytest

from irtune.data.curation import filter_and_correct, suspicious_rows

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(("best", "action"), [(0.85, "relabelled"), (0.80, "dropped")])
def test_clear_drops_or_relabels_what_is_below_the_median(best, action):
    # Label 0 has .9, .2, .6, .4; the median is .5, so rows 0 and 2 stay.
    probabilities = np.array([[0.9, 0.1, 0.0], [0.2, best, 0.0], [0.6, 0.1, 0.3], [0.4, 0.3, 0.3]])
    changes = filter_and_correct(probabilities, np.zeros(4, dtype=int), 0.8)
    assert [(change.row, change.action, change.other) for change in changes] == [(1, action, 1), (3, "dropped", 1)]
    assert (changes[0].given, changes[0].best) == (0.2, best)
    assert "0.20, which is below the median of 0.50" in changes[0].reason


def test_the_label_that_a_row_has_is_not_another_one():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.05, 0.95]])  # own: .9, .1, .95; median .9
    (change,) = filter_and_correct(probabilities, np.array([0, 1, 1]), 0.8)
    assert (change.row, change.action, change.other) == (1, "relabelled", 0)


def test_rows_confidently_of_another_class_are_suspicious():
    # Means of their own probability: class 0 (.9 + .8 + .1) / 3 = .6, class 1 (.7 + .3) / 2 = .5, class 2 has no row.
    probabilities = np.array([[0.9, 0.1, 0], [0.8, 0.2, 0], [0.1, 0.5, 0.4], [0.3, 0.7, 0], [0.55, 0.3, 0.15]])
    changes = suspicious_rows(probabilities, np.array([0, 0, 0, 1, 1]))
    # Row 2 has .5 for class 1, which is its mean. Row 4 is not suspicious: .55 is below the mean of class 0.
    assert [(change.row, change.action, change.other) for change in changes] == [(2, "suspicious", 1)]
    assert "{other} 0.50 and {label} 0.10; rows labelled {other} get 0.50 on average" in changes[0].reason


def test_the_least_probable_come_first():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.1, 0.9], [0.0, 1.0]])
    changes = suspicious_rows(probabilities, np.array([0, 0, 0, 1]))
    assert [change.row for change in changes] == []  # class 1 has only a row of 1.0, and no other reaches that
    probabilities[3] = (0.2, 0.8)
    assert [change.row for change in suspicious_rows(probabilities, np.array([0, 0, 0, 1]))] == [2, 1]
