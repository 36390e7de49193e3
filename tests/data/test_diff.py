"""The marked text of a pair: by hand, recovered from whatever hypothesis thinks of, and in bounded time."""

import itertools
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from irtune.config import load_config
from irtune.config.schema import DataConfig
from irtune.data import Encoder, Example
from irtune.data.diff import DEFAULT, Marks, Piece, cut_edits, diff, largest, near_edits, render, shorten_edits
from irtune.errors import ConfigError, DataError

pytestmark = pytest.mark.quick
TRICKY = st.text(alphabet="ab [-]{+}<>\\/deli ", max_size=40)
MARKS = {
    "wdiff": DEFAULT,
    "html": Marks("<del>", "</del>", "<ins>", "</ins>"),
    "angles": Marks("<-", "->", "<+", "+>"),
}


def texts(marked: str, marks: Marks = DEFAULT) -> tuple[str, str]:
    """The texts before and after of a marked text; a ValueError when an edit does not end."""
    split = re.compile("|".join(rf"(?<={re.escape(mark[0])})\\+(?={re.escape(mark[1:])})" for mark in marks.all()))

    def plain(text: str) -> str:
        return split.sub(lambda found: found[0][1:], text)

    before, after, place = "", "", 0
    opening = re.compile(f"{re.escape(marks.before_removed)}|{re.escape(marks.before_added)}")
    while (found := opening.search(marked, place)) is not None:
        removed = found[0] == marks.before_removed
        end = marked.index(marks.after_removed if removed else marks.after_added, found.end())
        same, edited = plain(marked[place : found.start()]), plain(marked[found.end() : end])
        before += same + (edited if removed else "")
        after += same + ("" if removed else edited)
        place = end + len(marks.after_removed if removed else marks.after_added)
    return before + plain(marked[place:]), after + plain(marked[place:])


@pytest.mark.parametrize(
    "before, after, marked",
    [
        ("the blue house", "the red house", "the [-blue-]{+red+} house"),
        ("", "all of it is new", "{+all of it is new+}"),
        ("all of it goes", "", "[-all of it goes-]"),
        ("no change", "no change", "no change"),
        ("", "", ""),
        ("a b", "a  b", "a[- -]{+  +}b"),  # whitespace
        ("a\nb", "a b", "a[-\n-]{+ +}b"),
        ("Well he left", "Well, he left", "Well{+,+} he left"),  # punctuation
        ("it's", "its", "[-it's-]{+its+}"),
        ("x [-y-] z", "x [-y-] w", r"x [\-y-\] [-z-]{+w+}"),
        ("a {+b+}", "a", r"a[- {\+b+\}-]"),
        ("猫が好きです", "犬が好きです", "[-猫-]{+犬+}が好きです"),  # no blanks between words
        ("我爱红色的房子。", "我爱蓝色的房子。", "我爱[-红-]{+蓝+}色的房子。"),
        ("빨간 집", "파란 집", "[-빨간-]{+파란+} 집"),
        (r"[\- x", r"[\- y", r"[\\- [-x-]{+y+}"),
    ],
)
def test_hand_worked_pairs(before, after, marked):
    found = render(diff(before, after))
    assert found.text == marked
    assert texts(marked) == (before, after)


def test_edits_are_where_their_marks_are():
    found = render(diff("the blue house [-", "the red house [-"))
    assert [found.text[start:end] for start, end in found.edits] == ["[-blue-]", "{+red+}"]


@pytest.mark.parametrize("kind", MARKS)
@given(TRICKY, TRICKY)
def test_both_texts_can_be_recovered(kind, before, after):
    pieces = diff(before, after)
    assert "".join(piece.text for piece in pieces if piece.kind != "+") == before
    assert "".join(piece.text for piece in pieces if piece.kind != "-") == after
    found = render(pieces, MARKS[kind])
    assert texts(found.text, MARKS[kind]) == (before, after)
    assert len(found.edits) == sum(piece.kind != "=" for piece in pieces)


@given(TRICKY, TRICKY)
def test_long_pairs_are_aligned_too(before, after):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("irtune.data.diff.LARGEST_PRODUCT", -1)
        pieces = diff(before, after)
    assert texts(render(pieces).text) == (before, after)
    assert all({one.kind, other.kind} != {"="} for one, other in itertools.pairwise(pieces))
    assert all((one.kind, other.kind) != ("+", "-") for one, other in itertools.pairwise(pieces))


@pytest.mark.parametrize(
    "before, after",
    [
        ("a b " * 12_500, "b a c " * 8_333),  # everything is popular, and nothing is long: difflib's worst case
        (" ".join(map(str, range(9_000))), " ".join(map(str, range(1, 18_000, 2)))),
        ("x" * 50_000, "y" * 50_000),
        ("." * 50_000, "!" * 50_000),
    ],
)
def test_cells_of_50000_characters_take_bounded_time(llama, before, after):
    encoder = Encoder(AutoTokenizer.from_pretrained(llama), DataConfig(prompt="diff", max_length=64), ["x", "y"])
    started = time.process_time()
    assert len(encoder.encode(Example("1", before, after, 0))["input_ids"]) <= 64
    assert time.process_time() - started < 5  # about 1; difflib alone would take hours for the first


@pytest.mark.parametrize(
    "before, after", [("a b " * 50, "b a c " * 33), ("." * 200, "." * 200), ("a b " * 120, "b a c " * 80)]
)
def test_pairs_of_hundreds_of_words_take_milliseconds(before, after):
    started = time.process_time()
    for _ in range(20):
        assert texts(render(diff(before, after)).text) == (before, after)
    assert time.process_time() - started < 2  # below 0.5; difflib takes 4 for the longest


def test_unchanged_text_far_from_edits_is_left_out():
    pieces = diff("one two, three. four five six seven", "one two, three. FOUR five six SEVEN")
    assert render(near_edits(pieces, 1)).text == "… three. [-four-]{+FOUR+} five six [-seven-]{+SEVEN+}"
    assert render(near_edits(pieces, 0)).text == "…[-four-]{+FOUR+}…[-seven-]{+SEVEN+}"
    assert near_edits(pieces, 3) == pieces
    long = diff("a b c d e f g h", "A b c d e f g H")
    assert render(near_edits(long, 2)).text == "[-a-]{+A+} b c … f g [-h-]{+H+}"
    same = diff("nothing is new here", "nothing is new here")
    assert near_edits(same, 0) == same


def test_long_edits_keep_their_beginning():
    pieces = [Piece("=", ["a", " "]), Piece("-", ["b", " ", "c", " ", "d"]), Piece("+", ["e"])]
    assert render(shorten_edits(pieces, 2)).text == "a [-b c …-]{+e+}"
    assert shorten_edits(pieces, 3) == pieces


def test_cut_edits_keep_their_first_characters():
    pieces = [Piece("=", ["longer than that"]), Piece("-", ["abcdef"]), Piece("+", ["abc"])]
    assert render(cut_edits(pieces, 3)).text == "longer than that[-abc…-]{+abc+}"
    assert cut_edits(pieces, 6) == pieces


@given(st.integers(-1, 40), st.integers(0, 40))
def test_the_largest_that_fits(bound, limit):
    assert largest(lambda number: number <= bound, limit) == (None if bound < 0 else min(bound, limit))


# ----- encoded -----


def encoded(folder, max_length=64, context=None, **texts_of):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = DataConfig(prompt="diff", max_length=max_length, context_words=context)
    found = Encoder(tokenizer, data, ["x", "y"], mask="edit_mask").encode(Example("1", label=0, **texts_of))
    assert len(found["input_ids"]) == len(found["edit_mask"]) <= max_length
    return tokenizer.decode(found["input_ids"]), [
        tokenizer.decode(token) for token, inside in zip(found["input_ids"], found["edit_mask"]) if inside
    ]


def test_the_mask_shows_the_tokens_of_edits(bpe):
    _, marked = encoded(bpe, before="the blue house", after="the red house")
    assert "".join(marked).strip() == "[-blue-]{+red+}"
    assert encoded(bpe, before="the house", after="the house") == ("the house", [])


def test_truncation_takes_context_first_and_keeps_every_edit(bpe):
    text = "far " * 60 + "near one blue house near two " + "far " * 60 + "the end is near"
    shown, _ = encoded(bpe, before=text, after=text.replace("blue", "red").replace("end", "rest"))
    assert shown.startswith("… far far") and shown.count("…") == 2
    assert "far near one [-blue-]{+red+} house near two far" in shown and shown.endswith(
        "far the [-end-]{+rest+} is near"
    )


def test_truncation_of_edits_that_are_too_long_keeps_the_beginning_of_each(bpe):
    shown, marked = encoded(bpe, before="some context. " + "blue " * 90, after="some context. " + "the-red-" * 90)
    assert "context" not in shown and "".join(marked) in shown
    assert shown.startswith("…[-blue blue") and " …-]{+the-red-the" in shown and shown.endswith("…+}")


def test_of_a_long_word_both_sides_are_shown(bpe):
    shown, marked = encoded(bpe, before="see https://" + "x1" * 300, after="see https://" + "y2" * 300)
    removed, added = shown.split("-]{+")
    assert removed.startswith("…[-") and "x1x1" in removed and removed.endswith("…")
    assert "y2y2" in added and added.endswith("…+}") and len(marked) > 50


def test_more_edits_than_fit_are_shown_from_the_first_on(bpe):
    shown, _ = encoded(bpe, before="unchanged two " * 300, after="unchanged three " * 300)
    assert shown.startswith("…[-two-]{+three+}…[-two-]{+three+}…")


def test_context_words_and_token_types(bpe, bert):
    shown, _ = encoded(bpe, context=1, before="a b c blue d e f", after="a b c red d e f")
    assert shown == "… c [-blue-]{+red+} d …"
    tokenizer = AutoTokenizer.from_pretrained(bert)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    found = Encoder(tokenizer, DataConfig(prompt="diff"), ["x", "y"]).encode(Example("1", "a", "b", 0))
    assert set(found["token_type_ids"]) == {0} and "edit_mask" not in found


def test_everything_about_a_diff_is_in_the_digest_that_ranks_compare(bpe):
    tokenizer = AutoTokenizer.from_pretrained(bpe)
    made = {
        Encoder(tokenizer, DataConfig(prompt=prompt, context_words=words), ["x", "y"], mask=mask).digest()
        for prompt, words, mask in [
            ("plain", None, None),
            ("diff", None, None),
            ("diff", None, "edit_mask"),
            ("diff", 3, "edit_mask"),
        ]
    }
    assert len(made) == 4


def test_a_diff_needs_a_pair(bpe):
    with pytest.raises(ConfigError, match=r"data.prompt diff compares two texts, but data.after is null"):
        load_config(["--data.path=x", "--data.prompt=diff", "--data.after=null"])
    with pytest.raises(ConfigError, match=r"data.context_words goes with data.prompt diff, not tagged"):
        load_config(["--data.path=x", "--data.prompt=tagged", "--data.context_words=3"])
    encoder = Encoder(AutoTokenizer.from_pretrained(bpe), DataConfig(prompt="diff"), ["x", "y"])
    with pytest.raises(DataError, match=r"example '7' has no text after the revision"):
        encoder.encode(Example("7", "a", None, 0))
