"""Development splits that a corpus does not bring, and early stopping."""

import json
import random
from collections import Counter

import pytest

from irtune.config import Config, DataConfig, RunConfig
from irtune.config.checks import check_config
from irtune.data import read_corpus
from irtune.data.held_out import draw_share, fold_of, nested_subset
from irtune.errors import DataError
from tests.support.ranks import run_ranks
from tests.support.runs import records, train
from tests.support.tiny import tiny_config

quick = pytest.mark.quick


def write(folder, documents=12, each=5, labels=3, name="train"):
    rows = [
        {"before": f"a {d} {i}", "after": f"b {d} {i}", "label": f"label{(d + i) % labels}", "doc": f"doc{d}"}
        for d in range(documents)
        for i in range(each)
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@quick
def test_a_dev_split_keeps_documents_whole_and_labels_in_proportion(tmp_path):
    data = DataConfig(path=str(write(tmp_path)), group="doc", dev_fraction=0.25)
    corpus = read_corpus(data)
    train_set, dev = corpus.splits["train"], corpus.splits["dev"]
    assert len(train_set) + len(dev) == 60 and len(dev) == 15
    assert not {e.group for e in train_set} & {e.group for e in dev}
    assert all(4 <= count <= 6 for count in Counter(e.label for e in dev).values())
    assert read_corpus(data) == corpus  # seeded
    other = read_corpus(DataConfig(path=str(tmp_path), group="doc", dev_fraction=0.25, split_seed=1))
    assert {e.id for e in other.splits["dev"]} != {e.id for e in dev}


@quick
@pytest.mark.parametrize("share", [0.5, 0.4, 0.3, 0.25, 0.15, 0.1, 0.07, 0.01])
def test_a_share_is_what_was_asked_for_to_within_a_row_of_each_label(tmp_path, share):
    counts = {"a": 101, "b": 60, "c": 31, "d": 7, "once": 1}
    rows = [{"before": f"{label} {i}", "after": "x", "label": label} for label in counts for i in range(counts[label])]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = read_corpus(DataConfig(path=str(tmp_path), dev_fraction=share))
    dev = Counter(corpus.labels[example.label] for example in corpus.splits["dev"])
    assert sum(dev.values()) == round(200 * share)
    assert len(corpus.splits["train"]) == 200 - round(200 * share)
    assert all(abs(dev[label] - share * count) < 1 for label, count in counts.items())
    assert dev["once"] == 0  # it could not be learnt
    assert corpus == read_corpus(DataConfig(path=str(tmp_path), dev_fraction=share))


@quick
@pytest.mark.parametrize("share", [0.4, 0.3, 0.15, 0.1])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_documents_a_share_comes_as_near_as_they_allow(share, seed):
    rng = random.Random(f"{share}/{seed}")
    documents = [f"doc{i}" for i in range(60) for _ in range(rng.randint(1, 12))]
    labels = [rng.choice("aaabbc") for _ in documents]
    held_out, remark = draw_share(labels, documents, share, seed)
    dev = {document for document, out in zip(documents, held_out) if out}
    assert dev.isdisjoint(document for document, out in zip(documents, held_out) if not out)
    counts, found = Counter(labels), Counter(label for label, out in zip(labels, held_out) if out)
    assert all(abs(found[label] - share * count) < 1.5 for label, count in counts.items())
    assert (remark is None) == all(abs(found[label] - share * count) < 1 for label, count in counts.items())
    assert abs(sum(held_out) - share * len(labels)) <= 1


@quick
def test_documents_too_large_for_a_share_are_said(tmp_path, caplog):
    corpus = read_corpus(DataConfig(path=str(write(tmp_path, documents=4, each=9)), group="doc", dev_fraction=0.4))
    assert len(corpus.splits["dev"]) in (9, 18)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "data.dev_fraction 0.4 of 36 examples asks for 14; with documents kept whole, dev has" in said


@quick
def test_a_label_of_a_single_document_stays_in_training(tmp_path):
    held_out, _ = draw_share(["x"] * 9 + ["rare"] * 3, [*"aabbccdde", *"fff"], 0.5, 0)
    assert not any(held_out[9:]) and any(held_out)
    rows = [{"before": "a", "after": "b", "label": label, "doc": label} for label in "xyxy"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="makes no dev split: no whole document can leave the training split"):
        read_corpus(DataConfig(path=str(tmp_path), group="doc", dev_fraction=0.5))


@quick
def test_smaller_training_splits_are_in_larger_ones_and_keep_every_label(tmp_path):
    counts = {"a": 101, "b": 60, "c": 32, "once": 1}
    rows = [{"before": f"{label} {i}", "after": "x", "label": label} for label in counts for i in range(counts[label])]
    random.Random(0).shuffle(rows)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = read_corpus(DataConfig(path=str(tmp_path)))
    smaller: set[str] = set()
    for share, wanted in ((0.005, [1, 1, 1, 1]), (0.05, [5, 3, 2, 1]), (0.25, [25, 15, 8, 1]), (1.0, [101, 60, 32, 1])):
        corpus = read_corpus(DataConfig(path=str(tmp_path), train_fraction=share))
        found = Counter(corpus.labels[example.label] for example in corpus.splits["train"])
        assert [found[label] for label in counts] == wanted
        ids = [example.id for example in corpus.splits["train"]]
        assert smaller <= set(ids) and ids == sorted(ids, key=lambda name: int(name.removeprefix("train:")))
        assert (corpus.splits["dev"], corpus.labels) == (whole.splits["dev"], whole.labels)
        smaller = set(ids)
    assert corpus == whole
    one, other = (
        read_corpus(DataConfig(path=str(tmp_path), train_fraction=0.25, subset_seed=seed)).splits["train"]
        for seed in (0, 1)
    )
    assert len(one) == len(other) and one != other


@quick
def test_a_subset_of_examples_with_several_labels_is_nested_and_keeps_every_label():
    rng = random.Random(3)
    sets = [tuple(sorted(rng.sample("abcdef", rng.choice([0, 1, 1, 2, 3])))) for _ in range(600)] + [("g", "h")]
    small, large = (nested_subset(sets, share, 0) for share in (0.1, 0.3))
    assert all(b for a, b in zip(small, large) if a)
    assert 50 <= sum(small) <= 70 and 165 <= sum(large) <= 195
    assert {label for found, kept in zip(sets, small) if kept for label in found} == set("abcdefgh")
    assert all(nested_subset(sets, 1.0, 0))


@quick
def test_without_the_setting_a_corpus_without_dev_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no dev split.*data\.dev_fraction"):
        read_corpus(DataConfig(path=str(write(tmp_path))))


@quick
def test_folds_hold_every_training_and_dev_example_out_once(tmp_path):
    write(tmp_path)
    write(tmp_path, documents=3, name="dev")
    seen: Counter[str] = Counter()
    for fold in range(1, 5):
        corpus = read_corpus(DataConfig(path=str(tmp_path), fold=f"{fold}/4"))
        assert len(corpus.splits["train"]) + len(corpus.splits["dev"]) == 75
        assert not {e.id for e in corpus.splits["train"]} & {e.id for e in corpus.splits["dev"]}
        seen.update(e.id for e in corpus.splits["dev"])
    assert len(seen) == 75 and set(seen.values()) == {1}


@quick
def test_a_label_in_one_fold_only_stays_in_training():
    labels = ["a"] * 10 + ["b"] * 10 + ["rare"]
    folds = fold_of(labels, [str(i) for i in range(21)], 5, 0)
    assert folds[-1] == -1
    assert sorted(Counter(folds[:-1]).values()) == [4, 4, 4, 4, 4]


@quick
def test_impossible_splits_are_refused(tmp_path):
    with pytest.raises(DataError, match="20 folds need at least as many documents, not 12"):
        read_corpus(DataConfig(path=str(write(tmp_path)), group="doc", fold="1/20"))
    with pytest.raises(DataError, match="no column 'document'"):
        read_corpus(DataConfig(path=str(tmp_path), group="document", dev_fraction=0.2))
    for fold in ("0/3", "4/3", "1/1", "a/b", "3", "1.5/3"):
        assert any("data.fold" in line for line in check_config(Config(data=DataConfig(path="x", fold=fold))))
    for share in (0.0, 0.6, -1.0):
        config = Config(data=DataConfig(path="x", dev_fraction=share))
        assert any("data.dev_fraction" in line for line in check_config(config))
    assert any("run.patience" in line for line in check_config(Config(run=RunConfig(patience=-1))))


def test_training_stops_when_nothing_gets_better_and_stays_stopped(llama, corpus, tmp_path):
    # A learning rate of nothing: every evaluation is as good as the first, so none is better.
    options = {
        "optim__lr": 1e-12,
        "optim__max_steps": 20,
        "run__eval_every": 2,
        "run__patience": 2,
        "run__log_every": 5,
    }
    config = tiny_config(llama, corpus, tmp_path / "run", **options)
    for _ in range(2):  # the second call finds it finished
        assert run_ranks(train, 2, config) == [None, None]
        results = json.loads((tmp_path / "run/results.json").read_text())
        assert (results["steps"], results["best_step"]) == (6, 2)
        assert [r["step"] for r in records(tmp_path / "run", "eval") if r["split"] == "dev"] == [2, 4, 6]
        assert [r["step"] for r in records(tmp_path / "run", "train")] == [5, 6]
