"""Run a launcher's command, pass signals on, and show what this host's failing ranks wrote last.

python launch/lib/start.py COMMAND ...     as local.sh does
python launch/lib/start.py --from-stdin   as multinode_deepspeed.sh does over ssh: the first line of standard input is a
                                       JSON object with command, folder and env; the job ends when the input does
"""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
LAST_LINES = 20
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def say(text: str) -> None:
    """A line on standard error, where launchers speak."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def run(
    command: Sequence[str], env: Mapping[str, str] | None = None, folder: str | None = None, *, stdin: bool = False
) -> int:
    """Print `command`, run it to its end, and return its exit status.

    SIGTERM goes to the command once, which tells its ranks, and they end saved; SIGUSR1, a scheduler's warning, and
    SIGHUP, a terminal that is closed, are passed on as SIGTERM. With `stdin`, the end of standard input is a SIGTERM
    too: whoever started this is gone.
    """
    say(f"+ {shlex.join(command)}")
    started = time.time()
    # A session of its own: Ctrl-C in a terminal would reach ranks twice, and the second one ends them unsaved.
    process = subprocess.Popen(
        command, env={**os.environ, **(env or {})}, cwd=folder, stdin=subprocess.DEVNULL, start_new_session=True
    )

    def stop(number: int = signal.SIGTERM, _frame: FrameType | None = None) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup does
            signal.signal(number, stop)
    if stdin:
        threading.Thread(target=lambda: (sys.stdin.read(), stop()), daemon=True).start()
    status = process.wait()
    status = status if status >= 0 else 128 - status
    if status:
        say(f"exit status {status}: {shlex.join(command[:4])} ...")
        show_failures(command, started, folder)
    return status


def show_failures(command: Sequence[str], since: float, folder: str | None = None) -> None:
    """The last lines of every log of a rank of this host that ended with an error, or without a word."""
    logs = _run_folder(command, folder)
    for file in sorted(logs.glob("logs/rank_*.log")) if logs is not None else []:
        if file.stat().st_mtime < since - 1:
            continue
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        begin = max((place for place, line in enumerate(lines) if " START rank " in line), default=0)
        lines = lines[begin:]
        if not lines or f" on {socket.gethostname()}, " not in lines[0]:
            continue
        ended = any(" END " in line for line in lines)
        failed = any(" ERROR " in line for line in lines)
        if failed or not ended:
            how = "ended with an error" if failed else "ended without a message (killed?)"
            say(f"== {file}: this rank {how}; its last lines:")
            say("\n".join(f"   {line}" for line in lines[-LAST_LINES:]))


def _run_folder(command: Sequence[str], folder: str | None) -> Path | None:
    """run.output_dir of a command with train.py in it."""
    place = next((number for number, word in enumerate(command) if word.endswith("train.py")), None)
    if place is None:
        return None
    sys.path.insert(0, str(ROOT))
    from irtune.config import load_config
    from irtune.errors import IrtuneError

    os.chdir(folder or ".")
    try:
        return Path(load_config(list(command[place + 1 :])).run.output_dir).expanduser().absolute()
    except (IrtuneError, SystemExit):  # the ranks have said what is wrong with it
        return None


def main(arguments: Sequence[str]) -> int:
    """Run what the command line, or standard input, says."""
    if list(arguments) != ["--from-stdin"]:
        return run(arguments)
    job = json.loads(sys.stdin.readline())
    return run(job["command"], job["env"], job["folder"], stdin=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
