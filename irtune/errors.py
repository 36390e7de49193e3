"""The errors that irtune raises for its users.

Everything a user can cause is an `IrtuneError`: one clear sentence, the offending value, what is accepted. The command
line prints it without a traceback. A bug in irtune stays an ordinary exception with its traceback.
"""

import re
import reprlib
from collections.abc import Sequence
from typing import Any

from irtune.redaction import redact


class IrtuneError(Exception):
    """Base of all errors whose cause is outside the code: configuration, data, files, machines."""


class ConfigError(IrtuneError):
    """A configuration that cannot be run. Carries every problem that was found, not only the first."""

    place = "the configuration"  # of several problems

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            super().__init__(self.problems[0])
        else:
            lines = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(self.problems, 1))
            super().__init__(f"{len(self.problems)} errors in {self.place}:\n{lines}")


class NodesError(ConfigError):
    """Nodes that do not fit together: other versions, options or corpora, or a folder that some do not see."""

    place = "the nodes of this job"


class DataError(IrtuneError):
    """A corpus that cannot be used: names the file, the row, the column or the value."""


class ModelError(IrtuneError):
    """A model folder or hub id that cannot be loaded or does not fit the job."""


class CheckpointError(IrtuneError):
    """A checkpoint that is damaged or belongs to another run."""


class RunError(IrtuneError):
    """A folder that holds no run, or one that is not finished."""


class OutputError(IrtuneError):
    """Results that cannot be written: a full disk, a read-only folder."""


class DistributedError(IrtuneError):
    """Ranks that disagree, die or do not answer in time."""


class StoppedError(Exception):
    """A signal ended training; the checkpoint of the last step is written."""

    def __init__(self, signal: int, step: int):
        self.signal, self.step = signal, step
        super().__init__(f"stopped by signal {signal} after step {step}")


class TrainingError(IrtuneError):
    """Training that cannot go on, for example after repeated losses that are not finite."""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlist = _SHORT.maxdict = 8


def brief(value: Any) -> str:
    """`repr` of a value of any size, in one line."""
    return _SHORT.repr(value[:200] if isinstance(value, bytes) else value)


LONGEST = 1_000  # characters of another library's sentence


def one_line(error: object, most: int = 400) -> str:
    """What another library says, without passwords, in one line: its first sentences, up to `most` characters.

    A first sentence that is longer stays whole, up to `LONGEST` characters.
    """
    text = redact(" ".join(str(error).split())) or type(error).__name__
    if len(text) <= most:
        return text
    ends = [match.end(1) for match in re.finditer(r"([.!?:;])(?= )", text)]
    fitting = [end for end in ends if end <= most]
    end = fitting[-1] if fitting else ends[0] if ends else len(text)
    return text[:end].rstrip(":;") if end <= LONGEST else f"{text[:LONGEST]}..."
