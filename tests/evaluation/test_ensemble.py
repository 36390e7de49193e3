"""Several runs predict as the mean of their probabilities."""

import csv
import json

import pytest
import torch

from irtune.cli import main
from irtune.data import read_corpus
from irtune.evaluation.ensemble import open_runs
from irtune.evaluation.metrics import Predictions
from irtune.evaluation.saved_run import load_run
from tests.support.finished import finished_run

pytestmark = pytest.mark.quick
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(llama, corpus, tmp_path_factory):
    """Two runs whose labels stand in another order, and one with other labels."""
    folder = tmp_path_factory.mktemp("runs")
    one = finished_run(folder / "one", llama, corpus, 1)
    labels = load_run(one, CPU).labels
    two = finished_run(folder / "two", llama, corpus, 2, data__labels=list(reversed(labels)))
    renamed = {label: f"{label}s" for label in labels}
    return one, two, finished_run(folder / "other", llama, corpus, 3, data__labels=renamed)


def by_hand(one, two, examples):
    """(p_one + p_two) / 2, label by label."""
    first, second = load_run(one, CPU), load_run(two, CPU)
    a, b = first.predict(examples, 5).probabilities.tolist(), second.predict(examples, 5).probabilities.tolist()
    return [
        {label: (x[i] + y[second.labels.index(label)]) / 2 for i, label in enumerate(first.labels)}
        for x, y in zip(a, b, strict=True)
    ]


def test_predict_averages_probabilities_by_label(runs, corpus, tmp_path):
    one, two, _ = runs
    first = load_run(one, CPU)
    wanted = by_hand(one, two, read_corpus(first.config.data).splits["dev"])
    command = ["predict", "--run", str(one), "--run", str(two), "--input", str(corpus / "dev.jsonl"), "--output"]
    assert main([*command, str(tmp_path / "out.jsonl")]) == 0
    assert main([*command, str(tmp_path / "out.csv")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for row, values in zip(rows, wanted, strict=True):
        assert row["probabilities"] == pytest.approx(values, abs=2e-6)
        assert row["predicted"] == max(values, key=values.__getitem__)
    table = list(csv.DictReader((tmp_path / "out.csv").open()))
    label = first.labels[0]
    assert [float(row[f"p_{label}"]) for row in table] == [row["probabilities"][label] for row in rows]


def test_evaluate_averages_probabilities(runs, corpus, tmp_path, capsys):
    one, two, _ = runs
    first = load_run(one, CPU)
    examples = read_corpus(first.config.data).splits["dev"]
    wanted = torch.tensor([list(values.values()) for values in by_hand(one, two, examples)])
    labels = torch.tensor([example.label for example in examples])
    command = ["evaluate", "--run", str(one), "--run", str(two), "--data", str(corpus), "--split", "dev", "--json"]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run"] == f"{one}, {two}"
    assert found["accuracy"] == pytest.approx(float((wanted.argmax(-1) == labels).float().mean()))
    assert found["loss"] == pytest.approx(float(-wanted[torch.arange(len(labels)), labels].log().mean()), rel=1e-5)
    assert main(command) == 2
    assert "--output_dir" in capsys.readouterr().err


def test_a_probability_of_zero_has_a_logarithm(runs, monkeypatch):
    one = runs[0]
    run = load_run(one, CPU)
    certain = Predictions(torch.tensor([[200.0, *[0.0] * (len(run.labels) - 1)]]), torch.tensor([0]))
    monkeypatch.setattr(type(run), "predict", lambda *_: certain)
    both = open_runs([one, one], CPU)
    found = both.predict(read_corpus(run.config.data).splits["dev"][:1], 4)
    assert torch.isfinite(found.logits).all() and found.probabilities[0].tolist()[0] == 1.0


def test_runs_with_other_labels_are_refused(runs, corpus, tmp_path, capsys):
    one, _, other = runs
    command = ["predict", "--run", str(one), "--run", str(other), "--input", str(corpus / "dev.jsonl"), "--output"]
    assert main([*command, str(tmp_path / "out.jsonl")]) == 2
    said = capsys.readouterr().err
    assert f"{other} has the labels " in said and f", and {one} has " in said and "runs with the same labels" in said
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "other, said",
    [
        ({"data__after": "null"}, "reads pairs and the other single texts (data.after)"),
        ({"data__context": "id"}, "reads context and the other none (data.context)"),
    ],
)
def test_runs_on_other_kinds_of_texts_are_refused(runs, llama, corpus, tmp_path, capsys, other, said):
    if "data__context" in other:
        other |= {"data__id": "number"}
    single = finished_run(tmp_path / "single", llama, corpus, **other)
    command = ["evaluate", "--run", str(runs[0]), "--run", str(single), "--data", str(corpus), "--output_dir"]
    assert main([*command, str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
