"""The choice of candidates by a run, and what it refuses."""

import json

import pytest
import torch

from irtune.cli import main
from irtune.commands.data import select as command
from irtune.commands.predict import to_examples
from irtune.data.synthetic import synthetic_pairs
from irtune.evaluation.saved_run import load_run
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
    return run, to_examples(list(enumerate(rows_of(pool), 1)), "pool", "before", "after")


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


def test_what_cannot_be_chosen_from_is_refused(run, pool, corpus, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    cases = [
        (pool, ["--method", "got-d", "--count", "21"], "--count 21 is more than the 20 candidates"),
        (corpus / "dev.jsonl", ["--method", "got-d", "--count", "2"], "row 1: the same text is in the dev split"),
        (pool, ["--method", "uncertainty", "--count", "2", "--epsilon", "1"], "--epsilon goes with --method got-d"),
        (pool, ["--method", "got-d", "--count", "2", "--epsilon", "0"], "'0'; accepted: a number above 0"),
        (pool, ["--method", "mona", "--count", "2"], "invalid choice: 'mona'"),
        (pool, ["--method", "got-d", "--count", "2", "--target", "./none"], "no file or folder './none'"),
    ]
    for file, options, said in cases:
        assert select(run, file, output, *options) == 2
        assert said in capsys.readouterr().err
    assert not output.exists()
