"""From a pair of texts to token ids: a template around them that is never cut."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from irtune.config.schema import DataConfig
from irtune.config.template import template_pieces
from irtune.data import diff
from irtune.data.corpus import Corpus, Example
from irtune.data.pair_format import pair_format
from irtune.errors import ConfigError, DataError

# Pieces of each template around {before} and {after}, and what takes the place of the first one where {context} comes
# before them. The instruction also gets the list of labels.
QUESTION = "Why was this text revised? Possible intentions: {labels}."
PIECES = {
    "tagged": ("<old>", "</old>\n<new>", "</new>"),
    "instruction": (f"{QUESTION}\nBefore: ", "\nAfter: ", "\nIntention:"),
}
WITH_CONTEXT = {
    "tagged": ("<context>", "</context>\n<old>"),
    "instruction": (f"{QUESTION}\nContext: ", "\nBefore: "),
}
Encoded = dict[str, list[dict[str, list[int]]]]  # by split: what `Encoder.encode` makes of each example
LEAST_CHARACTERS = 8  # of each edit that are shown, before later edits are
PAIR_SEPARATOR = "\n"  # for tokenizers without a separator of their own


class Encoder:
    """Turns examples into token ids no longer than `data.max_length`.

    The tokenizer's own special tokens are where it puts them around one text (or around and between two, for `plain`
    with tokenizers that have a separator). Text that looks like a special token is split like any other text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data: DataConfig,
        labels: Sequence[str],
        *,
        mask: Literal["edit_mask", "side_mask"] | None = None,
    ):
        """Prepare the template.

        Args:
            tokenizer: the model's.
            data: the prompt and the length.
            labels: names of the classes, for `instruction`.
            mask: encoded examples also say which tokens belong to edits, which only the prompt `diff` marks, or to
                which text of a pair, which every other prompt knows.

        Raises:
            ConfigError: when the template alone is longer than `data.max_length`, or the tokenizer cannot tell which
                characters a token stands for, and `mask` asks.
        """
        self.mask, self.context_words = mask, data.context_words
        self.has_pair, self.has_context = data.after is not None, data.context is not None
        self.is_diff = data.prompt == "diff" and data.template is None and self.has_pair
        if mask == "edit_mask" and not tokenizer.is_fast:
            raise ConfigError(
                f"{type(tokenizer).__name__} does not tell which characters a token stands for, so the tokens of edits "
                "are not known; accepted: model.pooling class, last, cls or mean"
            )
        self.tokenizer = tokenizer
        self.max_length = data.max_length
        self.token_types = "token_type_ids" in tokenizer.model_input_names
        self.tail_types: list[int] | None = None  # where they are not those of the text before them
        self.opening, self.head, self.middle, self.tail = self._template(data, labels)
        self.fixed = len(self.opening) + len(self.head) + len(self.middle) + len(self.tail)
        self.budget = data.max_length - self.fixed
        if self.budget < 2:
            raise ConfigError(
                f"data.max_length is {data.max_length}, but "
                f"{'your template (data.template)' if data.template else f'the {data.prompt} template'} alone takes "
                f"{self.fixed} tokens; accepted: at least {self.fixed + 2}"
            )

    def _template(self, data: DataConfig, labels: Sequence[str]) -> tuple[list[int], list[int], list[int], list[int]]:
        """Token ids before the context (none where there is none), before, between and after the texts."""
        start, end = self._specials()
        separator = self.tokenizer.sep_token_id
        between = [separator] if separator is not None else self._ids(PAIR_SEPARATOR)
        written = self._written(data, labels)
        around = [self._ids(piece) for piece in written or ("", "")]
        if not written and self.has_pair and not self.is_diff:
            around = [[], between, []]
            pair = pair_format(self.tokenizer, self._ids)
            if pair is not None:
                self.tail_types = pair.tail_types
                start, around, end = pair.head, [[], pair.middle, []], pair.tail
        if not written and self.has_context:
            around.insert(1, between)
        around = [start + around[0], *around[1:-1], around[-1] + end]
        opening = around.pop(0) if self.has_context else []
        return opening, around[0], around[1] if len(around) > 2 else [], around[-1]

    def _written(self, data: DataConfig, labels: Sequence[str]) -> Sequence[str]:
        """The pieces of text before, between and behind context and texts; none where only separators are there."""
        if data.template is not None:
            return template_pieces(data.template, labels)
        if not self.has_pair or data.prompt not in PIECES:
            return ()
        pieces: tuple[str, ...] = PIECES[data.prompt]
        if self.has_context:
            pieces = (*WITH_CONTEXT[data.prompt], *pieces[1:])
        return [piece.format(labels=", ".join(labels)) for piece in pieces]

    def _specials(self) -> tuple[list[int], list[int]]:
        """Special tokens that the tokenizer puts before and after one text."""
        plain = self._ids("a")
        full = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
        return [], []

    def _ids(self, text: str) -> list[int]:
        found = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return found["input_ids"]

    def length(self, example: Example) -> int:
        """Tokens of one example before anything is shortened."""
        fixed = self.fixed + (len(self._ids(example.context or "")) if self.has_context else 0)
        if self.is_diff:
            return fixed + len(self._ids(diff.render(self._pieces(example)).text))
        return fixed + len(self._ids(example.before)) + len(self._ids(example.after or ""))

    def _front(self, example: Example, used: int) -> list[int]:
        """What comes before the texts, which take `used` tokens: their context has the rest, and loses its start."""
        if not self.has_context:
            return self.head
        context = self._ids(example.context or "")
        return self.opening + context[max(0, len(context) - (self.budget - used)) :] + self.head

    def encode(self, example: Example) -> dict[str, list[int]]:
        """Token ids of one example; token types 0/1 where the tokenizer has them; where it was asked for, edit_mask
        0/1, or side_mask 1 for tokens of the old text, 2 for those of the new one, else 0.

        Raises:
            DataError: when not a single token is left of it, or a diff has no text after.
        """
        if self.is_diff:
            return self._encode_diff(example)
        before = self._ids(example.before)
        after = self._ids(example.after) if example.after is not None else []
        before, after = shorten(before, after, self.budget)
        front = self._front(example, len(before) + len(after))
        first, second = front + before + self.middle, after + self.tail
        if not first + second:
            raise DataError(f"example {example.id!r} has no text: the model would see nothing at all")
        encoded = {"input_ids": first + second}
        if self.token_types:
            paired = len(second) if self.has_pair else 0
            types = [0] * (len(first) + len(second) - paired) + [1] * paired
            if self.tail_types is not None:
                types[len(types) - len(self.tail_types) :] = self.tail_types
            encoded["token_type_ids"] = types
        if self.mask == "side_mask":
            sides = [0] * len(front) + [1] * len(before) + [0] * len(self.middle) + [2] * len(after)
            encoded["side_mask"] = sides + [0] * len(self.tail)
        return encoded

    def encode_corpus(self, corpus: Corpus) -> Encoded:
        """Token ids of every split.

        On one CPU core, 3,000 pairs of sentences take a second; with the prompt diff, pairs of paragraphs (150 words
        each, shortened to 256 tokens) take 6 ms each, and of pages (550 words) 13 ms.

        Raises:
            DataError: as `encode`.
        """
        return {split: [self.encode(example) for example in examples] for split, examples in corpus.splits.items()}

    def digest(self) -> str:
        """SHA-256 of the tokenizer and of what is put around its tokens: equal ones make equal token ids."""
        tokenizer = self.tokenizer
        found = hashlib.sha256(type(tokenizer).__name__.encode())
        around = [self.head, self.middle, self.tail, self.budget, self.token_types, self.has_pair]
        around += [self.tail_types] if self.tail_types is not None else []
        around += [self.opening] if self.has_context else []
        if self.is_diff:
            around += [*diff.DEFAULT.all(), self.context_words, self.mask is not None]
        found.update(json.dumps(around).encode())
        if tokenizer.is_fast:
            found.update(tokenizer.backend_tokenizer.to_str().encode())
            return found.hexdigest()
        found.update(json.dumps([sorted(tokenizer.get_vocab().items()), repr(tokenizer.init_kwargs)]).encode())
        for name in tokenizer.vocab_files_names:
            file = getattr(tokenizer, name, None)
            if isinstance(file, str) and Path(file).is_file():
                found.update(Path(file).read_bytes())
        return found.hexdigest()

    def _pieces(self, example: Example) -> list[diff.Piece]:
        if example.after is None:
            raise DataError(f"example {example.id!r} has no text after the revision, which data.prompt diff needs")
        pieces = diff.diff(example.before, example.after)
        return pieces if self.context_words is None else diff.near_edits(pieces, self.context_words)

    def _encode_diff(self, example: Example) -> dict[str, list[int]]:
        pieces = self._pieces(example)
        marked = diff.render(pieces)
        if not self._fits(pieces):
            marked = diff.render(self._shortened(pieces))
        found = self.tokenizer(
            marked.text,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=self.mask is not None,
            verbose=False,
        )
        marked_ids = found["input_ids"][: self.budget]
        front = self._front(example, len(marked_ids))
        ids = front + marked_ids + self.tail
        if not ids:
            raise DataError(f"example {example.id!r} has no text: the model would see nothing at all")
        encoded = {"input_ids": ids}
        if self.token_types:
            encoded["token_type_ids"] = [0] * len(ids)
        if self.mask is not None:
            inside = bytearray(len(marked.text))
            for start, end in marked.edits:
                inside[start:end] = b"\1" * (end - start)
            mask = [int(1 in inside[start:end]) for start, end in found["offset_mapping"][: self.budget]]
            encoded["edit_mask"] = [0] * len(front) + mask + [0] * len(self.tail)
        return encoded

    def _fits(self, pieces: Sequence[diff.Piece]) -> bool:
        return len(self._ids(diff.render(pieces).text)) <= self.budget

    def _shortened(self, pieces: list[diff.Piece]) -> list[diff.Piece]:
        """Pieces whose text fits, but for very many edits: unchanged text goes first, then the ends of long edits."""
        edits = [place for place, piece in enumerate(pieces) if piece.kind != "="]
        if not edits:
            return pieces  # its end is cut
        pieces = pieces[: [*edits, len(pieces)][min(len(edits), self.budget)]]  # each edit takes a token at least
        bare = diff.near_edits(pieces, 0)
        if self._fits(bare):
            words = diff.largest(lambda words: self._fits(diff.near_edits(pieces, words)), self.budget)
            return diff.near_edits(pieces, words or 0)
        words = diff.largest(lambda words: self._fits(diff.shorten_edits(bare, words)), self.budget)
        short = diff.shorten_edits(bare, words or 1)
        if words:
            return short
        # Single words that are too long: addresses, encoded data, scripts without blanks.
        limit = min(max(len(piece.text) for piece in short), 16 * self.budget)
        characters = diff.largest(lambda characters: self._fits(diff.cut_edits(short, characters)), limit)
        return diff.cut_edits(short, max(characters or 0, LEAST_CHARACTERS))


def shorten(before: list[int], after: list[int], budget: int) -> tuple[list[int], list[int]]:
    """Cut the end of the longer text until both fit into `budget` tokens; equal lengths are cut alike.

    The shorter text is only touched once the longer one has come down to its length.
    """
    excess = len(before) + len(after) - budget
    if excess <= 0:
        return before, after
    short = min(len(before), len(after))
    if 2 * short <= budget:
        keep = budget - short
        return (before[:keep], after) if len(before) > len(after) else (before, after[:keep])
    return before[: budget - budget // 2], after[: budget // 2]
