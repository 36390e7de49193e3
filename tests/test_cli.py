"""train.py as a user meets it: exit statuses, one message, no traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import engine_json

ROOT = Path(__file__).parents[1]


def start(*arguments: str, launcher: tuple[str, ...] = (sys.executable,), timeout: float = 170.0):
    return subprocess.run(
        [*launcher, str(ROOT / "train.py"), *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.quick
def test_configuration_errors_have_no_traceback(tmp_path):
    done = start("--optim.lr", "-1", "--data.pth", str(tmp_path), "--run.output_dir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "3 errors in the configuration" in done.stderr
    assert "did you mean data.path?" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.quick
def test_help_needs_no_model():
    done = start("--help")
    assert done.returncode == 0
    assert "--tuning.interval" in done.stdout


def test_traceback_when_asked_for(tmp_path):
    done = start("--optim.lr", "-1", "--data.path", str(tmp_path), "--run.traceback", "true")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def arguments(llama, corpus, folder: Path) -> list[str]:
    return [
        "--model.name_or_path", str(llama), "--model.dtype", "float32", "--data.path", str(corpus),
        "--optim.max_steps", "2", "--optim.micro_batch_size", "4", "--run.output_dir", str(folder / "run"),
        "--deepspeed", str(engine_json(folder, 2)),
    ]  # fmt: skip


@pytest.mark.parametrize("launcher", ["python", "torchrun", "deepspeed"])
def test_every_launcher_starts_it(llama, corpus, tmp_path, launcher):
    scripts = Path(sys.executable).parent
    start_with = {
        "python": (sys.executable,),
        "torchrun": (str(scripts / "torchrun"), "--standalone", "--nproc_per_node", "2"),
        "deepspeed": (sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29871"),
    }[launcher]
    done = start(*arguments(llama, corpus, tmp_path), launcher=start_with)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "dev accuracy" in done.stdout
    assert (tmp_path / "run/results.json").exists()
