"""What a cell may hold: texts, labels and ids. Errors name the place and show the value, however large, in one line."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from decimal import Decimal
from typing import Any

from irtune.config.labels import canonical
from irtune.errors import DataError, brief

Row = dict[str, Any]
# Gets the columns that a file has and returns those to read. May raise a DataError.
Columns = Callable[[Sequence[str]], Collection[str]]
MAX_CHARACTERS = 1_000_000  # of a text; a novel has about 500,000. Longer ones are files whose quotes went wrong
MAX_LABEL = 200
MAX_WEIGHT = 1_000_000  # of an example; larger numbers are another column
MAX_LABELS = 1_000  # of a corpus; the confusion matrix has the square of it
_TURNS_TERMINALS = {"Cc", "Zl", "Zp"}  # control characters and line breaks
_WHOLE = re.compile(r"-?[0-9]+")


class Hidden(int):
    """The -1 of a column of classes: the hub's mark for a label that is not given."""


def as_text(value: Any, where: str) -> str:
    """The text of a cell; an empty cell is an addition or a deletion.

    Raises:
        DataError: for another type, half characters, NUL characters, and more than `MAX_CHARACTERS`.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: expected text, not the {type(value).__name__} {brief(value)}")
    if len(value) > MAX_CHARACTERS:
        size = f"{len(value):,} characters; accepted: at most {MAX_CHARACTERS:,}"
        raise DataError(f"{where}: a text of {size} (is a quote left open?)")
    flaw = _flaw(value)
    if flaw is not None:
        raise DataError(f"{where}: {flaw}")
    return value


def by_number(names: Iterable[str]) -> list[str]:
    """Labels in order: by value where all of them are whole numbers, else as texts."""
    names = list(names)
    if all(_WHOLE.fullmatch(name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def as_weight(value: Any, where: str) -> float:
    """The weight of an example: a number from 0 to `MAX_WEIGHT`, or a text that is one.

    Raises:
        DataError: for anything else.
    """
    good = isinstance(value, str | int | float | Decimal) and not isinstance(value, bool)
    try:
        weight = float(value) if good else math.nan
    except (ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight <= MAX_WEIGHT:
        accepted = f"accepted: a number from 0 to {MAX_WEIGHT:,} (data.weight names the column)"
        raise DataError(f"{where}: {brief(value)} is not a weight; {accepted}")
    return weight


def as_label(value: Any, where: str) -> str:
    """The name of a label: a text, a whole number or a truth value, as `canonical` writes them.

    Raises:
        DataError: for other types, and for names that are empty, invisible, too long, or would confuse a terminal.
    """
    name = canonical(value)
    if isinstance(value, Hidden) or not isinstance(name, str):
        raise DataError(f"{where}: {brief(value)} is not a label{_hint(value)}")
    reason = _flaw(name)
    if len(name) > MAX_LABEL:
        reason = f"it has {len(name):,} characters, and at most {MAX_LABEL} are accepted; is this the column of labels?"
    elif any(unicodedata.category(character) in _TURNS_TERMINALS for character in name):
        reason = "it holds control characters or line breaks"
    elif not _visible(name):
        reason = "it has no visible characters"
    if reason is not None:
        raise DataError(f"{where}: {brief(name)} is not a label: {reason}")
    return name


def as_name(value: Any, where: str, what: str, option: str) -> str:
    """The name of an example or a document (`what`, whose column is `option`): text or a number.

    Raises:
        DataError: for other types, and for empty, damaged or endless ones.
    """
    good = isinstance(value, str | int | float | Decimal) and not isinstance(value, bool) and value == value  # not NaN
    # A blank at an end does not make another document.
    name = str(canonical(value.strip() if isinstance(value, str) else value)) if good else ""
    reason = _flaw(name)
    if reason is not None or not name or len(name) > 10 * MAX_LABEL:
        more = "" if reason is None else f": {reason}"
        raise DataError(
            f"{where}: {brief(value)} is an invalid {what}{more}; accepted: text or number ({option} names the column)"
        )
    return name


def _hint(value: Any) -> str:
    """What to do about a cell that is not a label."""
    if isinstance(value, list | tuple | set | dict):
        return "; an example has exactly one, a text or a whole number, unless data.multi_label is true"
    if isinstance(value, Hidden):
        return ": on the hub it marks rows without one"
    if value is None or value != value:
        return ": the cell is empty"
    if isinstance(value, float | Decimal):
        return "; accepted: a text, a whole number, or true and false (is this the column of labels?)"
    return ""


def _flaw(text: str) -> str | None:
    if "\0" in text:
        return "a NUL character (is this UTF-16, or no text at all?)"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return "half of a surrogate pair, which is not a character"
    return None


def _visible(name: str) -> str:
    """What is left of a name without characters that have no shape, with blanks alike: equal for names that look so."""
    shown = "".join(character for character in name if unicodedata.category(character) != "Cf")
    return " ".join(unicodedata.normalize("NFC", shown).split())


def check_looks(names: Iterable[str], where: str) -> None:
    """Raise a DataError for two labels that nobody can tell apart: they differ in blanks or invisible characters."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(_visible(name), name)
        if other != name:
            raise DataError(
                f"{where}: the labels {other!r} and {name!r} look alike but are {other!a} and {name!a}; make "
                "them equal, or map one to the other with data.labels"
            )


def check_names(names: Sequence[str], where: object) -> None:
    """Raise a DataError when a column's name appears twice: which of the two is meant cannot be known."""
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        count = names.count(twice[0])
        raise DataError(f"{where}: the column {brief(twice[0])} appears {count} times; rename all but one")


def distinct(names: Sequence[str]) -> list[str]:
    """Names of columns; of several without one, all but the first are called by their place, so that none is lost."""
    result: list[str] = []
    for place, name in enumerate(names, 1):
        result.append(f"column {place}" if name == "" and "" in result and f"column {place}" not in names else name)
    return result


def listed(names: Iterable[Any], limit: int = 20) -> str:
    """Names of columns or labels for a message: the first of them, none longer than a word or two, all printable."""
    every = list(names)
    texts = [str(name) for name in every[:limit]]
    short = [text if len(text) <= 60 else f"{text[:57]}..." for text in texts]
    more = f", ... ({len(every):,} in all)" if len(every) > limit else ""
    return ", ".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text) for text in short) + more
