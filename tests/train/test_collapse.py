"""A run that predicts one class only says so, and what to change."""

import json

import pytest
import torch

from irtune.config import load_config
from irtune.evaluation.metrics import Predictions
from irtune.train.collapse import collapse
from tests.support.runs import launch
from tests.support.tiny import tiny_config

LOGITS = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.5, 0.1], [0.0, 3.0, 1.0]])


@pytest.mark.quick
@pytest.mark.parametrize(
    "options, advice",
    [
        (["--data.prompt=tagged"], "optim.loss class_balanced, or data.prompt diff with model.pooling mean+edit"),
        (["--model.pooling=class", "--optim.loss=class_balanced"], "optim.warmup_steps, or model.pooling mean+edit"),
        (
            ["--data.prompt=tagged", "--optim.warmup_fraction=0.1", "--optim.class_weights=[1, 2, 3]"],
            "a longer optim.warmup_fraction, or data.prompt diff with model.pooling mean+edit",
        ),
        (
            ["--data.template={before}{after}", "--optim.loss=class_balanced"],
            "optim.warmup_steps, or data.prompt diff without data.template and with model.pooling mean+edit",
        ),
        (["--data.after=null", "--optim.loss=class_balanced", "--optim.lr=0.1"], "another optim.lr (it is 0.1), with"),
    ],
)
def test_one_class_only_is_told(options, advice):
    config = load_config(["--data.path=x", *options])
    said = collapse(Predictions(LOGITS, torch.tensor([0, 1, 1])), ["a", "b", "c"], config)
    assert said.startswith("all 3 dev examples are predicted to be 'b'; if that does not change") and advice in said


@pytest.mark.quick
def test_nothing_is_told_where_nothing_is_wrong():
    config = load_config(["--data.path=x"])
    assert collapse(Predictions(LOGITS, torch.tensor([1, 1, 1])), ["a", "b", "c"], config) is None
    assert collapse(Predictions(torch.eye(3), torch.tensor([0, 1, 1])), ["a", "b", "c"], config) is None


def test_a_run_says_it_at_that_evaluation(bpe, corpus, tmp_path):
    labels = dict.fromkeys(("clarity", "coherence", "fluency", "style"), "edit") | {"meaning-changed": "new claim"}
    more = {"data__labels": json.dumps(labels), "optim__lr": 1e-3, "tuning__method": "full"}
    launch(tiny_config(bpe, corpus, tmp_path / "run", model__pooling="mean", **more), 1)
    told = (tmp_path / "run/logs/rank_0.log").read_text()
    assert "step 3: all 20 dev examples are predicted to be 'edit'" in told
    assert "step 6: all 20 dev examples are predicted to be 'edit'" in told
