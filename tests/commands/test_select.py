"""The choice of candidates by a run, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch

from irtune.cli import main
from irtune.commands.data import select as command
from irtune.commands.predict import to_examples
from irtune.config.schema import DataConfig
from irtune.data import read_corpus
from irtune.data.synthetic import synthetic_pairs
from irtune.errors import RunError
from irtune.evaluation.saved_run import load_run
from irtune.evaluation.sparse_autoencoder import (
    SparseAutoencoder,
    load_autoencoder,
    save_autoencoder,
    similarity,
    train_autoencoder,
)
from irtune.evaluation.states import pooled_states
from tests.support.finished import finished_run

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def run(llama, corpus, tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("select") / "run", llama, corpus, 1)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    file = tmp_path_factory.mktemp("pool") / "pool.jsonl"
    rows = [row | {"score": number} for number, row in enumerate(synthetic_pairs(130)[-20:])]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def select(run, pool, output, *options):
    return main(["data", "select", "--run", str(run), "--candidates", str(pool), "--output", str(output), *options])


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def loaded(run, pool):
    run = load_run(run, torch.device("cpu"))
    return run, to_examples(list(enumerate(rows_of(pool), 1)), "pool", DataConfig())


@pytest.mark.parametrize("options", [{}, {"model__pooling": "mean", "model__head": "mlp"}], ids=["class", "mean"])
def test_pooled_states_are_what_the_head_reads(llama, corpus, pool, tmp_path, options):
    run, examples = loaded(finished_run(tmp_path / "run", llama, corpus, 2, **options), pool)
    states = pooled_states(run, examples, 3)
    head = run.model.get_submodule("base_model.model.score" if not options else "base_model.model.pooled_head")
    with torch.no_grad():
        logits = head(states)
    torch.testing.assert_close(logits, run.predict(examples, 7).logits, rtol=1e-4, atol=1e-4)


def test_the_most_uncertain_come_first(run, pool, tmp_path, capsys):
    assert select(run, pool, tmp_path / "out.jsonl", "--method", "uncertainty", "--count", "5") == 0
    assert "5 of 20 candidates are in " in capsys.readouterr().err
    found = rows_of(tmp_path / "out.jsonl")
    model, examples = loaded(run, pool)
    probabilities = model.predict(examples, 4).probabilities
    entropies = -(probabilities * probabilities.log()).sum(1)
    assert [row["score"] for row in found] == entropies.argsort(descending=True)[:5].tolist()  # the input's column
    assert [row["score_2"] for row in found] == pytest.approx(sorted(entropies.tolist(), reverse=True)[:5], abs=1e-4)


def test_got_d_prefers_what_is_like_the_target(run, pool, corpus, tmp_path):
    """Candidates far from the target: their states are moved away, so none of them is chosen."""
    far = set(range(0, 20, 2))

    def states(run, examples, batch_size):
        found = pooled_states(run, examples, batch_size)
        for place in far:
            found[place - 20] += 50
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "pooled_states", states)
        assert select(run, pool, tmp_path / "out.jsonl", "--method", "got-d", "--count", "8") == 0
    found = rows_of(tmp_path / "out.jsonl")
    assert len(found) == 8 and not {row["score"] for row in found} & far
    scores = [row["score_2"] for row in found]
    assert scores == sorted(scores) and scores[0] < 0


def test_shared_features_and_an_autoencoder_by_hand():
    target, other = torch.tensor([1.0, 0, 2]), torch.tensor([2.0, 1, 0])
    assert similarity(target[None], other).tolist() == pytest.approx([1 / 5])
    assert similarity(target[None], target).tolist() == [1] and similarity(0 * target[None], 0 * other).tolist() == [0]
    encoder = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [2, 2]])
    coder = SparseAutoencoder(encoder, torch.tensor([0.0, 0, 0, -1]), encoder, torch.tensor([1.0, 0]), active=2)
    # h - center = (2, 3): values 2, 3, -2 and 10 - 1; the two largest stay.
    assert coder.features(torch.tensor([3.0, 3])).tolist() == [0, 3, 0, 9]
    assert coder.features(torch.tensor([0.0, 0])).tolist() == [0, 0, 1, 0]  # of -1, 0, 1 and -3


def test_an_autoencoder_learns_and_is_read_as_it_was_written(tmp_path):
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(12, 8, generator=generator)
    states = (torch.rand(600, 12, generator=generator) * (torch.rand(600, 12, generator=generator) < 0.2)) @ directions
    before, start = train_autoencoder(states, steps=0)
    coder, left = train_autoencoder(states, steps=60)
    assert before.encoder.shape == (64, 8) and left < 0.9 * start
    assert left == pytest.approx(float(coder.unexplained(states)))
    save_autoencoder(coder, tmp_path / "sae", "base")
    again = load_autoencoder(tmp_path / "sae", 8, "base", torch.device("cpu"))
    assert torch.equal(again.features(states), coder.features(states))
    with pytest.raises(RunError, match="codes states of 8 dimensions, and those of the run have 16"):
        load_autoencoder(tmp_path / "sae", 16, "base", torch.device("cpu"))
    with pytest.raises(RunError, match="is of the model base, and the run's base is other"):
        load_autoencoder(tmp_path / "sae", 8, "other", torch.device("cpu"))
    (tmp_path / "sae/cfg.json").write_text("{}")
    with pytest.raises(RunError, match="is not a sparse autoencoder with "):
        load_autoencoder(tmp_path / "sae", 8, "base", torch.device("cpu"))


def test_mona_takes_what_shares_most_features_whatever_the_batches(run, pool, corpus, tmp_path, capsys, monkeypatch):
    """The target's own texts, shown as candidates, share more than texts of another kind."""
    monkeypatch.setattr(command, "train_autoencoder", lambda states: train_autoencoder(states, steps=30))
    rows = rows_of(corpus / "train.jsonl")[:6]
    strange = [{"before": "the the the", "after": "the", "label": "x"}, {"before": "", "after": "is is", "label": "x"}]
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*strange, *rows]))
    sae = tmp_path / "sae"
    line = ["--method", "mona", "--count", "8", "--sae", str(sae)]
    assert select(run, file, tmp_path / "one.jsonl", *line, "--train-sae", "--batch_size", "3") == 0
    assert "of the variance unexplained" in capsys.readouterr().err
    assert select(run, file, tmp_path / "two.jsonl", *line, "--batch_size", "8") == 0
    one, two = rows_of(tmp_path / "one.jsonl"), rows_of(tmp_path / "two.jsonl")
    scores = [row["score"] for row in one]
    assert scores == sorted(scores, reverse=True) and 0 < scores[-1] < scores[0] <= 1
    assert [row["score"] for row in two] == pytest.approx(scores, abs=1e-5)
    assert {row["before"] for row in one[-2:]} == {row["before"] for row in strange}
    # By hand, of the best one: the mean of its tokens' features and that of the training split.
    model, examples = loaded(run, file)
    coder = load_autoencoder(sae, 32, run_base(model), torch.device("cpu"))
    target = read_corpus(model.config.data).splits["train"]
    means = [features_of(model, coder, example) for example in [*target, *examples]]
    prototype = torch.stack(means[: len(target)]).mean(0)
    found = {
        example.before: float(similarity(mean[None], prototype))
        for example, mean in zip(examples, means[len(target) :])
    }
    assert found[one[0]["before"]] == pytest.approx(scores[0], abs=1e-4)


def run_base(model):
    return Path(model.config.model.name_or_path).name


def features_of(model, coder, example):
    """Of the last layer but one, as transformers itself returns it."""
    ids = torch.tensor([model.encoder.encode(example)["input_ids"]])
    with torch.no_grad():
        states = model.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True
        ).hidden_states
    return coder.features(states[-2][0]).mean(0)


def test_what_cannot_be_chosen_from_is_refused(run, pool, corpus, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    cases = [
        (pool, ["--method", "got-d", "--count", "21"], "--count 21 is more than the 20 candidates"),
        (corpus / "dev.jsonl", ["--method", "got-d", "--count", "2"], "row 1: the same text is in the dev split"),
        (pool, ["--method", "uncertainty", "--count", "2", "--epsilon", "1"], "--epsilon goes with --method got-d"),
        (pool, ["--method", "got-d", "--count", "2", "--epsilon", "0"], "'0'; accepted: a number above 0"),
        (
            corpus / "test.jsonl",
            ["--method", "uncertainty", "--count", "2"],
            "row 1: the same text is in the test split",
        ),
        (pool, ["--method", "mona", "--count", "2"], "--method mona needs --sae FOLDER"),
        (pool, ["--method", "got-d", "--count", "2", "--train-sae"], "--sae and --train-sae go with --method mona"),
        (pool, ["--method", "mona", "--count", "2", "--sae", str(corpus), "--train-sae"], "which exists"),
        (pool, ["--method", "mona", "--count", "2", "--sae", str(corpus)], "cfg.json cannot be read"),
        (pool, ["--method", "got-d", "--count", "2", "--target", "./none"], "no file or folder './none'"),
    ]
    for file, options, said in cases:
        assert select(run, file, output, *options) == 2
        assert said in capsys.readouterr().err
    assert not output.exists()
