"""Templates around a pair, and how texts are shortened into them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from irtune.config import DataConfig
from irtune.data import Encoder, Example
from irtune.data.prompts import shorten
from irtune.errors import ConfigError, DataError

pytestmark = pytest.mark.quick


@given(st.integers(0, 60), st.integers(0, 60), st.integers(2, 80))
def test_the_longer_side_is_shortened(first, second, budget):
    before, after = shorten(list(range(first)), list(range(second)), budget)
    assert before == list(range(len(before))) and after == list(range(len(after)))
    assert len(before) + len(after) == min(first + second, budget)
    if len(before) < first and len(after) < second:
        assert abs(len(before) - len(after)) <= 1
    elif len(before) < first:
        assert len(before) >= len(after) - 1
    elif len(after) < second:
        assert len(after) >= len(before) - 1


@pytest.mark.parametrize("prompt", ["plain", "tagged", "instruction"])
def test_the_template_is_never_cut(llama, prompt):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    data = DataConfig(max_length=40, prompt=prompt)
    encoder = Encoder(tokenizer, data, ["x", "y"])
    short = encoder.encode(Example("1", "The school", "The bakery", 0))["input_ids"]
    long = encoder.encode(Example("2", "The school " * 90, "The bakery", 0))["input_ids"]
    assert len(long) == 40
    assert long[: len(encoder.head)] == encoder.head == short[: len(encoder.head)]
    assert long[len(long) - len(encoder.tail) :] == encoder.tail
    assert encoder.middle == [] or any(
        long[i : i + len(encoder.middle)] == encoder.middle for i in range(len(long) - len(encoder.middle) + 1)
    )
    after = tokenizer("The bakery", add_special_tokens=False)["input_ids"]
    assert long[len(long) - len(encoder.tail) - len(after) : len(long) - len(encoder.tail)] == after


def test_a_template_longer_than_the_limit_is_refused(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    with pytest.raises(ConfigError, match="template alone takes"):
        Encoder(tokenizer, DataConfig(max_length=16, prompt="instruction"), ["label"] * 30)


def test_text_cannot_smuggle_in_special_tokens(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    encoded = Encoder(tokenizer, DataConfig(), ["x", "y"]).encode(Example("1", "<pad> </s>", "b", 0))
    assert tokenizer.pad_token_id not in encoded["input_ids"]
    assert tokenizer.eos_token_id not in encoded["input_ids"]


def test_an_example_without_any_token_is_named(llama):
    encoder = Encoder(AutoTokenizer.from_pretrained(llama), DataConfig(after=None), ["x", "y"])
    with pytest.raises(DataError, match="example 'train:7' has no text"):
        encoder.encode(Example("train:7", "", None, 0))
    pair = Encoder(AutoTokenizer.from_pretrained(llama), DataConfig(prompt="tagged"), ["x", "y"])
    assert pair.encode(Example("train:8", "", "", 0))["input_ids"] == pair.head + pair.middle + pair.tail
