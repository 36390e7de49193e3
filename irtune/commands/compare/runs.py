"""Run one cell of the grid in processes of its own, so that one failure, or its memory, never reaches the next."""

import json
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irtune.commands.compare.grid import Cell
from irtune.errors import ConfigError
from irtune.files import write_json

RECORD = "compare.json"
ERROR_LINES = 3
log = logging.getLogger("irtune")


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: the content of its results.json, or its error in a sentence."""

    cell: Cell
    results: dict[str, Any] | None
    error: str | None = None


def check_folders(cells: list[Cell]) -> None:
    """Refuse folders that hold runs with other settings: their results would be taken for these.

    Raises:
        ConfigError: naming each folder and the options that differ.
    """
    problems = []
    for cell in cells:
        before = _read(cell.folder / RECORD)
        if before is not None and before != list(cell.arguments):
            changed = [a for a in cell.arguments if a not in before] or [a for a in before if a not in cell.arguments]
            problems.append(f"{cell.folder} holds a run without {' '.join(changed)}; choose another --output_dir")
    if problems:
        raise ConfigError(problems)


def run_cell(cell: Cell, ranks: int) -> Outcome:
    """Train `cell` on `ranks` processes of this machine, or read the results that it already has."""
    finished = _read(cell.folder / "results.json")
    if finished is not None:
        return Outcome(cell, finished)
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_json(cell.folder / RECORD, list(cell.arguments))
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"] if ranks > 1 else []
    command = [sys.executable, "-m", *launcher, "irtune", "train", *cell.arguments]
    output = cell.folder / "output.log"
    with output.open("a", encoding="utf-8") as out:
        status = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).returncode
    results = _read(cell.folder / "results.json")
    if status or results is None:
        return Outcome(cell, None, f"exit status {status}: {_error(output)}")
    return Outcome(cell, results)


def _error(output: Path) -> str:
    """The sentence of a user's error; of anything else, the last lines of the output."""
    lines = [line.strip() for line in output.read_text(encoding="utf-8", errors="replace").splitlines()]
    said = [line for line in lines if line.startswith(("error:", "error on rank"))]
    return said[-1] if said else " / ".join([line for line in lines if line][-ERROR_LINES:])


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
