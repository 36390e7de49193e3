"""What several commands share: their parsers, where they compute, and how they print."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from irtune.config.schema import RISKS
from irtune.distributed import runtime
from irtune.distributed.runtime import World
from irtune.files import to_json
from irtune.redaction import redact

TIMEOUT_SECONDS = 1800


def parser(name: str, description: str, example: str) -> argparse.ArgumentParser:
    """A parser whose --help ends with an example."""
    return argparse.ArgumentParser(
        prog=f"python -m irtune {name}", allow_abbrev=False, description=description, epilog=f"example: {example}"
    )


def add_run(options: argparse.ArgumentParser) -> None:
    """The options of every command that loads a run."""
    add_folder(options)
    options.add_argument("--batch_size", type=_positive, default=16, help="examples per forward pass (default 16)")


def add_folder(options: argparse.ArgumentParser) -> None:
    """--run, and what a run's folder may not decide by itself."""
    options.add_argument(
        "--run", required=True, type=a_path, help="folder of a finished run (its run.output_dir), or an export"
    )
    for risk in RISKS:
        options.add_argument(f"--{risk}", action="store_true", help=f"the run's model.{risk} is meant")


def trusted(given: argparse.Namespace) -> list[str]:
    """What the user asks for of `RISKS`."""
    return [risk for risk in RISKS if getattr(given, risk)]


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
        raise argparse.ArgumentTypeError(f"{redact(text)[:200]!r} is no usable path: {reason}") from None
    return path


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return value


@contextlib.contextmanager
def ranks() -> Iterator[World]:
    """Join the process group, of one process or of all that a launcher started, and leave it."""
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
