"""What pictures show: the numbers behind the colours and bars, and that odd runs can be drawn at all."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import LogNorm, Normalize

from irtune.tracking import pictures

pytestmark = pytest.mark.quick
NAN = float("nan")
STEPS, SCORES, TRAINED = [0, 2, 4], [[1.0, 2.0], [3.0, NAN], [5.0, 40.0]], [[True, False], [True, True], [False, True]]


def image(figure):
    """The values that are shown, [layers, columns], NaN where blank; and the image itself."""
    (shown,) = figure.axes[0].get_images()
    return np.ma.filled(np.ma.asarray(shown.get_array(), dtype=float), np.nan), shown


def words(axes):
    return [text.get_text() for text in axes.texts]


def test_scores_over_steps():
    figure = pictures.score_map(STEPS, SCORES, 6, "rms")
    axes, bar = figure.axes
    values, shown = image(figure)
    np.testing.assert_allclose(values, [[1, 1, 3, 3, 5, 5], [2, 2, NAN, NAN, 40, 40]])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "layer")
    assert bar.get_ylabel() == "layer score (rms)"
    assert shown.get_extent() == [0, 6, -0.5, 1.5]  # layer 0 at the bottom, step 0 at the left
    assert shown.origin == "lower"
    assert isinstance(shown.norm, LogNorm)
    assert (shown.norm.vmin, shown.norm.vmax) == (1, 40)
    assert {"1", "2", "5", "10", "20"} <= {label.get_text() for label in bar.get_yticklabels()}
    assert list(axes.get_yticks()) == [0, 1]
    assert all(tick == int(tick) for tick in axes.get_xticks())


def test_a_missing_score_is_white():
    picture = pictures.rgb(pictures.score_map(STEPS, SCORES, 6))
    height, width, _ = picture.shape
    column, upper, lower = round(width * (0.11 + 0.69 * 0.5)), round(height * 0.3), round(height * 0.7)
    assert (picture[upper, column] == 255).all()
    assert not (picture[lower, column] == 255).all()


@pytest.mark.parametrize(
    ("scores", "kind", "low", "high"),
    [
        ([[0.5, 0.9]], Normalize, 0.5, 0.9),  # less than a factor of 3
        ([[-0.5, 0.9]], Normalize, -0.5, 0.9),
        ([[0.0, 0.1, 5.0]], LogNorm, 0.1, 5.0),
        ([[1e-12, 1.0, 5.0]], LogNorm, 5e-6, 5.0),
        ([[0.0, 0.0]], Normalize, -0.5, 0.5),
        ([[2.0, 2.0]], Normalize, 1.0, 3.0),
        ([[float("inf"), NAN, 2.0, 3.0]], Normalize, 2.0, 3.0),
    ],
)
def test_colour_scales(scores, kind, low, high):
    figure = pictures.score_map([0], scores, 1)
    norm = image(figure)[1].norm
    assert type(norm) is type(kind(1, 2))
    assert (norm.vmin, norm.vmax) == pytest.approx((low, high))
    pictures.rgb(figure)


def test_zero_on_a_log_scale_has_the_lowest_colour_and_is_no_blank():
    _, shown = image(pictures.score_map([0], [[0.0, 0.1, 5.0]], 1))
    colours = shown.to_rgba(shown.get_array())
    np.testing.assert_array_equal(colours[0], colours[1])
    assert colours[0, 0, 3] == 1


def test_a_run_without_any_score():
    figure = pictures.score_map(STEPS, np.full((3, 2), NAN), 6)
    assert figure.axes[0].get_title() == "Layer scores: none known"
    assert len(figure.axes) == 1  # no colour bar for nothing
    assert np.isnan(image(figure)[0]).all()
    assert pictures.rgb(figure).dtype == np.uint8


def test_layers_trained():
    figure = pictures.trained_map(STEPS, TRAINED, 7)
    axes, bar = figure.axes
    np.testing.assert_allclose(image(figure)[0], [[1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1]], atol=1e-12)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "layer")
    assert [label.get_text() for label in bar.get_yticklabels()] == ["frozen", "trained"]
    same = pictures.score_map(STEPS, SCORES, 7).axes[0]
    assert axes.get_position().bounds == same.get_position().bounds
    assert (axes.get_xlim(), axes.get_ylim()) == (same.get_xlim(), same.get_ylim())


def test_share_of_steps():
    figure = pictures.share_bars(STEPS, TRAINED, 8)
    bars = figure.axes[0].patches
    assert [bar.get_width() for bar in bars] == pytest.approx([50, 75])  # 4 of 8 steps, 6 of 8
    assert figure.axes[0].get_xlim() == (0, 100)
    assert "%" in figure.axes[0].get_xlabel()
    assert list(pictures.share_of_steps([0], [[True, False]], 0)) == [0, 0]  # nothing has been trained yet


def test_a_selection_is_seen_before_it_has_trained():
    grid, left, right = pictures.over_steps([0, 10], [[1.0], [2.0]], 10)
    assert (left, right, grid.shape) == (0, 11, (1, 11))
    assert grid[0, -1] == pytest.approx(2)


def test_long_runs_show_means():
    steps = list(range(0, 4000, 2))
    trained = np.arange(2000)[:, None] % 2 == [0, 1]  # in turn: half of the steps each
    grid, _, right = pictures.over_steps(steps, trained, 4000)
    assert grid.shape == (2, 400)
    assert right == 4000
    assert grid.mean(1) == pytest.approx([0.5, 0.5])
    scores = np.where(np.arange(2000)[:, None] < 1000, [[1.0, NAN]], [[3.0, 5.0]])
    grid, _, _ = pictures.over_steps(steps, scores, 4000)
    assert np.isnan(grid[1, :200]).all()
    np.testing.assert_allclose(grid[:, 200:], np.repeat([[3.0], [5.0]], 200, axis=1))
    bar = pictures.trained_map(steps, trained, 4000).axes[1]
    assert bar.get_ylabel() == "share of steps trained"


@pytest.mark.parametrize("layers", [1, 80])
def test_few_and_many_layers(layers):
    rows = np.random.default_rng(0).random((5, layers))
    for draw, values in (
        (pictures.score_map, rows),
        (pictures.trained_map, rows > 0.5),
        (pictures.share_bars, rows > 0.5),
    ):
        figure = draw([0, 3, 6, 9, 12], values, 15)
        assert pictures.rgb(figure).shape == (462, 728, 3)
        ticks = [int(tick) for tick in figure.axes[0].get_yticks()]
        assert ticks[0] == 0
        assert len(ticks) <= 12
        assert max(ticks) < layers


def test_records_become_arrays():
    record = {"step": 4, "num_layers": 3, "scores": [1.0, None, 2.0], "selected": [2]}
    other = {"step": 6, "num_layers": 3, "scores": None, "selected": [0, 1]}
    steps, scores, trained = pictures.arrays([pictures.row(record), pictures.row(other)])
    assert steps == [4, 6]
    np.testing.assert_array_equal(scores, np.array([[1, NAN, 2], [NAN] * 3], dtype=np.float32))
    assert trained.tolist() == [[False, False, True], [True, True, False]]


def test_confusion_matrix():
    figure = pictures.confusion_map([[3, 1], [0, 0]], ["yes", "no"])
    axes, bar = figure.axes
    np.testing.assert_allclose(image(figure)[0], [[0.75, 0.25], [0, 0]])  # of the row; no example: nothing
    assert words(axes) == ["3", "1", "0", "0"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "label")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["yes", "no"]
    assert bar.get_ylabel() == "share of the label's examples"


@pytest.mark.parametrize(("classes", "numbers"), [(2, True), (20, True), (21, False), (120, False)])
def test_numbers_are_left_out_where_nobody_could_read_them(classes, numbers):
    names = [f"a very long name of the class number {number}" for number in range(classes)]
    figure = pictures.confusion_map(np.full((classes, classes), 7), names)
    assert len(words(figure.axes[0])) == (classes**2 if numbers else 0)
    assert max(pictures.rgb(figure).shape) <= 1200
    assert len(figure.axes[0].get_yticks()) <= 60
    assert all(len(label.get_text()) <= 22 for label in figure.axes[0].get_yticklabels())
    pictures.rgb(pictures.f1_bars([0.5] * classes, names, [3] * classes))


def test_f1_per_class():
    figure = pictures.f1_bars([1.0, 0.25], ["yes", "no"], [30, 4])
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [1.0, 0.25]
    assert words(axes) == ["1.00", "0.25"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["yes (30)", "no (4)"]
    assert axes.get_title() == "F1 per class (macro-F1 0.625)"
    assert axes.lines[0].get_xdata()[0] == 0.625
    assert axes.yaxis_inverted()  # the first class on top, as in the confusion matrix


def test_names_are_shown_as_they_are(recwarn):
    names = ["$a_{$ $", "中文", "a_b^c"]  # the first would be wrong mathematics
    for figure in (pictures.confusion_map(np.eye(3), names), pictures.f1_bars([0.1] * 3, names, [1] * 3)):
        assert pictures.rgb(figure).std() > 0
        assert [label.get_text().split(" (")[0] for label in figure.axes[0].get_yticklabels()] == names
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_matplotlib_is_loaded_late_and_without_pyplot():
    code = (
        "import sys, irtune.tracking.pictures as p; assert 'matplotlib' not in sys.modules; "
        "p.rgb(p.trained_map([0], [[True]], 1)); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
