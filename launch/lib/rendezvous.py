"""Start this node's part of a job with torchrun. See torchrun_node.sh for the variables.

python launch/lib/rendezvous.py [OPTIONS OF train.py]
"""

import ipaddress
import os
import re
import socket
import sys
import time

import start

sys.path.insert(0, str(start.ROOT))

from irtune.config import Config, load_config  # noqa: E402
from irtune.config.deepspeed_json import read_engine_json  # noqa: E402
from irtune.distributed import network  # noqa: E402
from irtune.errors import ConfigError, IrtuneError  # noqa: E402

LOOK_SECONDS = 1.0
STORE_SECONDS = 15  # for another node's torchrun, which may be starting on a busy machine, to answer
SHUTDOWN_SECONDS = 150  # from SIGTERM to SIGKILL: for two steps and a checkpoint


def read_place(name: str, text: str) -> tuple[str, int]:
    """Host and port of HOST:PORT.

    Raises:
        ConfigError: for anything else.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"{name} is {text!r}; accepted: HOST:PORT, such as node1:29500")
    return host.strip("[]"), int(port)


def own_address(host: str) -> str:
    """The address under which other nodes find this one.

    Raises:
        ConfigError: when there is no way to `host`.
    """
    try:
        mine = network.address_towards(host)
    except OSError as error:
        raise ConfigError(f"{host} cannot be found from {socket.gethostname()}: {error.strerror or error}") from error
    if ipaddress.ip_address(mine.partition("%")[0]).is_loopback:  # this is that host, and its name stands for itself
        others = [a for one in network.interfaces() for a in one.addresses if "." in a and not a.startswith("127.")]
        mine = others[0] if others else mine
    return mine


def meet(host: str, port: int, seconds: float, *, is_host: bool) -> str | None:
    """Wait until something answers at `host`:`port`; why that is hopeless, or None. The host itself needs the port."""
    if is_host:
        problem = network.port_problem(port)
        if problem is not None and not _is_store(host, port):
            return f"{problem}; another program has it: choose another one on every node"
        return None
    deadline, reason = time.monotonic() + seconds, "no answer"
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return None
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(LOOK_SECONDS)
    return (
        f"nothing answers at {host}:{port} within {seconds:.0f} s ({reason}); is that node started, and its port open?"
    )


def _is_store(host: str, port: int) -> bool:
    """Whether it is the store of another torchrun that has the port: two nodes of a job may be on one machine."""
    import datetime

    from torch.distributed import TCPStore

    try:
        TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=STORE_SECONDS))
    except RuntimeError:
        return False
    return True


class Node:
    """This node's part, by the environment."""

    def __init__(self) -> None:
        """Read it.

        Raises:
            ConfigError: with every problem.
        """
        env = os.environ
        self.nodes, self.ranks = env.get("NNODES", "1"), env.get("RANKS", "")
        self.number, self.restarts = env.get("NODE_RANK", ""), env.get("MAX_RESTARTS", "0")
        self.id, self.wait = env.get("RDZV_ID", "irtune"), env.get("WAIT_SECONDS", "600")
        self.rendezvous, self.master = env.get("RENDEZVOUS", ""), env.get("MASTER", "")
        self.local = env.get("LOCAL_ADDR", "")
        match = re.fullmatch(r"([1-9][0-9]{0,4})(?::([1-9][0-9]{0,4}))?", self.nodes)
        problems = []
        if match is None or int(match[2] or match[1]) < int(match[1]):
            problems.append(f"NNODES is {self.nodes!r}; accepted: a number of nodes, or a range such as 1:2")
        self.most = int(match[2] or match[1]) if match else 1
        self.elastic = match is not None and match[2] is not None and match[1] != match[2]
        if self.ranks and not re.fullmatch("[1-9][0-9]{0,3}", self.ranks):
            problems.append(f"RANKS is {self.ranks!r}; accepted: a number of ranks on this node")
        for name, value in (("MAX_RESTARTS", self.restarts), ("WAIT_SECONDS", self.wait)):
            if not re.fullmatch("[0-9]{1,6}", value):
                problems.append(f"{name} is {value!r}; accepted: a whole number")
        if self.number and not (self.number.isdecimal() and int(self.number) < self.most):
            problems.append(f"NODE_RANK is {self.number!r}; accepted: 0 to {self.most - 1}")
        problems += self._check_meeting()
        if problems:
            raise ConfigError(problems)

    def _check_meeting(self) -> list[str]:
        if self.rendezvous and self.master:
            return ["RENDEZVOUS and MASTER are both set; RENDEZVOUS=HOST:PORT is for c10d, MASTER=HOST:PORT with "
                    "NODE_RANK for fixed addresses"]  # fmt: skip
        if self.most > 1 and not self.rendezvous and not self.master:
            return ["several nodes need a place to meet: set RENDEZVOUS=HOST:PORT, the same on every node"]
        if self.master and not self.number:
            return ["MASTER needs NODE_RANK, 0 on the node that MASTER names; with RENDEZVOUS nodes number themselves"]
        if self.master and (self.elastic or self.restarts != "0"):
            return ["restarts and a range of nodes need RENDEZVOUS=HOST:PORT instead of MASTER: with fixed addresses "
                    "nodes cannot meet again"]  # fmt: skip
        return []

    def check(self, arguments: list[str], ranks: int) -> Config:
        """The configuration, if it can be run on that many ranks.

        Raises:
            ConfigError: with every problem.
        """
        config = load_config(arguments)
        problems = []
        if self.elastic and config.optim.global_batch_size is None:
            problems.append(f"NNODES {self.nodes} may change the number of ranks, and with it the global batch: set "
                            "optim.global_batch_size")  # fmt: skip
        least = int(self.nodes.partition(":")[0])
        for nodes in {least, self.most}:
            problems += read_engine_json(config, nodes * ranks)[1]
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)))
        return config

    def command(self, arguments: list[str], ranks: int) -> list[str]:
        """The torchrun command of this node, when the other end of the rendezvous is there.

        Raises:
            ConfigError: when the nodes cannot meet.
        """
        line = [sys.executable, "-m", "torch.distributed.run", "--nnodes", self.nodes, "--nproc-per-node", str(ranks),
                "--max-restarts", self.restarts, "--shutdown-timeout", str(SHUTDOWN_SECONDS)]  # fmt: skip
        place = self.rendezvous or self.master
        if place:
            host, port = read_place("RENDEZVOUS" if self.rendezvous else "MASTER", place)
            mine = self.local or own_address(host)
            problem = meet(host, port, float(self.wait), is_host=_is_here(host))
            if problem is not None:
                raise ConfigError(problem)
            if self.rendezvous:
                # close_timeout: a node that never comes back is given up.
                line += ["--rdzv-backend", "c10d", "--rdzv-endpoint", place, "--rdzv-id", self.id, "--rdzv-conf",
                         f"join_timeout={self.wait}", "--local-addr", mine]  # fmt: skip
            else:
                line += ["--master-addr", host, "--master-port", str(port), "--node-rank", self.number]
        else:
            line.append("--standalone")
        return [*line, str(start.ROOT / "train.py"), *arguments]


def _is_here(host: str) -> bool:
    """Whether `host` is this machine."""
    mine = {address for one in network.interfaces() for address in one.addresses}
    try:
        return any(str(found[4][0]) in mine for found in socket.getaddrinfo(host, None))
    except OSError:
        return False


def default_ranks() -> int:
    """All GPUs of this node, or two ranks without one."""
    import torch

    return torch.cuda.device_count() or 2


def main(arguments: list[str]) -> int:
    """Check, say what is about to run, run."""
    try:
        node = Node()
        ranks = int(node.ranks) if node.ranks else default_ranks()
        node.check(arguments, ranks)
        command = node.command(arguments, ranks)
    except IrtuneError as error:
        for sentence in getattr(error, "problems", [str(error)]):
            start.say(f"error: {sentence}")
        return 2
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    env = {
        "IRTUNE_NNODES": node.nodes,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        # Else torch 2.13 keeps one store over restarts, and a node that comes back looks for rank 0 in vain.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    start.say(f"== node {socket.gethostname()}: {ranks} ranks, {node.nodes} node(s)")
    return start.run(command, env)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
