"""Pseudo labels: what runs agree on trains along, and stays out of dev, folds and class counts."""

import json

import pytest
import torch

from irtune.cli import main
from irtune.commands.pseudo import vote
from irtune.config import DataConfig
from irtune.data import corpus_digest, read_corpus
from irtune.data.synthetic import synthetic_pairs
from irtune.errors import DataError
from irtune.evaluation.saved_run import load_run
from irtune.train.training_data import TrainingData
from tests.support.finished import finished_run

pytestmark = pytest.mark.quick


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_vote_by_hand():
    # (.6, .4) and (.9, .1) make .75; (.6, .4) and (.5, .5) make .55.
    mean = (torch.tensor([[0.6, 0.4], [0.6, 0.4]]) + torch.tensor([[0.9, 0.1], [0.5, 0.5]])) / 2
    assert vote(mean, 0.7, None) == [(0, 0, pytest.approx(0.75))]
    assert [row for row, _, _ in vote(mean, 0.5, None)] == [0, 1]


def test_so_many_of_a_class_the_surest_first():
    probabilities = torch.tensor([[0.8, 0.2], [0.1, 0.9], [0.95, 0.05], [0.8, 0.2], [0.3, 0.7]])
    assert [(row, label) for row, label, _ in vote(probabilities, 0.5, 2)] == [(0, 0), (1, 1), (2, 0), (4, 1)]
    assert [(row, label) for row, label, _ in vote(probabilities, 0.75, 1)] == [(1, 1), (2, 0)]


@pytest.fixture(scope="module")
def runs(llama, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("voters")
    return [finished_run(folder / name, llama, corpus, seed) for seed, name in enumerate(("a", "b"))]


def pseudo(runs, file, output, *options):
    names = ",".join(map(str, runs))
    return main(["pseudo", "--runs", names, "--unlabelled", str(file), "--output", str(output), *map(str, options)])


def test_the_mean_of_the_runs_labels_and_data_pseudo_reads_it(runs, corpus, tmp_path, capsys):
    pairs = [{"before": row["before"], "after": row["after"], "more": 1} for row in synthetic_pairs(30)[-12:]]
    file, output = write(tmp_path / "new.jsonl", pairs), tmp_path / "made" / "pseudo.jsonl"
    assert pseudo(runs, file, output, "--threshold", 0.3, "--per-class", 3) == 0
    assert "of 12 texts are labelled: " in capsys.readouterr().err
    found = rows_of(output)
    loaded = [load_run(run, torch.device("cpu")) for run in runs]
    texts = [(row["before"], row["after"]) for row in pairs]
    data = loaded[0].config.data
    examples = read_corpus(DataConfig(path=str(corpus), pseudo=str(output))).splits["train"][-len(found) :]
    mean = sum(run.predict(examples, 4).probabilities for run in loaded) / 2
    for row, example, values in zip(found, examples, mean.tolist(), strict=True):
        assert set(row) == {"before", "after", "label", "confidence"} and (row["before"], row["after"]) in texts
        assert row["label"] == loaded[0].labels[values.index(max(values))]
        assert row["confidence"] == pytest.approx(max(values), abs=1e-5)
        assert example.pseudo and example.label == loaded[0].labels.index(row["label"])
    labels = [row["label"] for row in found]
    assert found and all(labels.count(label) <= 3 for label in labels)
    assert data.pseudo is None


def test_pseudo_rows_are_in_training_and_nowhere_else(tmp_path):
    rows = [{"before": f"a {i}", "after": f"b {i}", "label": "xy"[i % 2], "doc": i, "w": 1} for i in range(12)]
    write(tmp_path / "train.jsonl", rows)
    write(
        tmp_path / "dev.jsonl",
        [{"before": "d", "after": "e", "label": "x"}, {"before": "f", "after": "g", "label": "y"}],
    )
    more = [{"before": f"p {i}", "after": f"q {i}", "label": "Y", "confidence": 0.95} for i in range(5)]
    file = write(tmp_path / "more.jsonl", more)
    options = {"path": str(tmp_path), "labels": {"x": "X", "y": "Y"}, "weight": "w"}  # pseudo rows have neither
    plain, both = read_corpus(DataConfig(**options)), read_corpus(DataConfig(**options, pseudo=str(file)))
    assert both.splits["train"][:12] == plain.splits["train"] and both.splits["dev"] == plain.splits["dev"]
    assert [(e.id, e.label, e.weight) for e in both.splits["train"][12:]] == [
        (f"pseudo:{i}", 1, 1.0) for i in range(1, 6)
    ]
    data = TrainingData.__new__(TrainingData)
    data.corpus = both
    assert data.label_counts() == [6, 6]
    assert corpus_digest(both) != corpus_digest(plain)
    for fold in ("1/2", "2/2"):
        config = {**options, "weight": None, "fold": fold}
        with_pseudo, without = read_corpus(DataConfig(**config, pseudo=str(file))), read_corpus(DataConfig(**config))
        assert with_pseudo.splits["dev"] == without.splits["dev"]
        assert len(with_pseudo.splits["train"]) == len(without.splits["train"]) + 5


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"before": "d", "after": "e", "label": "x"}, "row 2: the same text is in the dev split (dev:1)"),
        ({"before": "t", "after": "u", "label": "x"}, "row 2: the same text is in the test split (test:1)"),
        ({"before": "p", "after": "q", "label": "z"}, "row 2, column 'label': unknown label 'z'; known: x, y"),
    ],
)
def test_rows_that_may_not_train_are_refused(tmp_path, row, said):
    write(tmp_path / "train.jsonl", [{"before": label, "after": "", "label": label} for label in "xy"])
    write(tmp_path / "dev.jsonl", [{"before": "d", "after": "e", "label": "x"}])
    write(tmp_path / "test.jsonl", [{"before": "t", "after": "u", "label": "x"}])
    file = write(tmp_path / "more.jsonl", [{"before": "p", "after": "o", "label": "x"}, row])
    with pytest.raises(DataError) as raised:
        read_corpus(DataConfig(path=str(tmp_path), pseudo=str(file)))
    assert said in str(raised.value)


def test_texts_of_dev_and_a_threshold_that_nothing_reaches_are_refused(runs, llama, corpus, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert pseudo(runs, corpus / "test.jsonl", output) == 2
    assert "test.jsonl, row 1: the same text is in the test split" in capsys.readouterr().err
    file = write(tmp_path / "new.jsonl", [{"before": "far away", "after": "near"}])
    assert pseudo(runs, file, output, "--threshold", 1) == 2
    said = capsys.readouterr().err
    assert "no label has a mean probability of 1, the highest is 0." in said and "lower --threshold" in said
    names = load_run(runs[0], torch.device("cpu")).labels
    other = finished_run(tmp_path / "other", llama, corpus, data__labels={name: name * 2 for name in names})
    assert pseudo([runs[0], other], file, output) == 2
    assert "runs with the same labels" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--runs", ",", "--output", "a.jsonl"], "names no folder; accepted: folders of finished runs"),
        (["--runs", "a", "--output", "a.csv"], "accepted: a name that ends with .jsonl"),
        (["--runs", "a", "--output", "a.jsonl", "--threshold", "-1"], "'-1'; accepted: a number from 0 to 1"),
        (["--runs", "a", "--output", "a.jsonl", "--per-class", "0"], "accepted: a whole number from 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(capsys, options, said):
    assert main(["pseudo", "--unlabelled", "new.csv", *options]) == 2
    assert said in capsys.readouterr().err
