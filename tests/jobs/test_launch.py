"""The scripts of launch/: what they check, what they start, what they show when a rank fails."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.ranks import free_port
from tests.support.tiny import engine_json

SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch")])


@pytest.fixture(scope="module")
def venv(tmp_path_factory) -> Path:
    """This environment, as one that launch/setup.sh has made."""
    folder = tmp_path_factory.mktemp("venv")
    for entry in Path(sys.prefix).iterdir():
        (folder / entry.name).symlink_to(entry)
    marker = folder / ".irtune-requirements"
    marker.unlink(missing_ok=True)
    stamp = subprocess.run(["cksum"], input=(ROOT / "requirements.txt").read_bytes(), capture_output=True, check=True)
    marker.write_bytes(stamp.stdout)
    return folder


@pytest.fixture
def env(venv, tmp_path) -> dict[str, str]:
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "IRTUNE_"))}
    return mine | {"IRTUNE_VENV": str(venv), "IRTUNE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}


def fake_ssh(folder: Path, body: str = 'exec sh -c "$last"') -> str:
    """An ssh that stays on this machine: `$host` and `$last`, the command, are what the real one would be given."""
    file = folder / "ssh"
    file.write_text(f"#!/bin/sh\nfor word; do host=$last; last=$word; done\n{body}\n")
    file.chmod(0o755)
    return str(file)


def call(script: str, *arguments: str, env: dict[str, str], timeout: float = 100.0, **more: str):
    return subprocess.run(["bash", str(ROOT / "launch" / script), *map(str, arguments)], env=env | more, cwd=ROOT,
                          capture_output=True, text=True, timeout=timeout, check=False)  # fmt: skip


def options(llama, corpus, folder: Path) -> list[str]:
    return [
        "--model.name_or_path", str(llama), "--model.dtype", "float32", "--data.path", str(corpus),
        "--data.max_length", "64", "--optim.max_steps", "2", "--optim.micro_batch_size", "4",
        "--run.output_dir", str(folder / "run"), "--deepspeed", str(engine_json(folder, 2)),
    ]  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", str(script)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# ----- several hosts with DeepSpeed's launcher -----


@pytest.mark.quick
def test_a_bad_hostfile_is_told_line_by_line(env, tmp_path):
    said = call("multinode_deepspeed.sh", "--data.path", "x", env=env)
    assert said.returncode == 2 and "error: set HOSTFILE to a file" in said.stderr
    hosts = tmp_path / "hosts"
    hosts.write_text("# a comment\na slots=2\nb slots=none\n-oProxyCommand=x slots=1\na slots=1\n")
    said = call("multinode_deepspeed.sh", env=env, HOSTFILE=str(hosts))
    assert said.returncode == 2 and said.stderr.count("error: ") == 3
    assert "line 3 is 'b slots=none'" in said.stderr and "line 5: a appears twice" in said.stderr
    assert "line 4 is '-oProxyCommand=x slots=1'" in said.stderr
    hosts.write_text("a slots=2\n")
    said = call("multinode_deepspeed.sh", env=env, HOSTFILE=str(hosts), LAUNCHER="rsh", PORT="0")
    assert "LAUNCHER is 'rsh'; accepted: ssh, pdsh" in said.stderr and "PORT is '0'" in said.stderr


@pytest.mark.quick
def test_all_hosts_are_asked_and_every_problem_is_told(env, llama, corpus, tmp_path):
    port = free_port()
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1\nunreachable slots=1\nold slots=1\nelsewhere slots=1\nother slots=1\n")
    ssh = fake_ssh(
        tmp_path,
        f"""case $host in
unreachable) echo 'no route to host' >&2; exit 255;;
old) sh -c "$last" | sed 's/"torch": "[^"]*"/"torch": "1.0"/';;
elsewhere) exec sh -c "$(echo "$last" | sed 's#{sys.prefix}#/nowhere#g; s#{env["IRTUNE_VENV"]}#/nowhere#g')";;
other) sh -c "$last" | sed 's/"optim.lr": "[^"]*"/"optim.lr": "7"/';;
*) exec sh -c "$last";;
esac""",
    )
    with socket.create_server(("", port)):
        said = call("multinode_deepspeed.sh", *options(llama, corpus, tmp_path), env=env, HOSTFILE=str(hosts), SSH=ssh,
                    PORT=str(port), MASTER="127.0.0.1")  # fmt: skip
    assert said.returncode == 2
    assert "error: unreachable cannot be reached by ssh without a password: no route to host" in said.stderr
    assert "1.0 on old; install the same requirements" in said.stderr
    assert f"error: elsewhere: there is no {env['IRTUNE_VENV']}/bin/python; the environment must" in said.stderr
    assert "error: optim.lr is 0.0005 on localhost, old, 7 on other; give the same recipe" in said.stderr
    assert f"error: port {port} of " in said.stderr and "set PORT to a free one" in said.stderr
    assert said.stderr.count("error: ") == 5 and not (tmp_path / "run").exists()
    said = call("multinode_deepspeed.sh", "--optim.lr", "-1", env=env, HOSTFILE=str(hosts), SSH=ssh)
    assert said.stderr.count("error: ") == 2 and "optim.lr is -1" in said.stderr, "here already, before anyone is asked"


@pytest.mark.slow
def test_two_hosts_train(env, llama, corpus, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    more = {"HOSTFILE": str(hosts), "SSH": fake_ssh(tmp_path), "PORT": str(free_port()), "NCCL_DEBUG": "WARN"}
    done = call("multinode_deepspeed.sh", *options(llama, corpus, tmp_path), env=env, **more)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "== all hosts agree; rank 0 will listen on 127.0.0.1:" in done.stderr
    assert json.loads((tmp_path / "run/results.json").read_text())["world_size"] == 2
    assert "dev accuracy" in done.stdout
    texts = [(tmp_path / f"run/logs/rank_{rank}.log").read_text() for rank in (0, 1)]
    assert all(" START rank " in text and text.splitlines()[-1].endswith("END finished") for text in texts)


# ----- the process between a script and its launcher -----

WAITS = 'trap "echo told >> told; exit 143" TERM; touch ready; for i in $(seq 400); do sleep 0.05; done; exit 0'


def heed_hangup():
    """Tests that were started by nohup hand its deafness on."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.quick
@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "SIGHUP", "end of input"])
def test_a_stop_is_passed_on_once(tmp_path, how):
    command, over_ssh = ["bash", "-c", WAITS], how == "end of input"
    process = subprocess.Popen([sys.executable, str(ROOT / "launch/lib/start.py"),
                                *(["--from-stdin"] if over_ssh else command)],
                               cwd=tmp_path, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=heed_hangup)  # fmt: skip
    if over_ssh:
        process.stdin.write(json.dumps({"command": command, "env": {}, "folder": str(tmp_path)}) + "\n")
        process.stdin.flush()
    deadline = time.monotonic() + 20
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None
    if over_ssh:
        process.stdin.close()
    else:
        process.send_signal(getattr(signal, how))
    assert process.wait(20) == 143
    assert (tmp_path / "told").read_text() == "told\n"
    assert process.stderr.read().startswith("+ bash -c 'trap ")


@pytest.mark.quick
def test_a_rank_that_was_killed_is_shown_by_its_log_without_an_end(tmp_path, corpus):
    logs = tmp_path / "run/logs"
    logs.mkdir(parents=True)
    begins = f"2026-01-01 START rank 0 on {socket.gethostname()}, process 1, cpu"
    (tmp_path / "train.py").write_text(
        f"import pathlib\nlogs = pathlib.Path({str(logs)!r})\n"
        f"(logs / 'rank_0.log').write_text({begins!r} + '\\nnow INFO step 7\\n')\n"
        f"(logs / 'rank_1.log').write_text({begins!r} + '\\nnow END finished\\n')\n"
        f"(logs / 'rank_2.log').write_text({begins!r}.replace(' on ', ' on not') + '\\nnow ERROR x\\n')\n"
        "raise SystemExit(9)\n"
    )
    done = subprocess.run([sys.executable, str(ROOT / "launch/lib/start.py"), sys.executable,
                           str(tmp_path / "train.py"),
                           "--data.path", str(corpus), "--run.output_dir", str(tmp_path / "run")],
                          capture_output=True, text=True, cwd=tmp_path, check=False)  # fmt: skip
    assert done.returncode == 9
    assert "rank_0.log: this rank ended without a message (killed?); its last lines:" in done.stderr
    assert "INFO step 7" in done.stderr
    assert "rank_1.log" not in done.stderr and "rank_2.log" not in done.stderr, "fine, or of another host"


# ----- torchrun on every node -----


@pytest.mark.quick
def test_torchrun_refuses_what_cannot_meet(env, llama, corpus, tmp_path):
    chosen = options(llama, corpus, tmp_path)

    def said(*more_options, **more):
        done = call("torchrun_node.sh", *chosen, *more_options, env=env | {"RANKS": "1"}, **more)
        assert done.returncode == 2
        return done.stderr

    assert "several nodes need a place to meet: set RENDEZVOUS" in said(NNODES="2")
    text = said(NNODES="0", RANKS="x", MAX_RESTARTS="y", NODE_RANK="9", MASTER="a:1", RENDEZVOUS="b:2")
    assert text.count("error: ") == 5
    assert "restarts and a range of nodes need RENDEZVOUS" in said(
        NNODES="2", MASTER="a:1", NODE_RANK="0", MAX_RESTARTS="1"
    )
    assert "set optim.global_batch_size" in said(NNODES="1:2", RENDEZVOUS="127.0.0.1:1")
    assert "not a multiple of optim.micro_batch_size 4 x 2" in said(
        "--optim.global_batch_size", "12", NNODES="1:2", RENDEZVOUS="127.0.0.1:1"
    )
    assert "RENDEZVOUS is 'nowhere'; accepted: HOST:PORT" in said(NNODES="2", RENDEZVOUS="nowhere")
    assert "no-such-host.invalid cannot be found from" in said(NNODES="2", RENDEZVOUS="no-such-host.invalid:29500")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_nodes_meet_and_a_failing_rank_is_shown(env, llama, corpus, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("a disk that takes no checkpoint")
    place = {"NNODES": "2", "RANKS": "1", "RENDEZVOUS": f"127.0.0.1:{free_port()}", "RDZV_ID": "test"}
    command = ["bash", str(ROOT / "launch/torchrun_node.sh"), *options(llama, corpus, tmp_path)]
    parts = [
        subprocess.Popen(command, env=env | place, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [part.communicate(timeout=120) for part in parts]
    assert all(part.returncode for part in parts), said[0][1][-3000:]
    assert sum("step 2  loss" in out for out, _ in said) == 1, said  # both trained to the end, and rank 0 spoke
    errors = "".join(text for _, text in said)
    assert "error: cannot write" in errors and "error on rank 1 (" in errors and "== node " in errors
    assert "rank_0.log: this rank ended with an error; its last lines:" in errors
    assert "rank_1.log: this rank ended with an error; its last lines:" in errors
    assert "ERROR OutputError: cannot write" in (tmp_path / "run/logs/rank_0.log").read_text()


# ----- Slurm -----

STUBS = {
    "scontrol": 'if [ "$1" = show ]; then printf "first\\nsecond\\n"; else echo "$@" >> "$STUBS/requeued"; fi',
    "srun": 'echo "$RENDEZVOUS $NNODES $RDZV_ID $*" > "$STUBS/started"; trap "exit 143" TERM; '
    "for i in $(seq 200); do sleep 0.05; done; exit 0",
}


@pytest.mark.quick
@pytest.mark.parametrize(("number", "queued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_slurm_job_ends_saved_and_is_queued_again_at_its_limit(env, tmp_path, number, queued):
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_ID": "77", "SUBMIT_DIR": str(ROOT), "JOB_NUM_NODES": "2", "JOB_NODELIST": "first,second",
             "GPUS_ON_NODE": "4"}  # fmt: skip
    job = {f"SLURM_{name}": value for name, value in slurm.items()}
    job |= {"STUBS": str(tmp_path), "PATH": f"{tmp_path}:{env['PATH']}"}
    process = subprocess.Popen(["bash", str(ROOT / "launch/slurm.sbatch"), "--data.labels", "[a, b]"], env=env | job,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    deadline = time.monotonic() + 20
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 143
    started = (tmp_path / "started").read_text()
    assert started.startswith("first:20077 2 77 --nodes 2 --ntasks 2") and "--data.labels [a, b]" in started
    assert (tmp_path / "requeued").exists() == queued
    assert "+ NNODES=2 RENDEZVOUS=first:20077 RANKS=4 srun" in said
