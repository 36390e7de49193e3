"""Easy data augmentation (Wei and Zou, EMNLP 2019) of pairs: the revision itself stays as it is.

An operation touches only words that stand unchanged in both texts and does the same to both, so what was removed and
what was added are the same words as before. Case and punctuation stay.
"""

import hashlib
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from irtune.data.corpus import Example
from irtune.data.diff import diff
from irtune.errors import DataError, brief

log = logging.getLogger("irtune")
SHARE = 0.1  # alpha: of the words, that one operation changes, and the probability that a word is deleted
VARIANTS = 9  # per original, as the paper has it for small corpora
MAX_BYTES = 2**26  # of a file of synonyms
Tokens = list[tuple[str, str]]  # kind of piece (=, - or +), and a word, a blank or a punctuation mark of it
Synonyms = Mapping[str, Sequence[str]]


class Augmenter:
    """Draws a variant of an example for each epoch: the original once in ten times, else one operation on it.

    So does the paper's set of an original and nine variants, each by one of the operations in turn, over ten epochs.
    """

    def __init__(self, seed: int, synonyms: Synonyms):
        """`synonyms`: of words in lower case. Without any, words are swapped and deleted only."""
        self.seed, self.synonyms = seed, synonyms
        self.operations: list[Callable[[Tokens, random.Random], Tokens]] = [swap, delete]
        if synonyms:
            self.operations += [self._replace, self._insert]
        else:
            log.info("data.augment eda swaps and deletes words only: data.synonyms names no file")

    def variant(self, example: Example, epoch: int) -> Example:
        """The example as `epoch` sees it."""
        rng = random.Random(f"eda/{self.seed}/{epoch}/{example.id}")
        if rng.randrange(VARIANTS + 1) == 0:
            return example
        tokens = pair_tokens(example.before, example.before if example.after is None else example.after)
        changed = rng.choice(self.operations)(tokens, rng) if shared_words(tokens) else tokens
        before, after = (joined(changed, kinds) for kinds in ("=-", "=+"))
        return replace(example, before=before, after=None if example.after is None else after)

    def _replace(self, tokens: Tokens, rng: random.Random) -> Tokens:
        """Words by synonyms."""
        tokens, known = list(tokens), [i for i in shared_words(tokens) if tokens[i][1].lower() in self.synonyms]
        for place in rng.sample(known, min(len(known), _changes(tokens))):
            tokens[place] = ("=", self._synonym(tokens[place][1], rng))
        return tokens

    def _insert(self, tokens: Tokens, rng: random.Random) -> Tokens:
        """A synonym of a word behind another word."""
        tokens = list(tokens)
        for _ in range(_changes(tokens)):
            places = shared_words(tokens)
            known = [i for i in places if tokens[i][1].lower() in self.synonyms]
            if not known:
                break
            word, place = self._synonym(tokens[rng.choice(known)][1].lower(), rng), rng.choice(places)
            tokens[place + 1 : place + 1] = [("=", " "), ("=", word)]
        return tokens

    def _synonym(self, word: str, rng: random.Random) -> str:
        found = rng.choice(self.synonyms[word.lower()])
        return found[0].upper() + found[1:] if word[0].isupper() else found


def pair_tokens(before: str, after: str) -> Tokens:
    """The words, blanks and punctuation marks of a pair, those that both texts share once."""
    return [(piece.kind, word) for piece in diff(before, after) for word in piece.words]


def joined(tokens: Tokens, kinds: str) -> str:
    """The text of the tokens of these kinds: =- for the text before, =+ for the text after."""
    return "".join(word for kind, word in tokens if kind in kinds)


def shared_words(tokens: Tokens) -> list[int]:
    """Places of the words that stand in both texts."""
    return [i for i, (kind, word) in enumerate(tokens) if kind == "=" and (word[0].isalnum() or word[0] == "_")]


def _changes(tokens: Tokens) -> int:
    return max(1, int(SHARE * len(shared_words(tokens))))


def swap(tokens: Tokens, rng: random.Random) -> Tokens:
    """Two words change places, again and again."""
    tokens, places = list(tokens), shared_words(tokens)
    for _ in range(_changes(tokens) if len(places) > 1 else 0):
        one, other = rng.sample(places, 2)
        tokens[one], tokens[other] = tokens[other], tokens[one]
    return tokens


def delete(tokens: Tokens, rng: random.Random) -> Tokens:
    """Each word goes with a probability of a tenth, but never all."""
    places = shared_words(tokens)
    gone = {place for place in places if rng.random() < SHARE}
    if gone and len(gone) == len(places):
        gone.remove(rng.choice(places))
    return without(tokens, gone)


def without(tokens: Tokens, gone: set[int]) -> Tokens:
    """The tokens without the words at the places `gone`, each with the blank behind it, or else before it."""
    blanks = set[int]()
    for place in sorted(gone):
        for beside in (place + 1, place - 1):
            kind, word = tokens[beside] if 0 <= beside < len(tokens) else ("", "")
            if kind == "=" and word.isspace() and beside not in blanks:
                blanks.add(beside)
                break
    return [token for place, token in enumerate(tokens) if place not in gone and place not in blanks]


def read_synonyms(file: Path) -> tuple[Synonyms, str]:
    """Synonyms by word, and the SHA-256 of the file: a set of words per line, separated by commas.

    Raises:
        DataError: naming the line, for one that is not a list of two words or more; and for a file that cannot be read.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            raise DataError(f"data.synonyms: {file} has more than {MAX_BYTES // 2**20} MiB")
        content = file.read_bytes()
        lines = content.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"byte {error.start} is not UTF-8"
        raise DataError(f"data.synonyms: {file} cannot be read: {reason}") from error
    found: dict[str, dict[str, None]] = {}
    for number, line in enumerate(lines, 1):
        words = list(dict.fromkeys(word.strip() for word in line.split(","))) if line.strip() else []
        if line.strip() and (len(words) < 2 or not all(words) or not line.replace("\t", " ").strip().isprintable()):
            raise DataError(
                f"data.synonyms: {file}, line {number}: {brief(line.strip())} is not a list of synonyms; accepted: two "
                "or more words, separated by commas"
            )
        for word in words:
            found.setdefault(word.lower(), {}).update({other: None for other in words if other != word})
    return {word: list(others) for word, others in found.items()}, hashlib.sha256(content).hexdigest()
