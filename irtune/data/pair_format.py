"""A tokenizer's own way to write a pair, which pretraining has seen: [CLS] a [SEP] b [SEP], <s> a </s></s> b </s>."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PairFormat:
    """Special tokens around and between two texts; token types of the last ones, where they are no 1s."""

    head: list[int]
    middle: list[int]
    tail: list[int]
    tail_types: list[int] | None


def pair_format(tokenizer: PreTrainedTokenizerBase, ids_of: Callable[[str], list[int]]) -> PairFormat | None:
    """The pair format of a tokenizer with a separator; None where it has none, or none in its pairs.

    Tokenizers of language models (Llama, GPT-2) have no separator. Their post-processors, if any, put a second
    begin-of-text token between two texts, which pretraining never showed.
    """
    separator = tokenizer.sep_token_id
    if separator is None:
        return None
    first, second = ids_of("a"), ids_of("b")
    whole = tokenizer("a", "b", add_special_tokens=True)
    ids, types = list(whole["input_ids"]), whole.get("token_type_ids")
    start = _find(first, ids, 0)
    after = None if start is None else _find(second, ids, start + len(first) + 1)
    if start is None or after is None:
        return None
    middle, tail = ids[start + len(first) : after], ids[after + len(second) :]
    if separator not in middle:
        return None
    usual = types is None or all(kind == 1 for kind in types[len(ids) - len(tail) :])
    return PairFormat(ids[:start], middle, tail, None if usual else list(types[len(ids) - len(tail) :]))


def _find(part: list[int], whole: list[int], start: int) -> int | None:
    places = range(start, len(whole) - len(part) + 1)
    return next((i for i in places if whole[i : i + len(part)] == part), None) if part else None
