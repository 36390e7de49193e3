"""Runs on two hosts, started by torchrun, and what they send over the cable."""

import functools
import json
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from irtune.config import Config, write_config
from irtune.memory import count, estimate
from tests.support.hosts import Host, plain_frames
from tests.support.rank_server import COUNT_AT

MEETING = "nodeA:29500"
TORCHRUN = ["torchrun", "--nproc_per_node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", MEETING, "--rdzv-conf",
            "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=2"]  # fmt: skip
# torchrun's own store outlives a round; a node that joins later would look for rank 0's address in vain.
FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
SECONDS = 120.0  # for a whole job
LABELS = ("clarity", "coherence", "fluency", "meaning-changed", "style")


class Job:
    """A run on two hosts, a torchrun with two ranks on each."""

    def __init__(
        self,
        both: Sequence[Host],
        rank: list[str],
        config: Config,
        folder: Path,
        *,
        nodes: str = "2",
        restarts: int = 0,
        **environment: str,
    ):
        """`rank`: the command of a rank; `nodes`, `restarts`: as torchrun takes them; `environment`: of all ranks."""
        self.hosts, self.folder, self.config, self.output = both, folder, config, Path(config.run.output_dir)
        write_config(config, folder / "config.yaml")
        self.command = [*TORCHRUN, "--nnodes", nodes, "--max-restarts", str(restarts), "--no-python", *rank, "--config",
                        str(folder / "config.yaml")]  # fmt: skip
        self.environment = FRESH_STORE | environment
        self._logs: dict[str, Path] = {}
        self._starts = 0

    def start(self, number: int, *options: str) -> subprocess.Popen[str]:
        """torchrun on one of the hosts."""
        host = self.hosts[number]
        self._starts += 1
        log = self.folder / f"{host.name}-{self._starts}.log"
        self._logs[host.name] = log
        return host.start([*self.command, *options], log, self.environment)

    def said(self, number: int) -> str:
        """What the ranks and the launcher of a host have printed since it was started last."""
        return self._logs[self.hosts[number].name].read_text(errors="replace")

    def ended(self, processes: Sequence[subprocess.Popen[str]]) -> list[int]:
        """Exit statuses, when all have ended.

        Raises:
            AssertionError: when one does not in time, with the last lines of all.
        """
        return ended(processes, lambda: [self.said(number) for number in range(len(self._logs))])


def ended(processes: Sequence[subprocess.Popen[str]], said: Callable[[], list[str]]) -> list[int]:
    """Exit statuses, when all have ended.

    Raises:
        AssertionError: when one does not in time, with the end of what they have said.
    """
    try:
        return [process.wait(SECONDS) for process in processes]
    except subprocess.TimeoutExpired:
        raise AssertionError("\n".join(text[-3000:] for text in said())) from None


# ----- bytes over the cable -----


def count_traffic(both: Sequence[Host], rank: list[str], config: Config, folder: Path, first: int, last: int) -> dict:
    """Run `config`, and count what crosses between the ends of the steps `first` and `last`.

    Returns:
        planned: bytes that a rank sends in these steps. sent, received: bytes of frames at the interface of each host.
        seconds: of these steps.
    """
    for host in both:
        plain_frames(host)
    job = Job(both, rank, config, folder, **{COUNT_AT: f"{first} {last}"})
    assert job.ended([job.start(0), job.start(1)]) == [0, 0], job.said(0)[-3000:]
    found = {"planned": planned_bytes(config, range(first + 1, last + 1)), "sent": [], "received": [], "seconds": 0.0}
    for number in range(len(both)):
        seen = [json.loads(line) for line in re.findall(r"TRAFFIC (\{.*?\})", job.said(number))]
        assert [row["step"] for row in seen] == [first, last]
        for way in ("sent", "received"):
            found[way].append(seen[1][way] - seen[0][way])
        found["seconds"] = seen[1]["time"] - seen[0]["time"]
    return found


def planned_bytes(config: Config, steps: range) -> int:
    """Bytes that each of 4 ranks sends in these steps, by the plan, for the layers that were trained in each."""
    lines = (Path(config.run.output_dir) / "selection.jsonl").read_text().splitlines()
    chosen = {record["step"]: tuple(record["selected"]) for record in map(json.loads, lines)}
    zero = json.loads(Path(config.deepspeed).read_text())["zero_optimization"]

    @functools.cache
    def sent(selected: tuple[int, ...]) -> int:
        parts = count(config, selected, device="cpu", slope=False, labels=LABELS)
        return estimate(parts, config, stage=zero["stage"], quantization="none", world=4, zero=zero).sent_per_step

    # What is chosen after step s trains from s + 1 on.
    return sum(sent(chosen[max(known for known in chosen if known < step)]) for step in steps)
