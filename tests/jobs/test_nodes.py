"""Two hosts with two ranks each: network namespaces on this machine, joined by a cable that can be cut, slow and lossy.

DeepSpeed's launcher starts real `train.py`s on them, over real ssh. Elsewhere torchrun starts
tests/support/rank_server.py,
which does the same without the imports. IRTUNE_NODES=all adds what launch/torchrun_node.sh does, with `train.py`.
"""

import json
import re
import sys
import time
from pathlib import Path

import pytest

from irtune.config import Config, write_config
from irtune.distributed.environment import variable
from tests.support import hosts, rank_server
from tests.support.node_jobs import MEETING, SECONDS, Job, count_traffic, ended
from tests.support.runs import launch, losses, records, selections
from tests.support.tiny import engine_json, tiny_config

REASON = hosts.missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=f"no hosts: {REASON}")]
ONLY_WITH_ALL = pytest.mark.skipif(
    variable("IRTUNE_NODES", "") != "all", reason="half a minute more: IRTUNE_NODES is not `all`"
)
STEPS = 24  # of a run that is disturbed
OPTIONS = {"optim__max_steps": STEPS, "run__eval_every": STEPS, "run__save_every": 2, "run__timeout_seconds": 8,
           "optim__lr": 0.002, "optim__global_batch_size": 16}  # fmt: skip


@pytest.fixture(scope="module")
def rank(tmp_path_factory):
    """The command of a rank that starts at once."""
    with rank_server.running(tmp_path_factory.mktemp("ranks")) as command:
        yield command


@pytest.fixture
def pair():
    """Two hosts."""
    with hosts.joined("nodeA", "nodeB") as both:
        yield both


@pytest.fixture(scope="module")
def undisturbed(llama, corpus, tmp_path_factory) -> Path:
    """The run that is disturbed elsewhere: 4 ranks of one node."""
    return launch(tiny_config(llama, corpus, tmp_path_factory.mktemp("undisturbed") / "run", **OPTIONS), 4)


def steps_done(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count('"kind": "train"') if file.exists() else 0


def wait_for_step(folder: Path, step: int, processes) -> None:
    """Until `step` is done.

    Raises:
        AssertionError: when one of `processes` ends before.
    """

    def done() -> bool:
        assert all(process.poll() is None for process in processes), "it ended before that step"
        return steps_done(folder) >= step

    hosts.wait_until(done, SECONDS, f"step {step}")


def assert_same_run(folder: Path, whole: Path) -> None:
    """The same to the last bit: losses, selections, weights, moments and predictions."""
    assert losses(folder) == losses(whole)
    assert selections(folder) == selections(whole)
    (last,) = {int((run / "checkpoints/latest").read_text().removeprefix("step_")) for run in (folder, whole)}
    for file in ("trainable.safetensors", "optimizer.safetensors"):
        saved = [(run / f"checkpoints/step_{last}" / file).read_bytes() for run in (folder, whole)]
        assert saved[0] == saved[1], file
    assert (folder / "predictions.jsonl").read_text() == (whole / "predictions.jsonl").read_text()


# ----- both launchers, the real corpus -----


@pytest.fixture(scope="module")
def one_node(llama, real_data, tmp_path_factory) -> tuple[Path, Config, list[str]]:
    """30 steps on IteraTeR by 4 ranks of one node, their configuration, and the options of `train.py` for it."""
    folder = tmp_path_factory.mktemp("iterater")
    options = {"data__preset": "iterater-human", "optim__max_steps": 30, "run__eval_every": 30}
    config = tiny_config(llama, real_data / "iterater", folder / "run", **options)
    write_config(config, folder / "config.yaml")
    return launch(config, 4), config, ["--config", str(folder / "config.yaml")]


def test_torchrun_on_two_nodes_is_one_node(pair, rank, one_node, tmp_path):
    whole, config, _ = one_node
    job = Job(pair, rank, config, tmp_path)
    processes = [job.start(number, "--run.output_dir", str(tmp_path / "run")) for number in (0, 1)]
    assert job.ended(processes) == [0, 0], job.said(0)
    assert_same_run(tmp_path / "run", whole)
    assert pair[0].counters()["tx_bytes"] > 10**6  # it did go over the cable


@ONLY_WITH_ALL
def test_our_script_for_torchrun_on_two_nodes_is_one_node(pair, one_node, tmp_path):
    whole, _, options = one_node
    environment = {"NNODES": "2", "RANKS": "2", "RENDEZVOUS": MEETING, "WAIT_SECONDS": "60"}
    command = [sys.executable, "launch/lib/rendezvous.py", *options, "--run.output_dir", str(tmp_path / "run")]
    logs = [tmp_path / f"{host.name}.log" for host in pair]
    processes = [host.start(command, log, environment) for host, log in zip(pair, logs)]
    assert ended(processes, lambda: [log.read_text() for log in logs]) == [0, 0], logs[0].read_text()
    assert_same_run(tmp_path / "run", whole)


def test_deepspeed_with_a_hostfile_over_ssh_is_one_node(pair, one_node, tmp_path):
    reason = hosts.missing("sshd", "ssh", "ssh-keygen")
    if reason is not None:
        pytest.skip(f"no ssh between hosts: {reason}")
    whole, _, options = one_node
    hosts.serve_ssh(pair)
    (tmp_path / "hostfile").write_text("nodeA slots=2\nnodeB slots=2\n")
    # pdsh: `deepspeed --hostfile`. ssh: DeepSpeed's launcher is started on each host by launch/lib/hosts.py itself.
    launcher = "pdsh" if hosts.program("pdsh") else "ssh"
    environment = {"HOSTFILE": str(tmp_path / "hostfile"), "LAUNCHER": launcher}
    command = [sys.executable, "launch/lib/hosts.py", *options, "--run.output_dir", str(tmp_path / "run")]
    done = pair[0].run(command, timeout=SECONDS, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert_same_run(tmp_path / "run", whole)
    assert pair[0].counters()["tx_bytes"] > 10**6


# ----- bytes over the cable -----


def test_the_cable_carries_what_the_plan_says(pair, rank, llama, corpus, tmp_path):
    first, last = 4, 16
    options = {"adapter__r": 64, "optim__max_steps": last + 1, "run__eval_every": last + 1}
    config = tiny_config(llama, corpus, tmp_path / "run", **options)
    found = count_traffic(pair, rank, config, tmp_path, first, last)
    planned, frames = found["planned"], found["sent"] + found["received"]
    # In a ring of 4 ranks, rank 1 alone sends from nodeA to nodeB, and rank 3 back: a rank's share each way. Frames add
    # 66 bytes to 1448, and one acknowledgement of 66 to two frames of the other direction: 7 %. The rest are numbers:
    # scores, norms, losses, some twenty small messages a step.
    print(f"TRAFFIC {planned} planned, {frames} counted, {[round(seen / planned, 3) for seen in frames]}")
    for seen in frames:
        assert 1.0 < seen / planned < 1.15


# ----- nodes that are lost -----


@pytest.mark.parametrize("timeout", [16, pytest.param(60, marks=ONLY_WITH_ALL)])
def test_a_cut_cable_ends_both_nodes_with_the_name_of_the_other(pair, rank, llama, corpus, tmp_path, timeout):
    config = tiny_config(llama, corpus, tmp_path / "run", **(OPTIONS | {"run__timeout_seconds": timeout}))
    job = Job(pair, rank, config, tmp_path)
    processes = [job.start(0), job.start(1)]
    wait_for_step(job.output, 4, processes)
    pair[1].link("down")
    cut = time.monotonic()
    assert processes[0].wait(SECONDS) != 0
    first = time.monotonic() - cut
    # torchrun itself waits for its store as long as the kernel lets it; its ranks do not.
    hosts.wait_until(lambda: job.said(1).count("error on rank") == 2, 60, "message on nodeB")
    second = time.monotonic() - cut
    print(f"CUT nodeA ended after {first:.1f} s, the ranks of nodeB after {second:.1f} s")
    assert first < timeout and second < timeout
    assert steps_done(job.output) < STEPS
    # Both ranks know; torchrun may end the second before it has said so.
    silence = r"rank 2 on node 1 \(nodeB\) has given no sign|no sign of life from rank 2 on node 1 \(nodeB\)"
    assert re.search(rf"error.*: ({silence})", job.said(0)), job.said(0)
    for number in (2, 3):
        assert re.search(rf"error on rank {number} .*rank 0 on node 0 \(nodeA\)", job.said(1)), job.said(1)


def test_a_node_that_is_killed_and_comes_back_costs_nothing(pair, rank, undisturbed, llama, corpus, tmp_path):
    config = tiny_config(llama, corpus, tmp_path / "run", **OPTIONS)
    job = Job(pair, rank, config, tmp_path, restarts=3)
    processes = [job.start(0), job.start(1)]
    wait_for_step(job.output, 6, processes)
    pair[1].kill()
    killed = time.monotonic()
    hosts.wait_until(lambda: "on node 1 (nodeB)" in job.said(0), 60, "message that names nodeB")
    print(f"KILLED nodeA says so after {time.monotonic() - killed:.1f} s")
    assert re.search(r"error.*: no sign of life from rank 2 on node 1 \(nodeB\)", job.said(0)), job.said(0)
    pair[1].boot()
    back = job.start(1)
    assert job.ended([processes[0], back]) == [0, 0], job.said(0)
    assert "resumed from" in job.said(0)
    assert_same_run(job.output, undisturbed)


def test_with_a_node_less_the_run_goes_on_with_the_same_batch(pair, rank, undisturbed, llama, corpus, tmp_path):
    config = tiny_config(llama, corpus, tmp_path / "run", **OPTIONS)
    job = Job(pair, rank, config, tmp_path, nodes="1:2", restarts=3)
    processes = [job.start(0), job.start(1)]
    wait_for_step(job.output, 6, processes)
    pair[1].kill()
    assert job.ended(processes[:1]) == [0], job.said(0)
    said = job.said(0)
    assert "on node 1 (nodeB)" in said and "resumed from" in said
    assert "4 examples x 1 accumulation x 4 ranks = 16 examples per step" in said
    assert "4 examples x 2 accumulation x 2 ranks = 16 examples per step" in said
    assert json.loads((job.output / "results.json").read_text())["world_size"] == 2
    assert selections(job.output) == selections(undisturbed)
    pairs = list(zip(losses(job.output), losses(undisturbed)))
    print(f"ELASTIC losses differ by {max(abs(here - there) / there for here, there in pairs):.1e} at most")
    assert [here for here, _ in pairs] == pytest.approx([there for _, there in pairs], rel=1e-5)


# ----- a bad cable -----


def test_a_slow_and_lossy_cable_changes_no_number(rank, undisturbed, llama, corpus, tmp_path):
    options = OPTIONS | {"run__timeout_seconds": 60}
    config = tiny_config(llama, corpus, tmp_path / "run", **options)
    with hosts.joined("nodeA", "nodeB", delay=0.01, loss=0.01) as pair:
        job = Job(pair, rank, config, tmp_path)
        processes = [job.start(0), job.start(1)]
        wait_for_step(job.output, 5, processes)
        for process, host in zip(processes, pair):
            host.kill()
            process.wait(30)
    seen = records(job.output, "train")
    assert [row["loss"] for row in seen] == losses(undisturbed)[: len(seen)]
    assert selections(job.output) == selections(undisturbed)[: len(selections(job.output))]
    seconds = [sum(row["seconds"] for row in rows[1:4]) / 3 for rows in (seen, records(undisturbed, "train"))]
    print(f"SLOW {seconds[0]:.2f} s a step, {seconds[1]:.2f} s without")
    assert seconds[0] > seconds[1] + 0.1


# ----- what is found before training -----


def refused(pair, job: Job, *options: str) -> list[str]:
    """What both hosts say when the second one has other `options`."""
    processes = [job.start(0), job.start(1, *options)]
    assert all(job.ended(processes))
    assert not (job.output / "metrics.jsonl").exists() and not (job.output / "config.yaml").exists()
    return [job.said(0), job.said(1)]


def test_an_output_folder_that_one_node_does_not_see_is_named(pair, rank, llama, corpus, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    config = tiny_config(llama, corpus, shared / "run", **OPTIONS, deepspeed=engine_json(tmp_path, 2))
    mounted = pair[1].run(["mount", "-t", "tmpfs", "tmpfs", str(shared)], timeout=30)
    assert mounted.returncode == 0, mounted.stderr
    said, _ = refused(pair, Job(pair, rank, config, tmp_path))
    wanted = f"run.output_dir '{shared}/run' of node 0 (nodeA) is not visible from node 1 (nodeB)"
    assert wanted in said, said


def test_another_configuration_on_one_node_is_named(pair, rank, llama, corpus, tmp_path):
    config = tiny_config(llama, corpus, tmp_path / "run", **OPTIONS)
    said, _ = refused(pair, Job(pair, rank, config, tmp_path), "--optim.lr", "0.02")
    assert "optim.lr" in said and "0.02 on node 1 (nodeB)" in said, said
