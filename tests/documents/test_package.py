"""irtune as a package: what it depends on, and a wheel that works where there is no checkout."""

import os
import re
import shutil
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import irtune
from irtune import cli
from irtune.config import load_config
from irtune.config.packaged import packaged
from tests.support import ROOT
from tests.support.ranks import free_port

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
DEV = "# For tests, lint and types:"


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins() -> tuple[list[Requirement], list[Requirement]]:
    """Those of requirements.txt that irtune needs, and those for its tests."""
    parts = (ROOT / "requirements.txt").read_text(encoding="utf-8").split(DEV)
    lines = ([line.partition("#")[0].strip() for line in part.splitlines()] for part in parts)
    main, dev = ([Requirement(line) for line in part if line] for part in lines)
    return main, dev


@pytest.mark.quick
def test_the_package_accepts_exactly_what_requirements_txt_pins():
    accepted = project()
    for pinned, named in zip(pins(), (accepted["dependencies"], accepted["optional-dependencies"]["dev"])):
        wanted = [Requirement(line) for line in named]
        assert {pin.name for pin in pinned} == {one.name for one in wanted}
        for pin in pinned:
            (exact,) = pin.specifier
            fitting = [one for one in wanted if one.name == pin.name and one.extras == pin.extras]
            fitting = [one for one in fitting if one.marker is None or str(one.marker) == str(pin.marker)]
            assert exact.operator == "==" and len(fitting) == 1, pin
            assert fitting[0].specifier.contains(exact.version), f"{fitting[0]} leaves out {pin}"


@pytest.mark.quick
def test_the_version_stands_in_one_place():
    assert project()["dynamic"] == ["version"] and "version" not in project()
    lines = [line for file in (ROOT / "irtune").rglob("*.py") for line in file.read_text().splitlines()]
    assert [line for line in lines if line.startswith("__version__ =")] == [f'__version__ = "{irtune.__version__}"']


@pytest.mark.quick
def test_recipes_are_listed_copied_and_found_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(file.stem in listed for file in [*packaged("recipes"), *packaged("ds_configs")])
    assert cli.main(["recipes", "quickstart"]) == 0
    assert (tmp_path / "quickstart.yaml").read_text() == (ROOT / "launch/recipes/quickstart.yaml").read_text()
    assert cli.main(["recipes", "quickstart"]) == 2
    assert "quickstart.yaml exists already" in capsys.readouterr().err
    assert cli.main(["recipes", "zero3", "--to", "mine.json"]) == 0 and (tmp_path / "mine.json").is_file()
    assert cli.main(["recipes", "nothing"]) == 2
    assert "there is no recipe 'nothing'; accepted: argrewrite-" in capsys.readouterr().err
    (tmp_path / "quickstart.yaml").unlink()
    for name in ("quickstart", "quickstart.yaml", "launch/recipes/quickstart.yaml"):
        assert load_config(["--config", name, "--data.path", "x"]).optim.max_steps == 30
    for name in ("zero3", "ds_configs/zero3.json", "mine.json"):
        assert load_config(["--data.path", "x", "--deepspeed", name]).deepspeed == name
    (tmp_path / "quickstart.yaml").write_text("optim: {max_steps: 7}\n")  # the user's own file wins
    assert load_config(["--config", "quickstart.yaml", "--data.path", "x"]).optim.max_steps == 7


@pytest.mark.quick
def test_launchers_may_put_their_option_before_the_command(capsys):
    assert cli.main(["--local_rank=0", "recipes"]) == 0
    assert "quickstart" in capsys.readouterr().out


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The scripts of an environment that has irtune from a wheel, and all else from this one."""
    if find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed (requirements.txt has it)")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == f"irtune-{irtune.__version__}-py3-none-any.whl"
    venv.create(folder / "venv", system_site_packages=True, with_pip=False)
    (library,) = (folder / "venv/lib").glob("python*/site-packages")
    (library / "shared.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("-packages")))
    pip = [sys.executable, "-m", "pip", "--python", folder / "venv/bin/python", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", wheel], check=True)
    return folder / "venv/bin"


def started(scripts: Path, folder: Path, *command: str) -> str:
    """Standard output of a program of the environment, run outside the checkout."""
    here = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    here["PATH"] = f"{scripts}{os.pathsep}{here['PATH']}"
    done = subprocess.run(command, cwd=folder, env=here, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_wheel_works_without_a_checkout(installed, llama, corpus, tmp_path):
    where = "import irtune; print(irtune.__file__)"
    assert str(installed.parent) in started(installed, tmp_path, str(installed / "python"), "-c", where)
    names = started(installed, tmp_path, "irtune", "recipes")
    assert all(file.stem in names for file in [*packaged("recipes"), *packaged("ds_configs")])
    started(installed, tmp_path, "irtune", "recipes", "quickstart", "--to", "mine.yaml")
    options = ("--model.name_or_path", str(llama), "--model.dtype", "float32", "--data.path", str(corpus),
               "--optim.max_steps", "1", "--run.eval_every", "1", "--run.output_dir")  # fmt: skip
    launchers = {
        "deepspeed": f"deepspeed.launcher.runner --num_gpus 1 --master_port {free_port()} --module irtune",
        "torchrun": "torch.distributed.run --standalone --nproc_per_node 1 --no-python irtune",
    }
    for name, command in launchers.items():
        program = (str(installed / "python"), "-m", *command.split(), "train", "--config", "mine.yaml")
        said = started(installed, tmp_path, *program, *options, f"runs/{name}")
        assert "dev accuracy" in said
        assert yaml.safe_load((tmp_path / f"runs/{name}/config.yaml").read_text())["deepspeed"].endswith("zero2.json")


@pytest.mark.quick
def test_the_image_is_pinned_and_explained():
    lines = (ROOT / "launch/Dockerfile").read_text(encoding="utf-8").splitlines()
    (base,) = [line for line in lines if line.startswith("FROM ")]
    assert re.fullmatch(r"FROM nvidia/cuda:[\d.]+-\w+-ubuntu[\d.]+", base)
    starts = [n for n, line in enumerate(lines) if re.match(r"(FROM|RUN|COPY|ENV|WORKDIR|USER|ENTRYPOINT) ", line)]
    assert len(starts) >= 5 and all(lines[n - 1].startswith("# ") for n in starts), "a step without its comment"
    if shutil.which("hadolint") is not None:
        subprocess.run(["hadolint", ROOT / "launch/Dockerfile"], check=True)
