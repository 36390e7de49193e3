"""Hosts on one machine: each with its own network, host name, processes and mounts, joined by a cable.

A host is a set of Linux namespaces, held by a process that is the first in its process namespace: when that one is
killed, the kernel ends all others of the host, as a power cut would. Nothing has a name outside of the namespaces, so
nothing is left behind, whatever happens to the test.

    with hosts.joined("nodeA", "nodeB") as (a, b):
        print(a.run(["ping", "-c1", "nodeB"], timeout=10).stdout)
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support import ROOT

INTERFACE = "eth0"
TOOLS = ("ip", "nsenter", "setpriv", "unshare")
NAMESPACES = ["--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
SECONDS = 30.0  # for anything but the commands of a test


def missing(*programs: str) -> str | None:
    """Why there can be no hosts here, or none with `programs`; None where there can."""
    absent = [name for name in (*TOOLS, *programs) if program(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    made = _quietly(["unshare", "--net", *NAMESPACES, "ip", "link", "add", "type", "veth"])
    return None if made.returncode == 0 else f"no namespaces may be made here: {made.stderr.strip()}"


def program(name: str) -> str | None:
    """Path of a program, also of those for the administrator."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _quietly(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)


def _hold(command: Sequence[str]) -> subprocess.Popen[str]:
    """A process that ends with this one at the latest."""
    return subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], text=True, stdin=subprocess.DEVNULL,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip


def wait_until(condition, seconds: float, what: str) -> None:
    """Wait for `condition()`.

    Raises:
        AssertionError: after `seconds`, with `what`; or what `condition` raises.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds:.0f} s still no {what}"
        time.sleep(0.01)


class Network:
    """A network namespace, which outlives the processes of its host."""

    def __init__(self) -> None:
        self._keeper = _hold(["unshare", "--net", "sleep", "infinity"])
        self.path = f"/proc/{self._keeper.pid}/ns/net"
        mine = os.readlink("/proc/self/ns/net")
        wait_until(lambda: os.readlink(self.path) != mine, SECONDS, "network namespace")
        self.ip("link", "set", "lo", "up")

    @property
    def pid(self) -> str:
        """A process in it, as `ip` takes it."""
        return str(self._keeper.pid)

    def enter(self, command: Sequence[str]) -> list[str]:
        """`command`, run in this network."""
        return ["nsenter", f"--net={self.path}", "--", *command]

    def ip(self, *arguments: str) -> str:
        """Output of `ip`."""
        done = _quietly(self.enter(["ip", *arguments]))
        assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def close(self) -> None:
        """Let go: its interfaces vanish with it."""
        self._keeper.kill()
        self._keeper.communicate(timeout=SECONDS)


class Host:
    """A machine with a name and an address."""

    def __init__(self, name: str, address: str, folder: Path):
        """`folder`: for its files; `folder/etc` may hold files that stand in for those of /etc."""
        self.name, self.address, self.folder = name, address, folder
        self.etc = folder / "etc"
        self.etc.mkdir(parents=True)
        self.network = Network()
        self._started: list[subprocess.Popen[str]] = []
        self._holder: subprocess.Popen[str] | None = None
        self._init = 0

    def boot(self) -> None:
        """Start the host; also after `kill`, with the same name and address."""
        ready = self.folder / "ready"
        ready.unlink(missing_ok=True)
        binds = "".join(
            f"mount --bind {file} /etc/{file.relative_to(self.etc)} && "
            for file in sorted(self.etc.rglob("*"))
            if file.is_file()
        )
        # sshd wants a folder in /run, which must not be made on the real machine.
        script = f"hostname {self.name} && mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && {binds}" \
                 f"echo > {ready} && exec sleep infinity"  # fmt: skip
        holder = _hold(self.network.enter(["unshare", *NAMESPACES, "sh", "-c", script]))
        self._holder = holder

        def there() -> bool:
            assert holder.poll() is None, f"{self.name} did not start: {holder.communicate(timeout=SECONDS)[1]}"
            return ready.exists()

        wait_until(there, SECONDS, f"host {self.name}")
        self._init = int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text())

    def kill(self) -> None:
        """End all of its processes by SIGKILL, at once."""
        if self._holder is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._init, signal.SIGKILL)
            self._holder.communicate(timeout=SECONDS)
        for process in self._started:
            process.wait(SECONDS)
        self._holder, self._started = None, []

    def enter(self, command: Sequence[str], folder: Path = ROOT) -> list[str]:
        """`command`, run on this host in `folder`."""
        into = [f"--target={self._init}", "--net", "--uts", "--mount", "--pid", f"--wdns={folder}"]
        return ["nsenter", *into, "--", *command]

    def start(self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start `command`; what it prints goes to `log`."""
        with log.open("w") as out:
            process = subprocess.Popen(
                self.enter(command), env=_environment(env), text=True, stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._started.append(process)
        return process

    def run(
        self, command: Sequence[str], *, timeout: float, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` to its end."""
        return subprocess.run(self.enter(command), env=_environment(env), capture_output=True, text=True,
                              timeout=timeout, check=False)  # fmt: skip

    def link(self, state: str) -> None:
        """Its end of the cable, `up` or `down`."""
        self.network.ip("link", "set", INTERFACE, state)

    def counters(self) -> dict[str, int]:
        """Bytes and packets of its interface so far: rx_bytes, tx_bytes, rx_packets, tx_packets."""
        (seen,) = json.loads(self.network.ip("-s", "-j", "link", "show", INTERFACE))
        return {f"{way}_{what}": seen["stats64"][way][what] for way in ("rx", "tx") for what in ("bytes", "packets")}

    def close(self) -> None:
        """End it, and take its network away."""
        self.kill()
        self.network.close()


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    """One thread a rank, the cable for gloo, and nothing of a launcher that started the tests."""
    ours = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE, "PYTHONPATH": str(ROOT), "DS_BUILD_OPS": "0"}
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "IRTUNE_DATA", "HF_HOME") if name in os.environ}
    return kept | ours | {"PATH": path} | dict(more or {})


@contextlib.contextmanager
def joined(*names: str, delay: float = 0.0, loss: float = 0.0) -> Iterator[list[Host]]:
    """Two hosts of these names, booted, with a cable between them.

    Args:
        names: of the hosts.
        delay: seconds that each frame takes, in each direction.
        loss: share of the frames that get lost.
    """
    with contextlib.ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="hosts-")))
        hosts = []
        for number, name in enumerate(names, 1):
            hosts.append(Host(name, f"10.77.0.{number}", folder / name))
            cleanup.callback(hosts[-1].close)
        first, second = hosts
        if delay or loss:
            _long_cable(first.network, second.network, delay, loss, cleanup)
        else:
            first.network.ip("link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns",
                             second.network.pid)  # fmt: skip
        known = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts)
        for host in hosts:
            host.network.ip("address", "add", f"{host.address}/24", "dev", INTERFACE)
            host.link("up")
            (host.etc / "hosts").write_text(known)
            host.boot()
        yield hosts


def _long_cable(first: Network, second: Network, delay: float, loss: float, cleanup: contextlib.ExitStack) -> None:
    """A cable through a third network, in which tests/support/wire.py passes the frames on."""
    middle = Network()
    cleanup.callback(middle.close)
    for network, end in ((first, "left"), (second, "right")):
        middle.ip("link", "add", end, "type", "veth", "peer", "name", INTERFACE, "netns", network.pid)
        middle.ip("link", "set", end, "up")
        _plain_frames(network)
    command = [sys.executable, "-m", "tests.support.wire", "join", "left", "right", str(delay), str(loss)]
    wire = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *middle.enter(command)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE)  # fmt: skip

    def stop() -> None:
        wire.kill()
        wire.communicate(timeout=SECONDS)

    cleanup.callback(stop)
    assert wire.stdout is not None
    assert wire.stdout.readline() == "joined\n"


def _plain_frames(network: Network) -> None:
    command = network.enter([sys.executable, "-m", "tests.support.wire", "plain", INTERFACE])
    subprocess.run(command, cwd=ROOT, check=True, timeout=SECONDS)


def plain_frames(host: Host) -> None:
    """Send frames of their real size and with their checksums, as on a wire: no work is left to a network card."""
    _plain_frames(host.network)


# ----- ssh -----


def serve_ssh(hosts: Sequence[Host]) -> None:
    """Boot `hosts` anew with an ssh server each, and keys with which root of each may enter all."""
    for host in hosts:
        keys = host.folder.parent / "ssh"
        if not keys.exists():
            keys.mkdir(mode=0o700)
            for name in ("client", "server"):
                made = _quietly(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)])
                assert made.returncode == 0, made.stderr
            known = "".join(f"{other.name},{other.address} {(keys / 'server.pub').read_text()}" for other in hosts)
            (keys / "known_hosts").write_text(known)
        # In the place of the machine's own: ssh is called as every user calls it, without options.
        (host.etc / "ssh").mkdir(exist_ok=True)
        (host.etc / "ssh/ssh_config").write_text(
            f"IdentityFile {keys}/client\nUserKnownHostsFile {keys}/known_hosts\nBatchMode yes\nConnectTimeout 10\n"
        )
        (host.folder / "sshd_config").write_text(
            f"ListenAddress {host.address}\nHostKey {keys}/server\nAuthorizedKeysFile {keys}/client.pub\nPidFile none\n"
            "StrictModes no\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\n"
        )
        host.kill()
        host.boot()
        sshd = program("sshd")
        host.start([str(sshd), "-D", "-e", "-f", str(host.folder / "sshd_config")], host.folder / "sshd.log")
    for host in hosts:
        tries: list[Any] = []

        def answers(host: Host = host, tries: list[Any] = tries) -> bool:
            tries.append(hosts[0].run(["ssh", host.name, "hostname"], timeout=SECONDS))
            return tries[-1].stdout == f"{host.name}\n"

        try:
            wait_until(answers, SECONDS, f"ssh to {host.name}")
        except AssertionError as error:
            raise AssertionError(f"{error}: {tries[-1].stderr}{(host.folder / 'sshd.log').read_text()}") from None
