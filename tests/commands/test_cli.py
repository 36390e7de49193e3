"""train.py as a user meets it: exit statuses, one message, no traceback."""

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from irtune import console
from tests.support import ROOT
from tests.support.tiny import engine_json


def start(*arguments: str, launcher: tuple[str, ...] = (sys.executable,), timeout: float = 170.0, **environment: str):
    command = [*launcher, str(ROOT / "train.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, check=False, env={**os.environ, **environment}
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


@pytest.mark.parametrize(
    "launcher",
    ["python", *(pytest.param(launcher, marks=pytest.mark.slow) for launcher in ("torchrun", "deepspeed"))],
)
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


@pytest.mark.slow
def test_a_hub_model_in_the_cache_works_with_the_network_off(llama, corpus, tmp_path):
    snapshot = tmp_path / "cache/hub/models--nobody--tiny/snapshots/0123456789"
    shutil.copytree(llama, snapshot)
    reference = snapshot.parents[1] / "refs/main"
    reference.parent.mkdir()
    reference.write_text("0123456789")
    options = arguments(llama, corpus, tmp_path)
    options[options.index(str(llama))] = "nobody/tiny"
    # An address where nobody listens: what a machine without network sees.
    offline = {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = start(*options, **offline)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["model"]["name_or_path"] == "nobody/tiny"
    options[options.index("nobody/tiny")] = "nobody/else"
    done = start(*options, "--run.output_dir", str(tmp_path / "other"), HF_HUB_OFFLINE="1", **offline)
    assert done.returncode == 2
    assert "can be loaded from 'nobody/else'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_launch_scripts_pass_shellcheck():
    scripts = sorted(str(path) for path in (ROOT / "launch").glob("*.sh"))
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.quick
def test_a_package_that_the_program_does_not_use_is_not_there_for_others():
    assert importlib.util.find_spec("this") is not None
    sys.modules.pop("this", None)
    with console.without("this"):
        assert importlib.util.find_spec("this") is None
        with pytest.raises(ImportError):
            importlib.import_module("this")
    assert "this" not in sys.modules and importlib.util.find_spec("this") is not None
    with console.without("json"):  # it is imported already
        assert importlib.import_module("json") is json


def test_a_start_without_quantisation_imports_no_compiler():
    program = (
        "import sys; from irtune import console\n"
        "with console.without('bitsandbytes'): import irtune.train.run\n"
        "sys.exit(len({'bitsandbytes', 'torch._inductor.compile_fx'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
