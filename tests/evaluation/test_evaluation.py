"""Metrics against scikit-learn, and exact evaluation over ranks."""

import numpy
import pytest
import torch
from sklearn import metrics as oracle

from irtune.distributed import runtime
from irtune.evaluation.metrics import Predictions, metrics, predict
from tests.support.ranks import run_ranks


def random_predictions(examples: int, classes: int, present: int, seed: int) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, present, (examples,), generator=generator)
    logits = torch.randn(examples, classes, generator=generator) + 2 * torch.nn.functional.one_hot(labels, classes)
    return Predictions(logits, labels)


@pytest.mark.quick
@pytest.mark.parametrize(("classes", "present"), [(2, 2), (5, 5), (6, 4)])
def test_metrics_equal_scikit_learn(classes, present):
    predictions = random_predictions(200, classes, present, seed=classes)
    names = [f"class {c}" for c in range(classes)]
    ours = metrics(predictions, names)
    true, guess = predictions.labels.numpy(), predictions.logits.argmax(-1).numpy()
    every = {"labels": range(classes), "zero_division": 0}
    precision, recall, f1, support = oracle.precision_recall_fscore_support(true, guess, **every)
    assert ours["accuracy"] == pytest.approx(oracle.accuracy_score(true, guess))
    assert ours["macro_f1"] == pytest.approx(oracle.f1_score(true, guess, average="macro", **every))
    assert ours["macro_precision"] == pytest.approx(precision.mean())
    assert ours["macro_recall"] == pytest.approx(recall.mean())
    for c, name in enumerate(names):
        row = ours["per_class"][name]
        assert (row["precision"], row["recall"], row["f1"]) == pytest.approx((precision[c], recall[c], f1[c]))
        assert row["examples"] == support[c]
    assert ours["confusion_matrix"] == oracle.confusion_matrix(true, guess, labels=range(classes)).tolist()
    scores = predictions.probabilities.numpy()
    areas = [oracle.average_precision_score(true == c, scores[:, c]) if c < present else 0.0 for c in range(classes)]
    assert ours["auprc"] == pytest.approx(numpy.mean(areas), abs=1e-5)
    assert ours["loss"] == pytest.approx(oracle.log_loss(true, scores, labels=range(classes)), rel=1e-4)


@pytest.mark.quick
def test_a_class_without_an_example_counts_in_one_macro_f1_only():
    labels = torch.tensor([0, 0, 1, 1])
    logits = 10 * torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 2]), 4).float()
    found = metrics(Predictions(logits, labels), ["a", "b", "c", "d"])  # F1: 1, 2/3; c is predicted only, d is nowhere
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3 + 0 + 0) / 4)
    assert found["macro_f1_present"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["per_class"]["d"]["examples"] == 0


def test_a_perfect_and_a_hopeless_prediction():
    labels = torch.tensor([0, 1, 2])
    assert metrics(Predictions(torch.eye(3) * 9, labels), ["a", "b", "c"])["macro_f1"] == 1.0
    wrong = metrics(Predictions(torch.eye(3).roll(1, 0) * 9, labels), ["a", "b", "c"])
    assert (wrong["accuracy"], wrong["macro_f1"]) == (0.0, 0.0)


def predict_echo(examples):
    """A model whose logits are the token ids of its input, so that every example can be recognised."""
    world = runtime.read_world()
    runtime.start(world, 60)
    encoded = [{"input_ids": [i + 1] + [1] * (i % 5)} for i in range(examples)]

    def forward(batch):
        return torch.stack([batch["input_ids"][:, 0], -batch["input_ids"][:, 0]], dim=1).float()

    result = predict(forward, encoded, [0] * examples, 2, batch_size=3, pad_token_id=0, device=world.device)
    runtime.stop()
    return result.logits[:, 0].tolist()


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("examples", [1, 7, 20])
def test_every_example_counts_once_in_its_own_place(world, examples):
    for logits in run_ranks(predict_echo, world, examples):
        assert logits == [i + 1 for i in range(examples)]
