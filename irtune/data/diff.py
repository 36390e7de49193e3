"""A pair of texts as one marked text: unchanged words once, what was removed and added at its place.

    the blue house + the red house -> the [-blue-]{+red+} house

Pure functions of strings. From a marked text without left-out context, `texts` recovers both sides exactly.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import cache
from typing import Literal

from rapidfuzz.distance import Indel

# Chinese characters and kana: scripts without blanks between words.
_UNSPACED = (
    r"\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
# Words, single characters of those scripts, runs of whitespace, and single punctuation marks: every character is in
# exactly one of them.
WORDS = re.compile(rf"\s+|[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")
ELLIPSIS = "…"
# difflib's alignments read best, since they keep long runs together, but its worst case is cubic. Pairs of more words
# than this (the product of both numbers) are aligned by rapidfuzz, whose time is bounded: words x words / 64.
LARGEST_PRODUCT = 40_000


@dataclass(frozen=True)
class Marks:
    """What stands before and after removed and added text. Each has at least two characters."""

    before_removed: str
    after_removed: str
    before_added: str
    after_added: str

    def all(self) -> tuple[str, str, str, str]:
        """The four of them."""
        return self.before_removed, self.after_removed, self.before_added, self.after_added


# Three kinds that tokenizers split without new tokens. Around one replaced word, the marks take 7, 10 and 8 tokens of
# SmolLM2's.
MARKS = {
    "wdiff": Marks("[-", "-]", "{+", "+}"),
    "html": Marks("<del>", "</del>", "<ins>", "</ins>"),
    "angles": Marks("<-", "->", "<+", "+>"),
}
DEFAULT = MARKS["wdiff"]


@dataclass(frozen=True)
class Piece:
    """A run of words that is unchanged, removed or added."""

    kind: Literal["=", "-", "+"]
    words: Sequence[str]

    @property
    def text(self) -> str:
        """The words, joined."""
        return "".join(self.words)


@dataclass(frozen=True)
class Marked:
    """A marked text; `edits` are the places of its edits with their marks, [start, end) in characters, in order."""

    text: str
    edits: list[tuple[int, int]]


def diff(before: str, after: str) -> list[Piece]:
    """The pieces of a pair in order; of a replacement, what was removed comes first.

    The words of "=" and "-" make up `before`, those of "=" and "+" make up `after`.
    """
    first, second = WORDS.findall(before), WORDS.findall(after)
    pieces: list[Piece] = []
    for tag, i, j, k, m in _opcodes(first, second):
        if tag == "equal":
            pieces.append(Piece("=", first[i:j]))
            continue
        pieces += [Piece("-", first[i:j])] if j > i else []
        pieces += [Piece("+", second[k:m])] if m > k else []
    return pieces


def _opcodes(first: list[str], second: list[str]) -> Sequence[tuple[str, int, int, int, int]]:
    if len(first) * len(second) <= LARGEST_PRODUCT:
        return SequenceMatcher(None, first, second, autojunk=False).get_opcodes()
    # It tells a replacement as an insertion and a deletion, in any order.
    joined: list[tuple[str, int, int, int, int]] = []
    for code in Indel.opcodes(first, second):
        found = (code.tag, code.src_start, code.src_end, code.dest_start, code.dest_end)
        if joined and "equal" not in (joined[-1][0], found[0]):
            _, i, _, k, _ = joined.pop()
            found = ("replace", i, found[2], k, found[4])
        joined.append(found)
    return joined


def render(pieces: Sequence[Piece], marks: Marks = DEFAULT) -> Marked:
    """The marked text of `pieces`. Marks that are in their text get a backslash behind the first character."""
    text, length, edits = [], 0, []
    for piece in pieces:
        shown = _escape(piece.text, marks)
        if piece.kind == "-":
            shown = marks.before_removed + shown + marks.after_removed
        elif piece.kind == "+":
            shown = marks.before_added + shown + marks.after_added
        if piece.kind != "=":
            edits.append((length, length + len(shown)))
        text.append(shown)
        length += len(shown)
    return Marked("".join(text), edits)


def texts(marked: str, marks: Marks = DEFAULT) -> tuple[str, str]:
    """The texts before and after of a marked text.

    Raises:
        ValueError: when an edit does not end.
    """
    before, after, place = "", "", 0
    opening = re.compile(f"{re.escape(marks.before_removed)}|{re.escape(marks.before_added)}")
    while (found := opening.search(marked, place)) is not None:
        removed = found[0] == marks.before_removed
        end = marked.index(marks.after_removed if removed else marks.after_added, found.end())
        same, edited = (_unescape(marked[a:b], marks) for a, b in ((place, found.start()), (found.end(), end)))
        before += same + (edited if removed else "")
        after += same + ("" if removed else edited)
        place = end + len(marks.after_removed if removed else marks.after_added)
    rest = _unescape(marked[place:], marks)
    return before + rest, after + rest


def near_edits(pieces: Sequence[Piece], words: int) -> list[Piece]:
    """Leave out unchanged text further than `words` words from every edit; an ellipsis stands for it.

    Whitespace and punctuation are not counted. A pair without an edit stays as it is.
    """
    if all(piece.kind == "=" for piece in pieces):
        return list(pieces)
    last = len(pieces) - 1
    return [
        replace(piece, words=_ends(piece.words, words if place else 0, words if place < last else 0))
        if piece.kind == "="
        else piece
        for place, piece in enumerate(pieces)
    ]


def shorten_edits(pieces: Sequence[Piece], words: int) -> list[Piece]:
    """Keep the first `words` words of each edit; an ellipsis stands for the others."""
    return [piece if piece.kind == "=" else replace(piece, words=_ends(piece.words, words, 0)) for piece in pieces]


def cut_edits(pieces: Sequence[Piece], characters: int) -> list[Piece]:
    """Keep the first `characters` characters of each edit; an ellipsis stands for the others."""
    return [
        piece
        if piece.kind == "=" or len(piece.text) <= characters
        else replace(piece, words=[piece.text[:characters], ELLIPSIS])
        for piece in pieces
    ]


def largest(fits: Callable[[int], bool], limit: int) -> int | None:
    """The largest number from 0 to `limit` that `fits`, where smaller ones fit if larger ones do; None: not even 0."""
    if fits(limit):
        return limit
    low, high = -1, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low if low >= 0 else None


def _ends(words: Sequence[str], first: int, last: int) -> Sequence[str]:
    """The `first` and the `last` words of a run, an ellipsis between them; all of it where that leaves out no word."""
    places = [place for place, word in enumerate(words) if word[0].isalnum() or word[0] == "_"]
    if len(places) <= first + last:
        return words
    head = words[: places[first - 1] + 1] if first else []
    tail = words[places[-last] :] if last else []
    return [*head, *([" "] if head else []), ELLIPSIS, *([" "] if tail else []), *tail]


@cache
def _split_marks(marks: Marks) -> re.Pattern[str]:
    """Finds the place behind the first character of a mark, with the backslashes there."""
    return re.compile("|".join(rf"(?<={re.escape(mark[0])})\\*(?={re.escape(mark[1:])})" for mark in marks.all()))


def _escape(text: str, marks: Marks) -> str:
    return _split_marks(marks).sub(lambda found: "\\" + found[0], text)


def _unescape(text: str, marks: Marks) -> str:
    return _split_marks(marks).sub(lambda found: found[0][1:], text)
