"""What a key accepts beyond its type. A limit stands in the `Annotated` type of its key, in schema.py."""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


class Limit:
    """Base of all limits."""

    @property
    def words(self) -> str:
        """What is accepted."""
        raise NotImplementedError

    def allows(self, value: Any) -> bool:
        """Whether `value`, which has the key's type, is accepted."""
        raise NotImplementedError

    def complaint(self, key: str, value: Any) -> str:
        """The sentence about a value that is not accepted."""
        return f"{key} is {value!r}; accepted: {self.words}"


@dataclass(frozen=True)
class Range(Limit):
    """Numbers from `low` to `high` (None: any finite number), whole ones where `low` is.

    above: `low` itself is left out. below: `high` itself is left out.
    """

    low: int | float
    high: int | float | None = None
    above: bool = False
    below: bool = False

    @property
    def words(self) -> str:
        """For example "a number from 0 to below 1"."""
        number = "a whole number" if isinstance(self.low, int) else "a number"
        low = f"{self.low:.10g}"
        if self.high is None:
            return f"{number} above {low}" if self.above else f"{number} of at least {low}"
        high = f"{self.high:.10g}"
        if self.above:
            return f"{number} between {low} and {high}" if self.below else f"{number} above {low}, at most {high}"
        return f"{number} from {low} to {'below ' if self.below else ''}{high}"

    def allows(self, value: Any) -> bool:
        """Whether the number `value` is inside; NaN and infinities never are."""
        if not math.isfinite(value) or value < self.low or (self.above and value == self.low):
            return False
        return self.high is None or value < self.high or (value == self.high and not self.below)


@dataclass(frozen=True)
class Form(Limit):
    """Values that pass `test`, which are called `form`."""

    form: str
    test: Callable[[Any], object]

    @property
    def words(self) -> str:
        """The form."""
        return self.form

    def allows(self, value: Any) -> bool:
        """Whether `value` passes."""
        return bool(self.test(value))


@dataclass(frozen=True)
class OneOf(Limit):
    """One of `names()`, which are looked up when they are needed."""

    names: Callable[[], Mapping[str, Any]]

    @property
    def words(self) -> str:
        """All names, by family where what they name has one."""
        families: dict[str, list[str]] = {}
        for name, named in self.names().items():
            families.setdefault(getattr(named, "family", ""), []).append(name)
        return "; ".join(
            f"{family}: {', '.join(members)}" if family else ", ".join(members) for family, members in families.items()
        )

    def allows(self, value: Any) -> bool:
        """Whether `value` is one of the names."""
        return value in self.names()

    def complaint(self, key: str, value: Any) -> str:
        """With the name that `value` may have been meant for."""
        near = difflib.get_close_matches(value[:100], list(self.names()), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{key} is {value!r}; {hint}accepted: {self.words}"


MAX_WIDTH = 2**16  # rank or width of an adapter; wider ones are typing errors that would fill the memory


def _is_fold(text: str) -> bool:
    k, slash, n = text.partition("/")
    numbers = slash and k.isdecimal() and n.isdecimal() and len(k + n) < 20
    return bool(numbers) and int(n) >= 2 and 1 <= int(k) <= int(n)


MODEL = Form("a folder, a hub id or a preset", str.strip)
FOLD = Form("K/N with 1 <= K <= N and N at least 2, such as 2/5", _is_fold)
STRATA = Form("[a, b] with 0 <= a <= b <= layers", lambda ends: len(ends) == 2 and 0 <= ends[0] <= ends[1])
SEPARATOR = Form("a text that is not empty", bool)
HEADS = Form(
    "a whole number of at least 1, or a share above 0 and below 1",
    lambda heads: heads >= 1 if isinstance(heads, int) else 0 < heads < 1,
)
BETAS = Form("two numbers from 0 to below 1", lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas))
KNOWN_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
TRACKERS = Form(
    f"a list of {', '.join(KNOWN_TRACKERS)}, each at most once",
    lambda names: sorted(names) == sorted({*names} & {*KNOWN_TRACKERS}),
)
