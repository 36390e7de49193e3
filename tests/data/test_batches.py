"""Which examples make up which micro-batch, and its tensors."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from irtune.config import load_config
from irtune.data import BatchSampler, collate, evaluation_batches, padded_lengths
from irtune.errors import ConfigError

pytestmark = pytest.mark.quick


def test_the_plan_does_not_depend_on_the_split_over_ranks():
    lengths = [(7 * i) % 31 + 3 for i in range(101)]
    plan = BatchSampler(lengths, micro_batch_size=4, micro_batches=4, seed=5)
    for world, accumulation in ((1, 4), (2, 2), (4, 1)):
        for step in (0, 3, 7):
            mine = [[plan.step(step)[g * world + rank] for g in range(accumulation)] for rank in range(world)]
            flat = [mine[m % world][m // world] for m in range(4)]
            assert flat == plan.step(step)


@given(st.lists(st.integers(1, 300), min_size=16, max_size=200), st.integers(0, 5))
def test_an_epoch_shows_each_example_at_most_once(lengths, seed):
    plan = BatchSampler(lengths, micro_batch_size=3, micro_batches=2, seed=seed)
    for epoch in (0, 1):
        first = epoch * plan.steps_per_epoch
        seen = [i for step in range(first, first + plan.steps_per_epoch) for batch in plan.step(step) for i in batch]
        assert len(seen) == len(set(seen)) == plan.steps_per_epoch * 6
    assert len(lengths) - plan.steps_per_epoch * 6 < 6


def test_batches_are_bucketed_by_length():
    lengths = [(i * 37) % 200 + 1 for i in range(1000)]
    plan = BatchSampler(lengths, micro_batch_size=8, micro_batches=2, seed=0)
    batches = [batch for step in range(plan.steps_per_epoch) for batch in plan.step(step)]
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    real = sum(lengths[i] for batch in batches for i in batch)
    assert real / padded > 0.95  # random batches of 8 fill about .57


@given(
    st.lists(st.integers(1, 60), min_size=4, max_size=200), st.integers(60, 300), st.integers(1, 4), st.integers(0, 5)
)
def test_micro_batches_by_tokens_keep_to_them_and_show_each_example_once(lengths, tokens, micro_batches, seed):
    plan = BatchSampler(lengths, 8, micro_batches, seed, bucket=3, tokens=tokens)
    steps = [plan.step(step) for step in range(2 * plan.steps_per_epoch + 3)]
    assert all(len(step) == micro_batches and all(step) for step in steps)
    for batch in (batch for step in steps for batch in step):
        assert max(lengths[i] for i in batch) * len(batch) <= tokens
    first = [i for step in steps[: plan.steps_per_epoch] for batch in step for i in batch]
    assert len(first) == len(set(first)) == plan.examples(plan.steps_per_epoch)
    again = BatchSampler(lengths, 8, micro_batches, seed, bucket=3, tokens=tokens)
    order = random.Random(seed).sample(range(len(steps)), len(steps))  # as after a resumption, in any order
    assert [again.step(step) for step in order] == [steps[step] for step in order]


def test_micro_batches_by_tokens_are_equal_work():
    lengths = [(i * 37) % 200 + 1 for i in range(2000)]
    plan = BatchSampler(lengths, 8, micro_batches=4, seed=0, tokens=2048)
    batches = [batch for step in range(plan.steps_per_epoch) for batch in plan.step(step)]
    padded = [max(lengths[i] for i in batch) * len(batch) for batch in batches]
    assert sorted(padded)[1] > 0.85 * 2048  # but for the last one; with 8 examples each: from 8 to 1,600
    assert sum(lengths[i] for batch in batches for i in batch) / sum(padded) > 0.95
    assert sum(map(len, batches)) > 0.97 * len(lengths)
    assert plan.examples_per_step == pytest.approx(4 * 2048 / 100, rel=0.1)
    assert max(map(len, batches)) > 100 and min(map(len, batches)) < 12


def test_in_a_small_corpus_every_example_has_its_turn_and_meets_others():
    lengths = [10 * (i // 5) + 10 for i in range(60)]
    plan = BatchSampler(lengths, 8, micro_batches=13, seed=0, tokens=240)  # one bucket; fewer than 2 x 13 micro-batches
    assert plan.steps_per_epoch == 1
    epochs = [[tuple(batch) for batch in plan.step(step)] for step in range(40)]
    assert {i for epoch in epochs for batch in epoch for i in batch} == set(range(60))
    assert len({frozenset(batch) for epoch in epochs for batch in epoch}) > 3 * 15
    assert sum(map(len, epochs[0])) < 60


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(50, 200), st.integers(1, 5))
def test_evaluation_by_tokens_shows_each_example_once(lengths, tokens, world):
    shares = [evaluation_batches(lengths, 8, rank, world, tokens) for rank in range(world)]
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1
    for batch in (batch for share in shares for batch in share if batch):
        assert max(lengths[i] for i in batch) * len(batch) <= tokens


def test_few_examples_still_make_a_micro_batch_for_each_rank():
    plan = BatchSampler([5] * 6, 8, micro_batches=4, seed=0, tokens=64)
    assert [len(plan.step(step)) for step in range(3)] == [4, 4, 4] and plan.steps_per_epoch == 1
    with pytest.raises(ConfigError, match="4 micro-batches per step are more than the 3 examples"):
        BatchSampler([5] * 3, 8, micro_batches=4, seed=0, tokens=64)


def test_a_batch_larger_than_the_corpus_is_refused():
    with pytest.raises(ConfigError, match=r"global batch of 32 examples .* larger than the training split of 31"):
        BatchSampler([5] * 31, 8, 4, 0)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(1, 9), st.integers(1, 5))
def test_evaluation_shows_each_example_exactly_once(lengths, size, world):
    shares = [evaluation_batches(lengths, size, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(len(lengths)))


def test_collate_pads_on_the_right():
    batch = collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}], pad_token_id=9, labels=[1, 0])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]


def test_on_cpus_in_bf16_batches_have_few_lengths():
    cpu, wanted = torch.device("cpu"), {1: 32, 32: 32, 33: 64, 95: 96, 97: 100, 100: 100}
    config = load_config(["--data.path=x", "--data.max_length=100"])
    lengths = padded_lengths(config, cpu)
    assert {length: lengths.at_least(length) for length in wanted} == wanted
    batch = collate([{"input_ids": [5] * 33, "edit_mask": [1] * 33}], 9, lengths=lengths)
    assert batch["input_ids"].shape == (1, 64) and batch["attention_mask"].sum() == batch["edit_mask"].sum() == 33
    assert batch["attention_mask"].padded
    assert padded_lengths(config, torch.device("cuda")) is None
    for other in ("--model.dtype=float32", "--optim.micro_batch_tokens=200"):
        assert padded_lengths(load_config(["--data.path=x", "--data.max_length=100", other]), cpu) is None
