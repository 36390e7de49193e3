"""What several commands share: their parsers, where they compute, and how they print."""

import argparse
import contextlib
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from irtune.config.schema import RISKS, DataConfig
from irtune.config.tasks import SINGLE, WORDS, task_name
from irtune.console import quiet_transformers
from irtune.distributed import runtime
from irtune.distributed.runtime import World
from irtune.errors import ConfigError
from irtune.files import to_json
from irtune.redaction import redact

TIMEOUT_SECONDS = 1800


class _OptionsError(ConfigError):
    place = "the options"


class _Parser(argparse.ArgumentParser):
    """Raises a `ConfigError` for mistakes: for all wrong values at once."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The options, and what is left of `args`."""
        self._problems: list[str] = []
        found = super().parse_known_args(args, namespace)
        if self._problems:
            raise _OptionsError(self._problems)
        return found

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)  # type: ignore[misc]
        except argparse.ArgumentError as error:
            self._problems.append(str(error).removeprefix("argument "))
            return None

    def error(self, message: str) -> Any:
        """One mistake, in one sentence."""
        raise _OptionsError(f"{message.removeprefix('argument ')} ({self.prog} --help says more)")


def parser(name: str, description: str, example: str, *, trainer: bool = False) -> argparse.ArgumentParser:
    """A parser whose --help ends with an example; with `trainer`, options of the trainer may follow."""
    if trainer:
        description += " Options of the trainer (--config FILE, --section.key VALUE) may follow."
    return _Parser(
        prog=f"python -m irtune {name}", allow_abbrev=False, description=description, epilog=f"example: {example}"
    )


def add_run(options: argparse.ArgumentParser, *, several: bool = False) -> None:
    """The options of every command that loads a run; `several`: --run may be given more than once, and is a list."""
    add_folder(options, several=several)
    options.add_argument("--batch_size", type=at_least(1), default=16, help="examples per forward pass (default 16)")


def add_folder(options: argparse.ArgumentParser, *, several: bool = False) -> None:
    """--run, and `add_trust`."""
    what = "folder of a finished run (its run.output_dir), or an export"
    more = "; given several times, the runs' probabilities are averaged" if several else ""
    options.add_argument("--run", required=True, type=a_path, action="append" if several else "store", help=what + more)
    add_trust(options)


def add_trust(options: argparse.ArgumentParser) -> None:
    """What a run's folder may not decide by itself."""
    for risk in RISKS:
        options.add_argument(f"--{risk}", action="store_true", help=f"the run's model.{risk} is meant")


def trusted(given: argparse.Namespace) -> list[str]:
    """What the user asks for of `RISKS`."""
    return [risk for risk in RISKS if getattr(given, risk)]


def add_ranks(options: argparse.ArgumentParser, alone: int = 1) -> None:
    """--ranks: processes of this machine."""
    options.add_argument(
        "--ranks", type=at_least(1, 1024), help=f"processes per run (default: one per GPU, else {alone})"
    )


def add_json(options: argparse.ArgumentParser) -> None:
    """--json, for scripts."""
    options.add_argument("--json", action="store_true", help="print JSON instead of text")


def a_path(text: str) -> Path:
    """A path of the command line; `~` is understood."""
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, another's folder, a user that does not exist
        reason = getattr(error, "strerror", None) or str(error)
        raise argparse.ArgumentTypeError(f"{redact(text)[:200]!r} is not a usable path: {reason}") from None
    return path


def at_least(least: int, most: int = 999_999) -> Callable[[str], int]:
    """The type of an option that takes a whole number from `least` to `most`."""

    def whole_number(text: str) -> int:
        if not re.fullmatch("[0-9]{1,6}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text[:100]!r}; accepted: a whole number from {least} to {most:,}")
        return int(text)

    return whole_number


def a_share(text: str) -> float:
    """The type of an option that takes a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text[:100]!r}; accepted: a number from 0 to 1")
    return number


def check_single(data: DataConfig, what: str) -> None:
    """Raise a ConfigError where `what` is asked for and the examples of a run have no single label."""
    if task_name(data) != SINGLE:
        raise ConfigError(f"{what} is for one label per example, and the run has {WORDS[task_name(data)]}")


@contextlib.contextmanager
def ranks() -> Iterator[World]:
    """Join the process group, of one process or of all that a launcher started, and leave it."""
    quiet_transformers()
    world = runtime.read_world()
    runtime.start(world, TIMEOUT_SECONDS)
    try:
        yield world
    finally:
        runtime.stop()


def show(text: str) -> None:
    """One line on standard output."""
    sys.stdout.write(text + "\n")


def show_json(value: Any) -> None:
    """`value` as indented JSON on standard output."""
    show(to_json(value, indent=2))


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns side by side: the first to the left, the others, which are numbers, to the right."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(cells, widths))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), *(line(row) for row in rows)])
