"""Sets of labels and values: what is read, lost, predicted and measured, by hand and against scikit-learn."""

import json
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn import metrics as oracle

from irtune import cli
from irtune.commands.compare.picture import draw
from irtune.commands.compare.report import columns, write_csv, write_markdown
from irtune.commands.data.stats import baselines, statistics
from irtune.config import DataConfig, OptimConfig, load_config
from irtune.data import read_corpus, read_split
from irtune.engine.losses import binary, build_loss, positive_weights
from irtune.errors import ConfigError, DataError, RunError
from irtune.evaluation.bootstrap import intervals, paired_bootstrap
from irtune.evaluation.metrics import metrics
from irtune.tasks import Predictions, Task, task_of
from irtune.tasks.multi_label import MultiLabel
from irtune.tasks.regression import Regression

pytestmark = pytest.mark.quick
CPU = torch.device("cpu")
NAMES = ["a", "b", "c"]


def sets(examples=120, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(examples, 3, generator=generator) < torch.tensor([0.5, 0.3, 0.1])).float()
    logits = torch.randn(examples, 3, generator=generator) + 2 * labels - 1
    return Predictions(logits, labels, MultiLabel())


# ----- losses -----


def test_the_binary_loss_by_hand():
    assert positive_weights([8, 4, 2], NAMES).tolist() == [1, 2, 4]
    loss = build_loss(OptimConfig(loss="binary"), [8, 4, 2], CPU, NAMES)
    found = loss(torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 1.0]]))
    assert float(found) == pytest.approx(2 * math.log(2))
    plain = build_loss(OptimConfig(loss="binary", positive_weight=False), [8, 4, 2], CPU, NAMES)
    assert float(plain(torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 1.0]]))) == pytest.approx(math.log(2))


def test_the_binary_loss_is_torchs_and_a_mean_over_examples():
    found, weights = sets(), torch.tensor([1.0, 2.0, 4.0])
    each = binary(weights)(found.logits, found.labels)
    wanted = torch.nn.BCEWithLogitsLoss(pos_weight=weights)(found.logits, found.labels)
    torch.testing.assert_close(each.mean(), wanted)
    loss = build_loss(OptimConfig(loss="binary"), [8, 4, 2], CPU, NAMES)
    examples = torch.linspace(0, 2, len(each))
    torch.testing.assert_close(loss(found.logits, found.labels, examples), (each * examples).mean())
    assert loss(found.logits.bfloat16(), found.labels).dtype == torch.float32


def test_a_label_without_an_example_weighs_1_and_is_named(caplog):
    with caplog.at_level(logging.WARNING, "irtune"):
        assert positive_weights([6, 0, 3], NAMES).tolist() == [1, 1, 2]
    assert "no training example has the label 'b'" in caplog.text


def test_the_squared_error():
    loss = build_loss(OptimConfig(loss="mean_squared_error"), [3], CPU, ["score"])
    assert float(loss(torch.tensor([[1.0], [0.0]]), torch.tensor([3.0, -1.0]))) == pytest.approx(2.5)
    assert float(loss(torch.tensor([[1.0], [0.0]]), torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2]))) == 2.0


# ----- metrics -----


def test_metrics_of_sets_equal_scikit_learn():
    predictions = sets()
    found = metrics(predictions, NAMES)
    true, scores = predictions.labels.numpy(), predictions.logits.sigmoid().numpy()
    guess = scores > 0.5
    for average in ("macro", "micro"):
        assert found[f"{average}_f1"] == pytest.approx(oracle.f1_score(true, guess, average=average))
    assert found["accuracy"] == pytest.approx(oracle.accuracy_score(true, guess))
    assert found["jaccard"] == pytest.approx(
        oracle.jaccard_score(true, guess, average="samples", zero_division=1), rel=1e-5
    )
    areas = [oracle.average_precision_score(true[:, c], scores[:, c]) for c in range(3)]
    assert [row["average_precision"] for row in found["per_class"].values()] == pytest.approx(areas, rel=1e-5)
    assert found["auprc"] == pytest.approx(np.mean(areas), rel=1e-5)
    precision, recall, f1, support = oracle.precision_recall_fscore_support(true, guess)
    for c, row in enumerate(found["per_class"].values()):
        assert (row["precision"], row["recall"], row["f1"]) == pytest.approx((precision[c], recall[c], f1[c]))
        assert row["examples"] == support[c]
    json.dumps(found, allow_nan=False)


def test_empty_sets_are_right_when_they_are_predicted():
    nothing = Predictions(torch.full((2, 3), -5.0), torch.tensor([[0.0, 0, 0], [1, 0, 0]]), MultiLabel())
    found = metrics(nothing, NAMES)
    assert (found["jaccard"], found["accuracy"], found["macro_f1"], found["micro_f1"]) == (0.5, 0.5, 0, 0)
    assert nothing.task.only(nothing, NAMES) == "without any label"
    assert nothing.task.written(nothing.probabilities[0], NAMES)["predicted"] == []


def test_metrics_of_values_equal_scipy_and_scikit_learn():
    from scipy import stats

    true, guess = torch.tensor([1.0, 2, 2, 4, 9]), torch.tensor([0.5, 2, 3, 3, 5])
    found = metrics(Predictions(guess[:, None], true, Regression()), ["score"])
    assert found["pearson"] == pytest.approx(np.corrcoef(true, guess)[0, 1])
    assert found["spearman"] == pytest.approx(stats.spearmanr(true, guess)[0])
    assert found["r2"] == pytest.approx(oracle.r2_score(true, guess))
    assert found["loss"] == pytest.approx(oracle.mean_squared_error(true, guess))
    assert list(found["per_class"]) == ["score"]
    flat = metrics(Predictions(torch.zeros(5, 1), true, Regression()), ["score"])
    assert (flat["pearson"], flat["spearman"]) == (0, 0)
    assert metrics(Predictions(guess[:, None], torch.ones(5), Regression()), ["score"])["r2"] == 0


def test_thresholds_have_the_best_f1_and_stay_at_half_without_a_reason():
    predictions = sets(40, seed=3)
    labels = predictions.labels.clone()
    labels[:, 2] = 0  # a label without an example
    predictions = replace(predictions, labels=labels)
    tuned = predictions.tuned()
    assert tuned.task.thresholds[2] == 0.5
    grid = np.linspace(0, 1, 1001)[:, None]
    for c in range(2):
        scores, true = predictions.probabilities[:, c].numpy(), labels[:, c].numpy()
        guess = scores > grid  # [limits, examples]
        best = (2 * (guess & (true > 0)).sum(1) / (guess.sum(1) + true.sum())).max()
        ours = oracle.f1_score(true, scores > tuned.task.thresholds[c])
        assert ours == pytest.approx(best) and ours >= oracle.f1_score(true, scores > 0.5)
    right = Predictions(torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.0], [1.0]]), MultiLabel())
    assert right.tuned().task.thresholds == (0.5,)  # .269 and .731: all between them are as good
    low = Predictions(torch.tensor([0.1, 0.3]).logit()[:, None], torch.tensor([[0.0], [1.0]]), MultiLabel())
    assert low.tuned().task.thresholds == pytest.approx((0.2,))


@pytest.mark.parametrize(
    "thresholds, said",
    [
        ({"a": 0.2, "b": 1.5}, r"the threshold of 'b' is 1\.5; accepted: from 0 to 1"),
        ({"a": -0.1, "b": 0.5}, r"the threshold of 'a' is -0\.1; accepted"),
        ({"a": True, "b": 0.5}, "threshold of 'a' is True"),
        ({"a": 0.5}, "thresholds must name each of a, b"),
        (None, "thresholds must name each of a, b"),
    ],
)
def test_thresholds_that_are_none_are_refused(thresholds, said):
    data = DataConfig(multi_label=True)
    with pytest.raises(RunError, match=said):
        task_of(data, {"dev": {"per_class": {"a": {}, "b": {}}}, "thresholds": thresholds})
    good = task_of(data, {"dev": {"per_class": {"a": {}, "b": {}}}, "thresholds": {"a": 0.2, "b": 1}})
    assert good.predicted(torch.tensor([[-1.0, 9.0]])).tolist() == [[True, False]]
    assert good.recorded(["a", "b"]) == {"thresholds": {"a": 0.2, "b": 1}}


def test_the_bootstrap_of_sets_is_that_of_single_labels_where_each_has_one():
    rng = np.random.default_rng(0)
    labels, ours, theirs = rng.integers(0, 3, 60), rng.integers(0, 3, 60), rng.integers(0, 3, 60)
    hot = np.eye(3, dtype=bool)
    one = paired_bootstrap(labels, [ours], [theirs], 3)
    assert paired_bootstrap(hot[labels], [hot[ours]], [hot[theirs]], 3) == one
    single, several = intervals(labels, ours, 3), intervals(hot[labels], hot[ours], 3)
    assert several == {"micro_f1": single["accuracy"], "macro_f1": single["macro_f1"]}


# ----- reading -----


def write(folder, cells, name="train", **more):
    rows = [{"before": f"a {i}", "after": f"b {i}", "label": cell} for i, cell in enumerate(cells)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(path=str(folder), **more)


def test_sets_from_lists_and_from_texts_are_the_same_corpus(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    for split in ("train", "dev"):
        lists = write(tmp_path / "one", [["b", "a"], [], ["c", 1]], split, multi_label=True)
        texts = write(tmp_path / "two", ["b|a|a", "", "c | 1"], split, multi_label=True, label_separator="|")
    corpus = read_corpus(lists)
    assert corpus.labels == ["1", "a", "b", "c"] and corpus == replace(read_corpus(texts), task=corpus.task)
    assert [example.label for example in corpus.splits["train"]] == [(1, 2), (), (0, 3)]
    assert corpus.task.shown((1, 2), corpus.labels) == ["a", "b"]
    assert corpus.task.target((1, 2), 4) == [0.0, 1.0, 1.0, 0.0]
    assert [e.label for e in read_split(lists, "dev", corpus.labels)] == [(1, 2), (), (0, 3)]
    merged = read_corpus(replace(lists, labels={"a": "x", "b": "x", "c": "y", "1": "y"}))
    assert [example.label for example in merged.splits["train"]] == [(0,), (), (1,)]
    assert len(read_corpus(replace(lists, drop_labels=["1"])).splits["train"]) == 2


def test_lists_of_classes_in_a_parquet_file_get_their_names(tmp_path):
    from datasets import ClassLabel, Dataset, Features, List, Value

    kinds = {"before": Value("string"), "after": Value("string"), "label": List(ClassLabel(names=["low", "high"]))}
    rows = {"before": ["a", "b", "c"], "after": ["x", "y", "z"], "label": [[1], [], [0, 1]]}
    for split in ("train", "dev"):
        Dataset.from_dict(rows, features=Features(kinds)).to_parquet(str(tmp_path / f"{split}.parquet"))
    corpus = read_corpus(DataConfig(path=str(tmp_path), multi_label=True))
    assert corpus.labels == ["high", "low"]
    assert [example.label for example in corpus.splits["train"]] == [(0,), (), (0, 1)]


@pytest.mark.parametrize(
    "cells, options, said",
    [
        ([["a"], ["b", "z"]], {"labels": ["a", "b"]}, r"train.jsonl, row 2, column 'label': unknown label 'z'"),
        ([["a"], "b"], {}, r"row 2, column 'label': 'b' is a text, not a list of labels; set data.label_separator"),
        ([["a"], 3], {"label_separator": "|"}, r"row 2, column 'label': 3 is not a list of labels"),
        ([["a"], [["b"]]], {}, r"row 2, column 'label': \['b'\] is not a label"),
        ([["a"], [""]], {}, r"row 2, column 'label': '' is not a label"),
        (["a|b", "a||b"], {"label_separator": "|"}, r"row 2, column 'label': '' is not a label"),
        ([[], []], {}, "no label at all; at least 2"),
        ([["a"], []], {}, r"only one label \('a'\)"),
    ],
)
def test_sets_that_are_none_are_named_with_their_row(tmp_path, cells, options, said):
    write(tmp_path, [["a"], ["b"]], "dev")
    with pytest.raises(DataError, match=said):
        read_corpus(write(tmp_path, cells, multi_label=True, **options))


def test_values_are_read_from_numbers_and_texts(tmp_path):
    write(tmp_path, [2], "dev")
    corpus = read_corpus(write(tmp_path, [1, "2.5", -3e-1], task="regression"))
    assert [example.label for example in corpus.splits["train"]] == [1.0, 2.5, -0.3] and corpus.labels == ["label"]
    for wrong in ("", "much", True, None, [1], "nan", "inf", 1e12):
        with pytest.raises(DataError, match=r"row 2, column 'label': .* is not a value of data.task regression"):
            read_corpus(write(tmp_path, [1, wrong], task="regression"))


@pytest.mark.parametrize("documents", [0, 40])
def test_folds_of_sets_keep_the_shares_of_every_label_and_documents_whole(tmp_path, documents):
    rng = np.random.default_rng(1)
    hot = rng.random((200, 4)) < [0.6, 0.3, 0.1, 0.04]
    rows = [
        {"before": f"a {i}", "after": "b", "label": [n for n, yes in zip("wxyz", row) if yes],
         "doc": f"d{i % documents if documents else i}"}
        for i, row in enumerate(hot)
    ]  # fmt: skip
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(path=str(tmp_path), multi_label=True, group="doc")
    seen, total = [], hot.sum(0)
    for fold in range(1, 6):
        corpus = read_corpus(replace(data, fold=f"{fold}/5"))
        dev, rest = corpus.splits["dev"], corpus.splits["train"]
        assert not {e.group for e in dev} & {e.group for e in rest}
        counts = [sum(c in example.label for example in dev) for c in range(4)]
        assert all(abs(count - share / 5) <= (4 if documents else 1) for count, share in zip(counts, total))
        seen += [example.id for example in dev]
    assert len(seen) == len(set(seen)) == 200
    held = read_corpus(replace(data, dev_fraction=0.2)).splits["dev"]
    counts = [sum(c in example.label for example in held) for c in range(4)]
    assert all(abs(count - share / 5) <= (4 if documents else 1) for count, share in zip(counts, total))


def test_a_dev_split_of_values_has_low_and_high_ones(tmp_path):
    data = write(tmp_path, list(range(200)), task="regression", dev_fraction=0.1)
    dev = sorted(example.label for example in read_corpus(data).splits["dev"])
    assert len(dev) == 20 and [int(value // 20) for value in dev] == [n for n in range(10) for _ in range(2)]


def test_statistics_and_simple_baselines_of_sets_and_values(tmp_path):
    for split in ("train", "dev"):
        rows = [
            {
                "before": f"w{i % 3}",
                "after": f"u{i % 2}",
                "several": ["x"] * (i % 3 == 0) + ["y"] * (i % 2),
                "value": i % 3,
            }
            for i in range(24)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    several = read_corpus(DataConfig(path=str(tmp_path), label="several", multi_label=True))
    assert statistics(several)["splits"]["train"]["labels"] == {"x": 8, "y": 12}
    found = baselines(several)
    assert found["linear model of changed words"]["macro_f1"] == 1.0  # each label has a word of its own
    assert found["always y"]["macro_f1"] == found["always y"]["accuracy"] == pytest.approx(1 / 3)
    values = baselines(read_corpus(DataConfig(path=str(tmp_path), label="value", task="regression")))
    assert values["always 1"]["loss"] == pytest.approx(2 / 3)
    assert values["linear model of changed words"]["pearson"] > 0.9


def test_tables_of_a_comparison_have_the_metrics_of_the_task(tmp_path):
    rows = [{"data": "c", "adapter": "lora", "method": "ir", "seeds": 1, "dev_pearson": 0.5, "dev_spearman": 0.25}]
    write_csv(rows, tmp_path / "t.csv", Regression())
    header, line = (text.split(",") for text in (tmp_path / "t.csv").read_text().splitlines())
    assert dict(zip(header, line))["dev_pearson"] == "0.5" and "test_r2_sd" in header and "dev_macro_f1" not in header
    write_markdown(rows, tmp_path / "t.md", [], Regression())
    assert "| dev Pearson | dev Spearman | dev R2 |" in (tmp_path / "t.md").read_text()
    draw([], rows, tmp_path / "t.png", Regression())
    assert columns(task_of(DataConfig()))[:8] == (
        "data", "adapter", "method", "seeds", "dev_accuracy", "dev_accuracy_sd", "dev_macro_f1", "dev_macro_f1_sd",
    )  # fmt: skip


def test_a_run_ends_with_the_metrics_of_its_task(capsys):
    results = dict.fromkeys(
        ("best_step", "layers_trained_per_step", "num_layers", "layers_ever_trained", "optimizer_state_bytes", "steps",
         "training_seconds", "examples_per_second", "world_size", "wall_seconds"), 1,
    ) | {"optimizer_state_bytes_at_selections": {"max": 1}}  # fmt: skip
    dev = {"examples": 4, "pearson": 0.5, "spearman": 0.25, "r2": -1.0}
    config = load_config(["--data.path", "x", "--data.task", "regression"])
    cli._summary(results | {"dev": dev}, config)
    assert "dev Pearson 0.500, Spearman 0.250, R2 -1.000 (4 examples, step 1)" in capsys.readouterr().out


# ----- configuration -----


def test_a_task_fills_in_what_goes_with_it():
    several = load_config(["--data.path", "x", "--data.multi_label", "true"])
    assert (several.optim.loss, several.run.best_metric) == ("binary", "macro_f1")
    value = load_config(["--data.path", "x", "--data.task", "regression"])
    assert (value.optim.loss, value.run.best_metric) == ("mean_squared_error", "pearson")


MULTI, VALUE = "--data.multi_label=true", "--data.task=regression"


@pytest.mark.parametrize(
    "options, said",
    [
        (
            [MULTI, "--optim.loss=class_balanced"],
            "optim.loss class_balanced does not go with data.multi_label; accepted",
        ),
        ([MULTI, "--optim.loss=focal"], "optim.loss focal does not go with data.multi_label; accepted: binary"),
        ([MULTI, "--optim.label_smoothing=0.1"], "optim.label_smoothing goes with one label per example"),
        ([MULTI, "--optim.class_weights=[1, 2]"], "optim.class_weights goes with one label per example"),
        ([MULTI, "--optim.rdrop=1"], "optim.rdrop goes with one label per example, not data.multi_label"),
        ([VALUE, "--run.logit_adjust=1"], "run.logit_adjust goes with one label per example"),
        ([MULTI, "--adapter.type=ltuning-prompt"], "adapter.type ltuning-prompt has one softmax over the labels"),
        ([MULTI, "--adapter.type=ltuning-prefix"], "adapter.type ltuning-prefix has one softmax over the labels"),
        ([MULTI, "--run.best_metric=pearson"], "run.best_metric pearson is not a metric of data.multi_label; accepted"),
        ([MULTI, VALUE], "data.task regression for a number; remove one"),
        ([VALUE, "--data.labels=[a, b]"], "data.labels needs labels, and data.task regression has none"),
        ([VALUE, "--data.prompt=instruction"], "data.prompt instruction needs labels"),
        ([VALUE, "--adapter.type=prompt", "--adapter.prompt_init=labels"], "adapter.prompt_init labels needs labels"),
        ([VALUE, "--optim.loss=binary"], "optim.loss binary does not go with data.task regression"),
        (["--optim.loss=binary"], "optim.loss binary does not go with one label per example; accepted: cross_entropy"),
        (["--run.thresholds=tuned"], "run.thresholds tuned goes with data.multi_label"),
        (["--data.label_separator=|"], "data.label_separator goes with data.multi_label"),
        ([MULTI, "--data.label_separator="], "data.label_separator is ''"),
        (["--optim.positive_weight=false"], "optim.positive_weight false goes with data.multi_label"),
        (["--run.best_metric=jaccard"], "run.best_metric jaccard is not a metric of one label per example"),
        (["--adapter.prompt_lr=300"], "adapter.prompt_lr goes with adapter.type dept or ept or prompt, not lora"),
    ],
)
def test_keys_that_do_not_go_with_a_task_are_named(options, said):
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        load_config(["--data.path", "x", *options])


def test_a_task_says_nothing_else_than_one_label_by_default():
    assert type(task_of(DataConfig())) is Task and task_of(DataConfig(), {}) is task_of(DataConfig())
