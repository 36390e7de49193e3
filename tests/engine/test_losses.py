"""Losses against hand-computed values."""

import math

import pytest
import torch

from irtune.config import OptimConfig
from irtune.engine.contrastive import supervised_contrastive
from irtune.engine.losses import build_loss, class_balanced_weights, class_weights, cross_entropy
from irtune.errors import ConfigError

pytestmark = pytest.mark.quick
CPU = torch.device("cpu")
LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.5], [0.0, 1.0, 3.0]])
LABELS = torch.tensor([0, 1, 1])


def each(logits=LOGITS, labels=LABELS):
    """Cross-entropy of each example, by hand."""
    return [-math.log(math.exp(row[y]) / sum(map(math.exp, row))) for row, y in zip(logits.tolist(), labels.tolist())]


def test_cross_entropy_is_the_mean():
    assert float(cross_entropy(LOGITS, LABELS)) == pytest.approx(sum(each()) / 3)
    assert float(build_loss(OptimConfig(), [1, 2, 3], CPU)(LOGITS, LABELS)) == pytest.approx(sum(each()) / 3)


def test_effective_numbers_by_hand():
    # beta .5: 1 - .5^1 = .5, 1 - .5^2 = .75, 1 - .5^3 = .875, so weights .5 / these, scaled to a mean of 1 by example
    raw = [0.5 / 0.5, 0.5 / 0.75, 0.5 / 0.875]
    scale = 6 / (1 * raw[0] + 2 * raw[1] + 3 * raw[2])
    assert class_balanced_weights([1, 2, 3], 0.5).tolist() == pytest.approx([w * scale for w in raw])
    assert class_balanced_weights([5, 50], 0.0).tolist() == pytest.approx([1, 1])
    few, many = class_balanced_weights([10, 1000], 1 - 1e-9).tolist()
    assert few / many == pytest.approx(100, rel=1e-3)  # inverse frequency
    assert all(math.isfinite(w) for w in class_balanced_weights([0, 7], 0.999).tolist())


def test_class_balanced_divides_by_examples_so_that_micro_batches_may_be_spread():
    loss = build_loss(OptimConfig(loss="class_balanced", class_balance_beta=0.9), [50, 5, 20], CPU)
    weights = class_balanced_weights([50, 5, 20], 0.9).tolist()
    by_hand = sum(weights[y] * value for y, value in zip(LABELS.tolist(), each())) / 3
    assert float(loss(LOGITS, LABELS)) == pytest.approx(by_hand)
    parts = [float(loss(LOGITS[i : i + 1], LABELS[i : i + 1])) for i in range(3)]
    assert float(loss(LOGITS, LABELS)) == pytest.approx(sum(parts) / 3)


def test_focal_weighs_by_what_is_missing():
    by_hand = sum((1 - math.exp(-value)) ** 2 * value for value in each()) / 3
    assert float(build_loss(OptimConfig(loss="focal"), [1, 1, 1], CPU)(LOGITS, LABELS)) == pytest.approx(by_hand)
    plain = build_loss(OptimConfig(loss="focal", focal_gamma=0.0), [1, 1, 1], CPU)
    assert float(plain(LOGITS, LABELS)) == pytest.approx(sum(each()) / 3)


def test_label_smoothing_spreads_the_target():
    smooth = build_loss(OptimConfig(label_smoothing=0.3), [1, 1, 1], CPU)
    uniform = [sum(each(LOGITS[i : i + 1].repeat(3, 1), torch.arange(3))) / 3 for i in range(3)]
    by_hand = sum(0.7 * value + 0.3 * flat for value, flat in zip(each(), uniform)) / 3
    assert float(smooth(LOGITS, LABELS)) == pytest.approx(by_hand)


def test_bf16_logits_are_taken_in_fp32():
    loss = build_loss(OptimConfig(), [1, 1, 1], CPU)(LOGITS.bfloat16(), LABELS)
    assert loss.dtype == torch.float32


def test_class_weights_divide_by_examples_and_go_by_the_names_of_labels():
    by_hand = sum(weight * value for weight, value in zip((0.5, 3, 3), each())) / 3
    for given in ([0.5, 3, 1], {"a": 0.5, "b": 3}):
        loss = build_loss(OptimConfig(class_weights=given), [1, 2, 0], CPU, ["a", "b", "c"])
        assert float(loss(LOGITS, LABELS)) == pytest.approx(by_hand)
    focal = build_loss(OptimConfig(class_weights=[0.5, 3, 1], loss="focal"), [1, 2, 0], CPU, ["a", "b", "c"])
    hard = [(1 - math.exp(-value)) ** 2 * value for value in each()]
    assert float(focal(LOGITS, LABELS)) == pytest.approx(sum(w * v for w, v in zip((0.5, 3, 3), hard)) / 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([1, 2], r"has 2 weights for 3 labels; accepted: one for each of good, bad, ugly"),
        ({"god": 1}, r"'god' is not a label; did you mean 'good'\? accepted: good, bad, ugly"),
        ({"good": 0, "bad": 0, "ugly": 0}, r"no weight above 0"),
    ],
)
def test_class_weights_that_do_not_fit_the_labels_are_named(given, words):
    with pytest.raises(ConfigError, match=rf"optim\.class_weights.*{words}"):
        class_weights(OptimConfig(class_weights=given), ["good", "bad", "ugly"])


def test_weights_of_examples_keep_the_mean_over_examples():
    weights = torch.tensor([2.0, 0.0, 0.5])
    loss = build_loss(OptimConfig(), [1, 2, 0], CPU)
    by_hand = (2 * each()[0] + 0.5 * each()[2]) / 3
    assert float(loss(LOGITS, LABELS, weights)) == pytest.approx(by_hand)
    parts = [float(loss(LOGITS[i : i + 1], LABELS[i : i + 1], weights[i : i + 1])) for i in range(3)]
    assert sum(parts) / 3 == pytest.approx(by_hand)
    balanced = build_loss(OptimConfig(class_weights=[3.0, 1.0, 1.0]), [1, 2, 0], CPU)
    assert float(balanced(LOGITS, LABELS, weights)) == pytest.approx((6 * each()[0] + 0.5 * each()[2]) / 3)


def test_class_weights_name_labels_in_any_spelling():
    assert class_weights(OptimConfig(class_weights={"True": 2, "1.0": 3}), ["1", "true", "false"]) == [3, 2, 1]
    assert class_weights(OptimConfig(class_weights={"TRUE": 2}), ["TRUE", "x"]) == [2, 1]
    assert class_weights(OptimConfig(class_weights={"clarity": 0}), ["clarity", "style"]) == [0, 1]


# ----- mixup and contrast -----


def test_mixup_by_hand():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
    loss, mixed = build_loss(OptimConfig(), [1, 1], CPU), (torch.tensor(0.75), torch.tensor([1, 0]))
    assert float(loss(logits, labels, mixed=mixed)) == pytest.approx(0.563262, abs=1e-6)
    weights = torch.tensor([2.0, 0.0])  # of an example's share of each mixture
    by_hand = (2 * 0.75 * 0.313262 + 2 * 0.25 * 1.313262) / 2
    assert float(loss(logits, labels, weights, mixed=mixed)) == pytest.approx(by_hand, abs=1e-5)
    same = loss(LOGITS, LABELS, mixed=(torch.tensor(0.3), torch.arange(3)))
    assert float(same) == pytest.approx(float(cross_entropy(LOGITS, LABELS)))


def test_the_contrastive_loss_by_hand():
    states, labels = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 1])
    assert float(supervised_contrastive(states, labels, 1.0)) == pytest.approx(0.313262, abs=1e-6)
    assert float(supervised_contrastive(states, torch.arange(3), 1.0)) == 0.0  # nobody has a partner


def test_the_contrastive_loss_by_its_formula():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(7, 5, generator=generator, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 3])
    z, each = torch.nn.functional.normalize(states, dim=-1).double(), []
    for i in range(7):
        partners = [p for p in range(7) if p != i and labels[p] == labels[i]]
        others = sum(math.exp(float(z[i] @ z[a]) / 0.1) for a in range(7) if a != i)
        if partners:
            each.append(-sum(math.log(math.exp(float(z[i] @ z[p]) / 0.1) / others) for p in partners) / len(partners))
    found = supervised_contrastive(states, labels, 0.1)
    assert float(found) == pytest.approx(sum(each) / len(each), rel=1e-5)
    found.backward()
    assert states.grad.isfinite().all() and states.grad.abs().sum() > 0
