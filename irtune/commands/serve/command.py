"""Load the run, open the port, serve until a signal."""

import importlib.util
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from irtune import __version__
from irtune.commands.common import add_run, at_least, parser, ranks, show, trusted
from irtune.errors import ConfigError
from irtune.evaluation.saved_run import load_run

NEEDED = ("fastapi", "uvicorn")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def main(arguments: Sequence[str]) -> int:
    """Serve a run."""
    options = parser(
        "serve",
        'Answer over HTTP. POST /predict takes {"texts": [...]}, each a text, or for pairs {"before": "...", "after": '
        '"..."}, with "context" where the run reads one, and returns what is predicted and the probabilities of each; '
        "requests that wait are computed together. GET / says what the model is, and GET /health whether it answers. "
        "Only this machine can reach it unless --host says otherwise; there is no login.",
        "python -m irtune serve --run runs/mine",
    )
    add_run(options)
    options.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)")
    options.add_argument("--port", type=at_least(0, 65_535), default=8000, help="port; 0: any (default 8000)")
    options.add_argument("--max_texts", type=at_least(1), default=256, help="texts in one request (default 256)")
    options.add_argument("--max_kib", type=at_least(1), default=1024, help="size of one request (default 1024 KiB)")
    given = options.parse_args(list(arguments))
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"serve needs {' and '.join(missing)}: pip install 'irtune[serve]'")
    # Imported late: what they are is an extra.
    import uvicorn

    from irtune.commands.serve.app import Limits, build_app

    try:
        listening = socket.create_server((given.host, given.port), family=_family(given.host))
    except OSError as error:
        raise ConfigError(f"--host {given.host} --port {given.port}: {error.strerror or error}") from error
    with listening, ranks() as world:
        run = load_run(given.run, world.device, trusted=trusted(given))
        written_by = run.results.get("versions", {}).get("irtune", __version__)
        if written_by != __version__:
            sys.stderr.write(f"the run is of irtune {written_by}, and this is {__version__}\n")
        limits = Limits(texts=given.max_texts, size=given.max_kib * 1024, batch=given.batch_size)
        server = uvicorn.Server(uvicorn.Config(build_app(run, limits), log_level="warning"))
        if given.host not in LOOPBACK:
            sys.stderr.write(f"listening on {given.host}: whoever reaches this machine can use it, without a login\n")
        show(f"serving {given.run} on http://{given.host}:{listening.getsockname()[1]} (Ctrl-C ends it)")
        sys.stdout.flush()
        with _signals_only_end_it():
            server.run(sockets=[listening])
    return 0


@contextmanager
def _signals_only_end_it() -> Iterator[None]:
    """uvicorn ends at SIGINT or SIGTERM and then raises the signal again: to be asked to end is no failure here."""
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
