"""Choosers and splits: hand-worked cases and the published code's outputs."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from irtune.config import TuningConfig
from irtune.errors import ConfigError
from irtune.selection import Observation, split_layers
from irtune.selection.chooser import sigmoid, weighted_sample
from irtune.selection.methods.adagradselect import AdaGradSelectChooser
from irtune.selection.methods.cyclic import CyclicChooser
from irtune.selection.methods.fixed import FullChooser, parse_layers
from irtune.selection.methods.grass import GrassChooser
from irtune.selection.methods.ir import IRChooser
from irtune.selection.methods.ist import IstChooser
from irtune.selection.methods.random_layers import LisaChooser, RandomChooser
from irtune.selection.methods.spectrum import top_by_votes
from irtune.selection.methods.topk import TopKChooser
from irtune.selection.registry import build_chooser, layer_budget
from irtune.selection.split import raise_lowest

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


def test_a_cost_weight_raises_the_lowest_layer_by_hand():
    scores = [9.0, 1.0, 8.0, 10.0]  # mass above 1: 8, 0, 7, 9
    chosen = [0, 3]  # mass 17; from layer 1 or 2 upwards: 2 and 3, mass 16
    # weight w: [0, 3] is worth 1 - w; [2, 3] is worth 16/17 - w/2; equal at w = 2/17
    assert raise_lowest(scores, chosen, 0.0) == [0, 3]
    assert raise_lowest(scores, chosen, 0.11) == [0, 3]
    assert raise_lowest(scores, chosen, 0.12) == [2, 3]
    assert raise_lowest([1.0, 1.0, 1.0], [0, 1], 5.0) == [0, 1]  # no mass to trade


@given(
    st.lists(st.floats(0, 1e3, allow_nan=False), min_size=2, max_size=24),
    st.floats(0, 2),
    st.floats(0, 2),
)
def test_a_higher_cost_weight_never_lowers_the_lowest_layer(scores, one, other):
    chosen = split_layers(scores)
    low, high = (raise_lowest(scores, chosen, weight) for weight in sorted((one, other)))
    assert len(low) == len(high) == len(chosen)
    assert min(high) >= min(low) >= min(chosen)


def test_the_ir_chooser_takes_the_cost_weight():
    seen = Observation(0, [9.0, 1.0, 8.0, 10.0], [])
    weights = {weight: IRChooser(4, cost_weight=weight, max_fraction=0.5).choose(seen) for weight in (0.0, 2.0)}
    assert weights == {0.0: [0, 3], 2.0: [2, 3]}
    built = build_chooser(TuningConfig(cost_weight=2.0, max_fraction=0.5), 4, 0)
    assert built.choose(seen) == [2, 3]


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


def test_ir_cuts_scores_against_their_own_means():
    chooser = IRChooser(3, own_mean=True, min_fraction=0.3)
    assert chooser.choose(Observation(1, [1.0, 1.0, 10.0], [])) == [2]  # no means yet
    assert chooser.choose(Observation(2, [3.0, 1.0, 10.0], [2])) == [0]  # ratios 3, 1, 1
    assert (chooser.totals, chooser.counts) == ([4.0, 2.0, 20.0], [2, 2, 2])
    assert chooser.choose(Observation(3, [1.0, 1.0, 30.0], [0])) == [2]  # 1 / 2, 1 / 1, 30 / 10
    bad = Observation(4, [float("inf"), 1.0, 1.0], [2])
    assert chooser.choose(bad) == [2] and chooser.counts == [3, 3, 3]


def test_adagradselect_explores_less_and_less():
    chooser = AdaGradSelectChooser(8, seed=3, count=2)
    scores = [0.0, 9.0, 0.0, 8.0, 0.0, 0.0, 0.0, 0.0]
    chosen = [chooser.choose(Observation(step, scores, [])) for step in range(0, 600, 10)]
    assert chosen[0] == [1, 3] and all(len(set(layers)) == 2 for layers in chosen)
    early, late = (sum(layers == [1, 3] for layers in part) for part in (chosen[:10], chosen[-10:]))
    assert early > late and sum(chooser.counts) == 120
    again = AdaGradSelectChooser(8, seed=3, count=2)
    again.load_state_dict(json.loads(json.dumps(chooser.state_dict())))
    seen = Observation(600, scores, [])
    assert chooser.choose(seen) == again.choose(seen)
    before = list(chooser.counts)
    assert chooser.choose(Observation(610, [float("nan")] * 8, [4])) == [4] and chooser.counts == before


def test_probe_chooses_once_from_the_first_scores():
    chooser = build_chooser(TuningConfig(method="probe"), 4, seed=0)
    assert chooser.first() is None and chooser.choose(Observation(0, [1.0, 4.0, 2.0, 3.0], [])) == [1, 3]
    assert not any(chooser.is_due(step) for step in range(1, 100))


@pytest.mark.parametrize("options", [{"ema": 0.5}, {"own_mean": True}])
def test_ir_state_survives_saving(options):
    first, second = IRChooser(3, **options), IRChooser(3, **options)
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
    chooser = RandomChooser(32, interval=1, seed=1, count=4)
    draws = [chooser.choose(Observation(step, None, [])) for step in range(200)]
    assert all(len(draw) == 4 == len(set(draw)) for draw in draws)
    counts = [sum(layer in draw for draw in draws) for layer in range(32)]
    assert min(counts) > 5 and max(counts) < 60  # 25 expected
    assert draws[7] == RandomChooser(32, interval=1, seed=1, count=4).choose(Observation(7, None, []))


# ----- draws and the methods built on them -----


def test_weighted_sample_follows_its_weights():
    import random

    rng = random.Random(0)
    counts = [0, 0, 0]
    for _ in range(4000):
        for index in weighted_sample([1.0, 2.0, 1.0], 1, rng):
            counts[index] += 1
    assert counts[1] == pytest.approx(2000, abs=130)
    assert weighted_sample([0.0, 1.0, 0.0], 1, rng) == [1]
    assert weighted_sample([1.0, 1.0, 1.0], 3, rng) == [0, 1, 2]


def test_lisa_keeps_its_draw_for_an_interval():
    chooser = LisaChooser(12, interval=5, seed=2, count=3)
    assert [step for step in range(1, 16) if chooser.is_due(step)] == [5, 10, 15]
    draws = [chooser.first(), chooser.choose(Observation(5, None, [])), chooser.choose(Observation(10, None, []))]
    assert all(len(set(draw)) == 3 for draw in draws)
    assert draws == [LisaChooser(12, 5, 2, count=3).sample(3, step) for step in (0, 5, 10)]


@pytest.mark.parametrize(
    ("order", "expected"),
    [("ascending", [[0, 1], [2, 3], [4], [0, 1]]), ("descending", [[4], [2, 3], [0, 1], [4]])],
)
def test_cyclic_visits_its_blocks_in_order(order, expected):
    chooser = CyclicChooser(5, interval=3, count=2, order=order)
    assert [chooser.first()] + [chooser.choose(Observation(step, None, [])) for step in (3, 6, 9)] == expected


def test_cyclic_at_random_visits_all_blocks_in_every_round():
    chooser = CyclicChooser(8, interval=1, seed=5, count=2, order="random")
    turns = [chooser.choose(Observation(step, None, [])) for step in range(40)]
    for start in range(0, 40, 4):
        assert sorted(layer for block in turns[start : start + 4] for layer in block) == list(range(8))
    assert len({str(turns[start : start + 4]) for start in range(0, 40, 4)}) > 1


def test_topk_by_hand():
    chooser = TopKChooser(5, count=2)
    assert chooser.choose(Observation(1, [1.0, 9.0, 3.0, 9.0, 9.0], [])) == [1, 3]
    assert chooser.choose(Observation(2, [None, None, 10.0, None, None], [1, 3])) == [1, 2]
    assert chooser.choose(Observation(3, [float("inf")] * 5, [1, 2])) == [1, 2]
    assert chooser.bad_in_a_row == 1


def test_grass_probabilities_by_hand():
    import math

    chooser = GrassChooser(2, count=1, sizes=[4, 4], temperature=0.5, ema=0.5)
    chooser.choose(Observation(1, [2.0, 4.0], []))  # m = (1, 2)
    assert chooser.probabilities() == pytest.approx([1 / (1 + math.exp(2)), math.exp(2) / (1 + math.exp(2))])
    chooser.choose(Observation(2, [6.0, 4.0], []))  # m = (.5 + 1.5, 1 + 1)
    assert chooser.probabilities() == pytest.approx([0.5, 0.5])


def test_ist_learns_from_trials_by_hand():
    import math

    chooser = IstChooser(4, count=1)
    trials = [([0, 1], 1.0), ([1, 2], 2.0), ([2, 3], 3.0)]
    chooser.choose(Observation(10, None, [], trials))
    gains = [math.exp(-1), math.exp(-2), math.exp(-3)]
    reward = [gain - sum(gains) / 3 for gain in gains]
    expected = [
        2.5 * r for r in (reward[0], reward[0] + reward[1], reward[1] + reward[2], reward[2])
    ]  # s (1 - s) = 1/4
    assert chooser.importance == pytest.approx(expected)
    again = IstChooser(4, count=1)
    again.load_state_dict(json.loads(json.dumps(chooser.state_dict())))
    assert again.choose(Observation(11, None, [])) == chooser.choose(Observation(11, None, []))


def test_ist_asks_for_three_halves_every_ten_steps():
    chooser = IstChooser(10, count=2)
    assert chooser.trials(9) == []
    sets = chooser.trials(10)
    assert [len(set(layers)) for layers in sets] == [5, 5, 5]
    assert chooser.trials(20) != sets


def test_layers_that_hurt_less_train_less():
    chooser = IstChooser(2, count=1)
    chooser.importance = [3.0, -3.0]  # suppressing layer 0 was harmless
    draws = [chooser.choose(Observation(step, None, []))[0] for step in range(1, 400)]
    assert sum(draws) > 330  # weights sigmoid(-3) : sigmoid(3) = .05 : .95
    assert sigmoid(-800) == 0.0


@pytest.mark.parametrize(
    ("text", "layers"), [("0-2", [0, 1, 2]), ("5, 1", [1, 5]), ("-1", [5]), ("0,2-3,-2", [0, 2, 3, 4])]
)
def test_layers_are_parsed(text, layers):
    assert parse_layers(text, 6) == layers


@pytest.mark.parametrize(("text", "part"), [("7", "'7'"), ("2-9", "'2-9'"), ("a", "'a'"), ("3-1", "'3-1'"), ("", "''")])
def test_layers_that_do_not_exist_are_refused(text, part):
    with pytest.raises(ValueError, match=part):
        parse_layers(text, 6)


def test_budgets():
    assert [layer_budget(value, 30) for value in (1, 30, 0.1, 1.0, 0.001)] == [1, 30, 3, 30, 1]
    for wrong in (0, 31, -1, 0.0, 1.5):
        with pytest.raises(ConfigError, match="accepted: 1 to 30 layers"):
            layer_budget(wrong, 30)


def test_a_budget_of_nothing_is_not_the_default():
    with pytest.raises(ConfigError, match=r"tuning\.budget is 0; accepted: 1 to 12 layers"):
        build_chooser(TuningConfig(method="lisa", budget=0), 12, seed=0)


@pytest.mark.parametrize("method", ["rst", "ist", "lisa", "cyclic", "grass", "topk", "ir"])
def test_every_method_keeps_to_the_budget(method):
    chooser = build_chooser(TuningConfig(method=method, budget=3, interval=1), 12, seed=0, sizes=[5] * 12)
    scores = [float(layer % 5) for layer in range(12)] if chooser.needs_scores else None
    for step in range(1, 9):
        assert len(chooser.choose(Observation(step, scores, []))) == 3


def test_spectrum_counts_votes_by_hand():
    # Top 2 of q: layers 1, 3; of up: 1, 2; of down: 0, 3. Votes 1, 2, 1, 2.
    ratios = {"q": [0.1, 0.9, 0.2, 0.8], "up": [0.0, 0.7, 0.6, 0.1], "down": [0.5, 0.1, 0.2, 0.4]}
    assert top_by_votes(ratios, 4, 2) == [1, 3]
    # Three of four: tops q 1, 3, 2; up 1, 2, 3; down 0, 3, 2. Votes 1, 2, 3, 3: layer 1 is the third.
    assert top_by_votes(ratios, 4, 3) == [1, 2, 3]
    # Equal votes: the lower mean rank, then the lower layer.
    assert top_by_votes({"q": [3.0, 2.0, 1.0], "v": [1.0, 2.0, 3.0]}, 3, 1) == [0]
    chooser = build_chooser(TuningConfig(method="spectrum", budget=2), 4, 0, ratios=ratios)
    assert chooser.first() == [1, 3]
    assert not any(chooser.is_due(step) for step in range(1, 50))


def test_layers_without_parameters_are_never_chosen():
    sizes = [0, 5, 5, 0, 5, 5]
    for method in ("ir", "rst", "ist", "lisa", "cyclic", "grass", "topk", "full", "spafit", "spectrum"):
        ratios = {"q": [6.0, 5, 4, 3, 2, 1]}
        chooser = build_chooser(TuningConfig(method=method), 6, 0, sizes, ratios)
        chosen = chooser.first()
        if chosen is None:
            chosen = chooser.choose(Observation(0, [9, 1, 8, 9, 2, 7], []))
        assert chosen and set(chosen) <= {1, 2, 4, 5}
        again = build_chooser(TuningConfig(method=method), 6, 0, sizes, ratios)
        again.load_state_dict(json.loads(json.dumps(chooser.state_dict())))
        seen = Observation(10, [9, 1, 8, 9, 2, 7], chosen, [([1, 2], 0.5), ([4, 5], 0.7), ([1, 4], 0.6)])
        assert again.choose(seen) == chooser.choose(seen)
    assert build_chooser(TuningConfig(method="ir"), 6, 0, sizes).choose(Observation(0, [9, 1, 8, 9, 2, 7], [])) == [
        2,
        5,
    ]
    ist = build_chooser(TuningConfig(method="ist"), 6, 0, sizes)
    assert all(set(layers) <= {1, 2, 4, 5} for layers in ist.trials(10))


def test_nothing_is_chosen_where_no_layer_has_parameters():
    assert build_chooser(TuningConfig(method="full"), 6, 0, [0] * 6).first() == []


def test_fixed_layers_must_have_parameters():
    with pytest.raises(ConfigError, match=r"layers \[0\] have no parameters"):
        build_chooser(TuningConfig(method="fixed", layers="0-2"), 4, 0, [0, 1, 1, 1])
