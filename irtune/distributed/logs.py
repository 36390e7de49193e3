"""RUN/logs/rank_N.log: what each rank logged, with time, and why it ended."""

import datetime
import logging
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger("irtune")
_open: "RankLog | None" = None  # that of the running process


class RankLog(logging.Handler):
    """Appends the lines of the `irtune` logger, Python's warnings, and the error that ends the run, to a file."""

    def __init__(self, folder: Path, rank: int, device: str, clean: Callable[[str], str]):
        """Open `folder`/rank_N.log, and write a line that says who begins here, and when. `clean` hides passwords.

        Raises:
            OSError: when it cannot be written.
        """
        super().__init__(logging.INFO)
        self._clean = clean
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"rank_{rank}.log"
        self._show: Callable[..., Any] = warnings.showwarning
        self._append("START", f"rank {rank} on {socket.gethostname()}, process {os.getpid()}, {device}")
        warnings.showwarning = self._warning  # type: ignore[assignment]
        log.addHandler(self)

    def line(self, kind: str, text: str) -> None:
        """Write `text` with the time and a word that says what it is."""
        try:
            self._append(kind, text)
        except OSError:  # a full disk: the run itself has more to say about that
            return

    def _append(self, kind: str, text: str) -> None:
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        # Opened for each line: a disk can be taken away, or made read-only, while a run goes on.
        with self._file.open("a", encoding="utf-8") as out:
            out.write(f"{now} {kind} {self._clean(text)}\n")

    def emit(self, record: logging.LogRecord) -> None:
        """A line of the logger."""
        self.line(record.levelname, record.getMessage())

    def _warning(self, message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        self.line("WARNING", f"{category.__name__}: {message} ({filename}:{lineno})")
        self._show(message, category, filename, lineno, *rest)

    def finish(self) -> None:
        """Write no more; Python's warnings go where they went."""
        log.removeHandler(self)
        if warnings.showwarning == self._warning:
            warnings.showwarning = self._show


def open_log(folder: Path, rank: int, device: str, *, clean: Callable[[str], str] = str) -> None:
    """Begin the log of this rank below `folder`. A disk that takes none does not stop a run: it is reported once."""
    global _open
    close_log(None)
    try:
        _open = RankLog(folder, rank, device, clean)
    except OSError as error:
        log.warning("no log of rank %d in %s: %s", rank, folder, error.strerror)


def last_words(text: str) -> None:
    """Write why this process ends at once, where it cannot raise."""
    if _open is not None:
        _open.line("ERROR", text)


def close_log(error: BaseException | None, *, failed: bool = True) -> None:
    """End the log of this rank, if there is one: with `error` and its traceback, or how it ended without failing."""
    global _open
    if _open is None:
        return
    if error is None or not failed:
        _open.line("END", str(error or "finished"))
    else:
        trace = "".join(traceback.format_exception(error)).rstrip()
        _open.line("TRACEBACK", trace)
        _open.line("ERROR", f"{type(error).__name__}: {error}")
    _open.finish()
    _open = None
