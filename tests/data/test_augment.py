"""Augmented pairs hold the same revision."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irtune.config import load_config
from irtune.data import Example
from irtune.data.augment import Augmenter, delete, joined, pair_tokens, read_synonyms, shared_words, swap, without
from irtune.data.diff import WORDS, diff
from irtune.errors import ConfigError, DataError

pytestmark = pytest.mark.quick
SYNONYMS = {"big": ["large", "very great"], "house": ["home"], "a": ["one"]}
WORD = st.sampled_from(["a", "big", "Big", "house", "x", "yes", ",", ".", "été", "it's"])
TEXT = st.lists(WORD, max_size=9).map(" ".join)


def words(text):
    return Counter(word for word in WORDS.findall(text) if word[0].isalnum())


def test_a_deleted_word_goes_from_both_texts():
    tokens = pair_tokens("a b c d", "a b x d")
    kept = without(tokens, {0})
    assert (joined(kept, "=-"), joined(kept, "=+")) == ("b c d", "b x d")
    last = without(tokens, {shared_words(tokens)[-1]})
    assert (joined(last, "=-"), joined(last, "=+")) == ("a b c", "a b x")


def test_a_swap_by_hand():
    tokens = pair_tokens("one c two", "one x two")
    swapped = swap(tokens, random.Random(0))
    assert (joined(swapped, "=-"), joined(swapped, "=+")) == ("two c one", "two x one")


@settings(max_examples=150, deadline=None)
@given(TEXT, TEXT, st.integers(0, 40), st.booleans())
def test_what_was_removed_and_what_was_added_stay_the_same(before, after, epoch, knows):
    example = Example("1", before, after, 0)
    found = Augmenter(3, SYNONYMS if knows else {}).variant(example, epoch)
    assert found == Augmenter(3, SYNONYMS if knows else {}).variant(example, epoch)
    assert replace(found, before=before, after=after) == example
    assert words(found.before) - words(found.after) == words(before) - words(after)
    assert words(found.after) - words(found.before) == words(after) - words(before)
    edits = [piece.text for piece in diff(before, after) if piece.kind != "="]
    tokens = pair_tokens(before, after)
    for operation in (swap, delete):
        changed = operation(tokens, random.Random(epoch))
        assert [word for kind, word in changed if kind != "="] == [word for kind, word in tokens if kind != "="]
        assert bool(shared_words(changed)) == bool(shared_words(tokens))
    assert "".join(edits) == "".join(word for kind, word in tokens if kind != "=")


def test_epochs_and_examples_differ_and_a_tenth_are_originals():
    text = " ".join(f"w{i}" for i in range(30))
    augmenter = Augmenter(0, {})
    seen = [augmenter.variant(Example("1", text, None, 0), epoch) for epoch in range(400)]
    assert all(example.after is None for example in seen) and len({example.before for example in seen}) > 200
    assert 20 <= sum(example.before == text for example in seen) <= 90  # 40, and deletions that spare all words
    other = [augmenter.variant(Example("2", text, None, 0), epoch) for epoch in range(20)]
    assert [example.before for example in other] != [example.before for example in seen[:20]]


def test_synonyms_keep_the_case_and_are_put_in_both_texts():
    augmenter = Augmenter(0, {"big": ["large"]})
    found = {
        (found.before, found.after)
        for epoch in range(60)
        for found in [augmenter.variant(Example("1", "Big house was", "Big house is", 0), epoch)]
    }
    assert ("Large house was", "Large house is") in found
    assert found & {("Big house large was", "Big house large is"), ("Big large house was", "Big large house is")}


def test_a_file_of_synonyms(tmp_path):
    file = tmp_path / "synonyms.txt"
    file.write_text("\ufeffbig, large, Great\n\nlarge,wide\n", encoding="utf-8")
    found, digest = read_synonyms(file)
    assert found["large"] == ["big", "Great", "wide"] and found["great"] == ["big", "large"]
    assert found["big"] == ["large", "Great"] and found["wide"] == ["large"] and len(found) == 4
    assert len(digest) == 64
    for content, said in (
        ("big, large\nbig\n", r"line 2: 'big' is not a list of synonyms; accepted: two or more words"),
        ("big, , large\n", "line 1: 'big, , large' is not"),
        ("big, big\n", "line 1: 'big, big' is not"),
        ("big, la\x07rge\n", "line 1"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=said):
            read_synonyms(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"synonyms.txt cannot be read: byte 0 is not UTF-8"):
        read_synonyms(file)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_synonyms(tmp_path / "none.txt")


@pytest.mark.parametrize(
    "options, said",
    [
        (["--data.synonyms=x.txt"], "data.synonyms goes with data.augment eda"),
        (["--data.augment=eda", "--optim.micro_batch_tokens=512"], "data.augment changes the number of tokens"),
        (["--optim.mixup=0.2", "--optim.micro_batch_size=1"], "optim.mixup needs other examples in a micro-batch"),
        (["--optim.contrastive=0.1", "--optim.micro_batch_size=1"], "optim.contrastive needs other examples in"),
        (["--optim.mixup=0.2", "--data.multi_label=true"], "optim.mixup goes with one label per example"),
        (["--optim.contrastive=1", "--data.task=regression"], "optim.contrastive goes with one label per example"),
        (
            ["--optim.mixup=0.2", "--adapter.type=ltuning-prompt"],
            "optim.mixup does not go with adapter.type ltuning",
        ),
        (["--optim.contrastive=1", "--adapter.type=ltuning-prefix"], "optim.contrastive does not go with adapter.type"),
        (["--optim.mixup=0.2", "--optim.rdrop=1"], "optim.mixup does not go with optim.rdrop"),
        (["--optim.mixup=-1"], "optim.mixup is -1"),
    ],
)
def test_what_does_not_go_together_is_named(options, said):
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        load_config(["--data.path", "x", *options])
