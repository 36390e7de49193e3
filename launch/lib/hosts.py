"""Start train.py on the hosts of a hostfile with DeepSpeed's launcher, over ssh or pdsh. See multinode_deepspeed.sh.

python launch/lib/hosts.py [OPTIONS OF train.py]
"""

import base64
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import start

ROOT = start.ROOT
sys.path.insert(0, str(ROOT))

from irtune.config import load_config  # noqa: E402
from irtune.config.deepspeed_json import read_engine_json  # noqa: E402
from irtune.distributed import node_facts  # noqa: E402
from irtune.errors import ConfigError, IrtuneError  # noqa: E402

ANSWER_SECONDS = 60.0  # for a host to say what it has; reaching it has CONNECT_SECONDS of them
CONNECT_SECONDS = 10
GRACE_SECONDS = 90.0  # for the others to end by themselves when one host failed: they name what they miss
# Variables that reach the other hosts, if they are set here. None that may hold a password.
FORWARDED = re.compile(
    r"(IRTUNE|OMP|MKL|GLOO|NCCL|UCX|TORCH|CUDA|CUBLAS|HF|TRANSFORMERS|TOKENIZERS|DS|PYTORCH)_|PYTHONPATH$"
)
SECRET = re.compile(r"TOKEN(?!IZERS)|KEY|SECRET|PASSWORD")
NOT_FOUND = {
    97: "there is no folder {folder}",
    98: "there is no {python}; the environment must be at the same place on every host (bash launch/setup.sh)",
    99: "there is no {root}/launch; irtune must be at the same place on every host",
}


def read_hostfile(path: str) -> dict[str, int]:
    """Host -> ranks, from lines such as `host slots=8`.

    Raises:
        ConfigError: with every line that is none.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"HOSTFILE {path!r} cannot be read: {getattr(error, 'strerror', None) or error}"]) from error
    hosts: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        match = re.fullmatch(r"([A-Za-z0-9_.:@-]+)\s+slots=([1-9][0-9]{0,3})", line)
        if line and (match is None or line.startswith("-")):
            problems.append(
                f"{path}, line {number} is {line[:80]!r}; accepted: HOST slots=RANKS, such as node1 slots=8"
            )
        elif match is not None and match[1] in hosts:
            problems.append(f"{path}, line {number}: {match[1]} appears twice")
        elif match is not None:
            hosts[match[1]] = int(match[2])
    if not hosts and not problems:
        problems.append(f"{path} names no host; accepted: a line HOST slots=RANKS for each")
    if problems:
        raise ConfigError(problems)
    return hosts


class Job:
    """One start: what runs where."""

    def __init__(self, arguments: list[str]):
        """Read the environment.

        Raises:
            ConfigError: for what can be seen from here.
        """
        env = os.environ
        self.arguments, self.folder = arguments, str(Path.cwd())
        self.hostfile = env.get("HOSTFILE", "")
        if not self.hostfile:
            raise ConfigError(["set HOSTFILE to a file with a line HOST slots=RANKS for each host, see "
                            "launch/hostfile.example"])  # fmt: skip
        self.hosts = read_hostfile(self.hostfile)
        self.launcher = env.get("LAUNCHER", "ssh")
        self.ssh = shlex.split(env.get("SSH", "ssh"))
        self.master = env.get("MASTER", "")
        port = env.get("PORT", "29500")
        problems = []
        if self.launcher not in ("ssh", "pdsh"):
            problems.append(f"LAUNCHER is {self.launcher!r}; accepted: ssh, pdsh")
        if self.launcher == "pdsh" and shutil.which("pdsh") is None:
            problems.append("LAUNCHER is pdsh, which is not installed; unset it to use ssh")
        if not (port.isdecimal() and 0 < int(port) < 2**16):
            problems.append(f"PORT is {port!r}; accepted: 1 to 65535")
        if problems:
            raise ConfigError(problems)
        self.port = int(port)

    def env(self) -> dict[str, str]:
        """Variables for the ranks: those of DeepSpeed's own file, and ours."""
        found = {}
        name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        for place in (Path.home(), Path(self.folder)):
            with contextlib.suppress(OSError):
                lines = (place / name).read_text(encoding="utf-8").splitlines()
                found |= dict(line.split("=", 1) for line in lines if "=" in line)
        names = set(os.environ.get("FORWARD", "").split())
        for name, value in os.environ.items():
            if name in names or (FORWARDED.match(name) and not SECRET.search(name)):
                found[name] = value
        return found | {"IRTUNE_NNODES": str(len(self.hosts))}

    # ----- before -----

    def check(self) -> None:
        """Ask every host, and compare the answers.

        Raises:
            ConfigError: with all problems.
        """
        config = load_config(self.arguments)
        ranks = sum(self.hosts.values())
        problems = read_engine_json(config, ranks)[1]
        if problems:
            raise ConfigError(problems)
        with ThreadPoolExecutor(min(64, len(self.hosts))) as pool:
            answers = list(pool.map(lambda host: self._ask(host, ranks), self.hosts))
        problems = [answer for answer in answers if isinstance(answer, str)]
        good = {host: answer for host, answer in zip(self.hosts, answers) if isinstance(answer, dict)}
        facts = [
            node_facts.NodeFacts(node=host, versions=answer["versions"], digest="", clock=answer["clock"],
                          options=answer["options"])
            for host, answer in good.items()
        ]  # fmt: skip
        first = next(iter(self.hosts))
        problems += node_facts.unequal_versions(facts) + node_facts.unequal_options(facts)
        problems += [f"{answer['port']}; set PORT to a free one" for answer in good.values() if answer["port"]]
        if first in good and good[first]["folder"]:
            problems.append(f"run.output_dir: {first} cannot write to {good[first]['folder']!r}")
        if problems:
            raise ConfigError(problems)
        warning = node_facts.clock_difference(facts)
        if warning:
            start.say(f"warning: {warning}")
        self.master = self.master or good[first].get("address", first)

    def _ask(self, host: str, ranks: int) -> dict[str, Any] | str:
        """The answer of launch/lib/check.py on `host`; or a sentence why there is none."""
        first = host == next(iter(self.hosts))
        others = [other for other in self.hosts if other != host]
        asked = {"arguments": self.arguments, "folder": self.folder, "ranks": ranks,
                 "port": self.port if first else None, "towards": others[0] if first and others else None}  # fmt: skip
        began = time.time()
        try:
            done = subprocess.run(self._remote(host, "check.py"), input=json.dumps(asked) + "\n", capture_output=True,
                                  text=True, timeout=ANSWER_SECONDS)  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"{host} did not answer within {ANSWER_SECONDS:.0f} s over ssh"
        except OSError as error:
            return f"{self.ssh[0]!r} cannot be started: {error.strerror} (SSH)"
        said = " ".join(done.stderr.strip().splitlines()[-3:])[:400]
        if done.returncode in NOT_FOUND:
            why = NOT_FOUND[done.returncode]
            return f"{host}: " + why.format(folder=self.folder, python=sys.executable, root=ROOT)
        if done.returncode == 255:
            return f"{host} cannot be reached by ssh without a password: {said or 'no reason was given'}"
        if done.returncode:
            return f"{host}: {said}"
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        answer["clock"] -= (began + time.time()) / 2  # ahead of this machine's
        return answer

    def _remote(self, host: str, script: str, *options: str) -> list[str]:
        """A command that runs a script of this folder on `host`, with the same Python in the same folder."""
        python, place, folder = (
            shlex.quote(text) for text in (sys.executable, str(ROOT / "launch" / "lib"), self.folder)
        )
        line = f"cd {folder} || exit 97; [ -x {python} ] || exit 98; [ -d {place} ] || exit 99; exec {python} " \
               f"{place}/{script} {shlex.join(options)}"  # fmt: skip
        once = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", "-o", "ServerAliveInterval=15"]
        return [*self.ssh, *once, host, line]

    # ----- the run -----

    def run_ssh(self) -> int:
        """DeepSpeed's launcher on every host at once, as pdsh would start it; returns the first status but 0."""
        world = base64.urlsafe_b64encode(
            json.dumps({host: list(range(slots)) for host, slots in self.hosts.items()}).encode()
        ).decode()
        jobs: dict[str, subprocess.Popen[str]] = {}
        for number, host in enumerate(self.hosts):
            command = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}",
                       f"--node_rank={number}", f"--master_addr={self.master}", f"--master_port={self.port}",
                       "--log_level=warning", str(ROOT / "train.py"), *self.arguments]  # fmt: skip
            start.say(f"+ {host}: {shlex.join(command)}")
            jobs[host] = subprocess.Popen(self._remote(host, "start.py", "--from-stdin"), stdin=subprocess.PIPE,
                                          text=True, start_new_session=True)  # fmt: skip
            message = {"command": command, "env": self.env(), "folder": self.folder}
            with contextlib.suppress(BrokenPipeError):
                jobs[host].stdin.write(json.dumps(message) + "\n")
                jobs[host].stdin.flush()
        stopped = threading.Event()

        def stop(*_: object) -> None:
            """The end of its input tells each host to end its ranks, saved."""
            stopped.set()
            for job in jobs.values():
                with contextlib.suppress(OSError):
                    job.stdin.close()

        for number in start.SIGNALS:
            signal.signal(number, stop)
        return self._wait(jobs, stop, stopped)

    def _wait(self, jobs: dict[str, "subprocess.Popen[str]"], stop: Any, stopped: threading.Event) -> int:
        first, deadline = 0, float("inf")
        left = dict(jobs)
        while left:
            time.sleep(0.2)
            for host, job in list(left.items()):
                status = job.poll()
                if status is None:
                    continue
                del left[host]
                if status and not first:
                    first, deadline = status, time.monotonic() + GRACE_SECONDS
                if status == 255 and not stopped.is_set():
                    start.say(f"error: the connection to {host} was lost, or its ssh failed")
                elif status and not stopped.is_set():
                    start.say(f"error: {host} ended with status {status}")
            if left and time.monotonic() > deadline:
                if stopped.is_set():
                    for job in left.values():
                        job.kill()
                start.say(f"error: {', '.join(left)} did not end; stopping")
                stop()
                deadline = time.monotonic() + GRACE_SECONDS
        return 128 - first if first < 0 else first

    def run_pdsh(self) -> int:
        """`deepspeed --hostfile` with pdsh, whose remote shells take the words of the command apart once more."""
        bad = [word for word in self.arguments if re.search(r"\s", word) and re.search(r"[$`\\!]", word)]
        if bad:
            what = "has a blank and one of $ ` \\ !, which pdsh would change; use LAUNCHER=ssh"
            raise ConfigError([f"{word[:80]!r} {what}" for word in bad])
        words = [word if re.search(r"\s", word) else shlex.quote(word) for word in self.arguments]
        with tempfile.NamedTemporaryFile("w", prefix="irtune-env-") as file:
            file.writelines(f"{name}={value}\n" for name, value in self.env().items() if "\n" not in value)
            file.flush()
            command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", self.hostfile, "--launcher",
                       "pdsh", "--force_multi", "--master_addr", self.master, "--master_port", str(self.port),
                       str(ROOT / "train.py"), *words]  # fmt: skip
            return start.run(command, {"DS_ENV_FILE": file.name})


def main(arguments: list[str]) -> int:
    """Check, say what is about to run, run."""
    try:
        job = Job(arguments)
        start.say(f"== {len(job.hosts)} hosts, {sum(job.hosts.values())} ranks: "
                  + ", ".join(f"{host} x {slots}" for host, slots in job.hosts.items()))  # fmt: skip
        job.check()
        start.say(f"== all hosts agree; rank 0 will listen on {job.master}:{job.port}")
        return job.run_ssh() if job.launcher == "ssh" else job.run_pdsh()
    except IrtuneError as error:
        for sentence in getattr(error, "problems", [str(error)]):
            start.say(f"error: {sentence}")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
