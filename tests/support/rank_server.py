"""Ranks for launchers in a fraction of a second: forked from a process that has imported everything.

A launcher on a host (tests/support/hosts.py) starts this file as its program. It asks the server, outside of all hosts,
for a process that enters the host and does what `train.py` would do, with the same environment, output and exit
status. It passes signals on.

    python tests/support/rank_server.py SOCKET [OPTIONS OF train.py]
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

NAMESPACES = ("net", "uts", "mnt", "pid")  # the last one holds for children
COUNT_AT = "IRTUNE_TEST_COUNT_AT"  # two steps: see `_count_traffic`


# ----- the program that the launcher starts -----


def stand_in(address: str, arguments: list[str]) -> int:
    """Wait for the rank that does our work; returns its exit status."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(address)
        asked = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
        socket.send_fds(line, [struct.pack("I", len(asked))], [0, 1, 2])
        line.sendall(asked)
        (rank,) = struct.unpack("i", line.recv(4, socket.MSG_WAITALL))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _frame: os.kill(rank, number))
        answer = line.recv(4, socket.MSG_WAITALL)
    if len(answer) < 4:
        return 1
    status = struct.unpack("i", answer)[0]
    if status < 0:  # it was killed: end in the same way
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


# ----- the server -----


def _serve_one(line: socket.socket) -> None:
    """Fork the rank into the host of the one who asks, and tell how it ended. Runs in a process of its own."""
    head, descriptors, _, _ = socket.recv_fds(line, 4, 3)
    asked = json.loads(line.recv(struct.unpack("I", head)[0], socket.MSG_WAITALL))
    asker = struct.unpack("iii", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    libc = ctypes.CDLL(None, use_errno=True)
    for entry in [os.open(f"/proc/{asker}/ns/{name}", os.O_RDONLY) for name in NAMESPACES]:
        if libc.setns(entry, 0):
            raise OSError(ctypes.get_errno(), "setns")
    rank = os.fork()
    if rank == 0:
        _become_rank(line, descriptors, asked)
    for descriptor in descriptors:
        os.close(descriptor)
    while True:
        ended, status = os.waitpid(rank, os.WNOHANG)
        if ended:
            break
        if select.select([line], [], [], 0.02)[0] and not line.recv(1):
            os.kill(rank, signal.SIGKILL)  # the one who asked is gone
            os.waitpid(rank, 0)
            return
    with contextlib.suppress(BrokenPipeError):
        line.sendall(struct.pack("i", os.waitstatus_to_exitcode(status)))


def _become_rank(line: socket.socket, descriptors: list[int], asked: dict) -> None:
    for place, descriptor in enumerate(descriptors):
        os.dup2(descriptor, place)
    line.sendall(struct.pack("i", os.getpid()))
    line.close()
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    status = 1
    try:
        import torch

        from irtune.cli import train

        torch.set_num_threads(1)  # as in simulated/server.py

        if COUNT_AT in os.environ:
            _count_traffic(*map(int, os.environ[COUNT_AT].split()))
        status = train(asked["arguments"])
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve(address: str) -> None:
    """Import everything, then answer until killed."""
    import torch

    import tests.support.preload  # noqa: F401

    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who serve
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(64)
        while True:
            line, _ = server.accept()
            if os.fork() == 0:
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                try:
                    _serve_one(line)
                finally:
                    os._exit(0)
            line.close()


@contextlib.contextmanager
def running(folder: Path) -> Iterator[list[str]]:
    """A server; gives the command that a launcher runs in place of `python train.py`."""
    import subprocess

    address = str(folder / "ranks.sock")
    command = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "tests.support.rank_server", "serve", address]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_BUILD_OPS": "0"}
    server = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not Path(address).exists():
            assert server.poll() is None and time.monotonic() < deadline, "no server of ranks"
            time.sleep(0.05)
        yield [sys.executable, "-S", str(Path(__file__).resolve()), address]
    finally:
        server.kill()
        server.wait(30)


# ----- what a test may want to know of a run -----


def _count_traffic(*at: int) -> None:
    """Print a node's bytes at the interface when all ranks have done the steps `at`: `TRAFFIC {json}`."""
    from irtune.distributed import environment as launcher
    from irtune.distributed import runtime
    from irtune.train.trainer import Trainer
    from tests.support.hosts import INTERFACE

    original = Trainer._train_step

    def train_step(self):
        if self.progress.step in at:
            runtime.barrier()
            if launcher.variable("LOCAL_RANK", "") == "0":
                (row,) = [row for row in Path("/proc/net/dev").read_text().splitlines() if f"{INTERFACE}:" in row]
                numbers = row.partition(":")[2].split()
                seen = {"step": self.progress.step, "received": int(numbers[0]), "sent": int(numbers[8]),
                        "time": time.monotonic()}  # fmt: skip
                sys.stdout.write(f"TRAFFIC {json.dumps(seen)}\n")
                sys.stdout.flush()
            runtime.barrier()
        return original(self)

    Trainer._train_step = train_step


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(stand_in(sys.argv[1], sys.argv[2:]))
