"""Choosers and splits: hand-worked cases and the published code's outputs."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from irtune.config import TuningConfig
from irtune.selection import FullChooser, IRChooser, Observation, RandomChooser, build_chooser, split_layers

pytestmark = pytest.mark.quick
CASES = json.loads((Path(__file__).parent / "cases/reference_split_cases.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['num_layers']}-{c['kind']}-{c['num_splits']}")
def test_reference_rule_matches_the_published_code(case):
    assert split_layers(case["scores"], rule="reference", num_splits=case["num_splits"]) == case["selected"]


def test_there_are_forty_reference_cases():
    assert len(CASES) == 40


def test_otsu_by_hand():
    # Cuts of (1, 2, 8, 9), costs: {1 | 2 8 9} = 0 + 28.67; {1 2 | 8 9} = .5 + .5; {1 2 8 | 9} = 28.67.
    assert split_layers([8, 1, 9, 2]) == [0, 2]
    # min_fraction 0 allows one layer, but the clear cut has two.
    assert split_layers([0, 0, 0, 10, 11], min_fraction=0.0) == [3, 4]
    # max_fraction .25 of 4 layers is one layer.
    assert split_layers([8, 1, 9, 2], max_fraction=0.25) == [2]


def test_otsu_splits_again():
    # First cut leaves (8, 9, 20); the second separates 20.
    assert split_layers([1, 2, 8, 9, 20, 1], num_splits=1) == [4]
    assert split_layers([1, 8, 2, 9, 30, 31], num_splits=1, max_fraction=0.9) == [4, 5]
    assert split_layers([1, 1, 1, 1, 8, 9, 20, 21], num_splits=1, min_fraction=0.3) == [5, 6, 7]


def test_ties_go_to_the_lower_layer_first():
    # All equal: every cut costs nothing, so the largest allowed group is taken, without the lowest layers.
    assert split_layers([5.0] * 10) == [4, 5, 6, 7, 8, 9]


@given(
    st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=60),
    st.floats(0, 1),
    st.floats(0.01, 1),
    st.integers(1, 4),
)
def test_otsu_keeps_its_bounds(scores, low, high, splits):
    low = min(low, high)
    chosen = split_layers(scores, min_fraction=low, max_fraction=high, num_splits=splits)
    assert chosen == sorted(set(chosen))
    assert 1 <= len(chosen) <= max(1, high * len(scores) + 1e-6)
    if splits == 1 and len(scores) > 1:
        assert len(chosen) >= min(
            max(1, low * len(scores) - 1e-6), max(1, int(high * len(scores) + 1e-9)), len(scores) - 1
        )
        lowest_chosen = min(scores[i] for i in chosen)
        assert all(scores[i] <= lowest_chosen for i in range(len(scores)) if i not in chosen)


@pytest.mark.parametrize("scores", [[], [1.0, float("nan")], [float("inf"), 1.0]])
def test_split_refuses_what_it_cannot_sort(scores):
    with pytest.raises(ValueError, match="finite"):
        split_layers(scores)


def test_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="accepted: otsu, reference"):
        split_layers([1, 2], rule="jenks")


def test_ir_keeps_the_selection_when_a_score_is_not_finite():
    chooser = IRChooser(4)
    assert chooser.choose(Observation(1, [1, 1, 9, 9], [])) == [2, 3]
    assert chooser.choose(Observation(2, [float("nan"), 1, 1, 1], [2, 3])) == [2, 3]
    assert chooser.bad_in_a_row == 1
    assert chooser.scores == [1, 1, 9, 9]
    assert chooser.choose(Observation(3, [9, 1, 1, 1], [2, 3])) == [0]
    assert chooser.bad_in_a_row == 0


def test_ir_smooths_scores():
    chooser = IRChooser(2, ema=0.75)
    chooser.choose(Observation(1, [4.0, 0.0], []))
    chooser.choose(Observation(2, [0.0, 4.0], []))
    assert chooser.scores == [3.0, 1.0]  # .75 * 4 + .25 * 0 and .75 * 0 + .25 * 4


def test_stale_scores_stay_and_unknown_ones_are_zero():
    chooser = IRChooser(4, rule="otsu")
    assert chooser.choose(Observation(1, [None, None, 5.0, 6.0], [2, 3])) == [2, 3]
    assert chooser.choose(Observation(2, [None, None, 0.1, 7.0], [2, 3])) == [3]
    assert chooser.choose(Observation(3, [None, None, None, 8.0], [3])) == [3]
    assert chooser.scores == [None, None, 0.1, 8.0]


def test_ir_state_survives_saving():
    first, second = IRChooser(3, ema=0.5), IRChooser(3, ema=0.5)
    first.choose(Observation(1, [1.0, None, 3.0], []))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    seen = Observation(2, [2.0, 4.0, 1.0], [2])
    assert first.choose(seen) == second.choose(seen)


def test_reference_preset_starts_from_a_random_half():
    chooser = build_chooser(TuningConfig(first="random_half", interval=1), 30, seed=3)
    first = chooser.first()
    assert first is not None and len(first) == 15
    assert first == build_chooser(TuningConfig(first="random_half", interval=1), 30, seed=3).first()
    assert first != build_chooser(TuningConfig(first="random_half", interval=1), 30, seed=4).first()


def test_full_trains_everything_and_never_selects():
    chooser = FullChooser(5)
    assert chooser.first() == [0, 1, 2, 3, 4]
    assert not any(chooser.is_due(step) for step in range(1, 50))


def test_rst_draws_its_fraction_anew():
    chooser = RandomChooser(32, interval=1, seed=1, fraction=0.125)
    draws = [chooser.choose(Observation(step, None, [])) for step in range(200)]
    assert all(len(draw) == 4 == len(set(draw)) for draw in draws)
    counts = [sum(layer in draw for draw in draws) for layer in range(32)]
    assert min(counts) > 5 and max(counts) < 60  # 25 expected
    assert draws[7] == RandomChooser(32, interval=1, seed=1, fraction=0.125).choose(Observation(7, None, []))
