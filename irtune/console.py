"""Who may speak on the console: rank 0 and errors. What libraries note to each other is not for users."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import TextIO

from irtune.distributed import environment


def quiet_libraries() -> None:
    """Keep libraries off the console, whether they are imported already or later.

    stdout must be nothing but JSON where that is asked for.
    """
    # About kernels that irtune does not use, on every rank, and the casts of int8 in every product.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # A filter: DeepSpeed sets its logger's level itself when it is imported.
    logging.getLogger("DeepSpeed").addFilter(_is_error)
    environment.set_default("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)


def quiet_transformers() -> None:
    """No notes and progress bars of transformers, whatever TRANSFORMERS_VERBOSITY is."""
    # Imported late: mistakes in a command line are reported without loading it.
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def without(package: str) -> Iterator[None]:
    """Inside, packages that are imported take `package` for one that is not installed, unless it is imported already.

    For what they would import in any case and the program does not use.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


def let_speak(stream: TextIO, *, is_main: bool) -> None:
    """irtune's lines on `stream`: all of rank 0's (`is_main`), and other ranks' errors. Libraries may only warn."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=stream)
    logging.getLogger("irtune").setLevel(logging.INFO)  # for the logs of all ranks
    for handler in [] if is_main else logging.getLogger().handlers:
        handler.addFilter(_is_no_note)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _is_no_note(record: logging.LogRecord) -> bool:
    return not record.name.startswith("irtune") or _is_error(record)
