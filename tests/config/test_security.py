"""What docs/security.md promises: no code but the user's choice, no path out, no secret shown, no open port."""

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from irtune.cli import main
from irtune.config import Config, ModelConfig, write_config
from irtune.data.readers.hub import hub_splits
from irtune.errors import DataError, ModelError
from irtune.models import load_classifier
from tests.commands.test_bad_input import finish
from tests.support import ROOT
from tests.support.bad_input import CASES
from tests.support.bad_input.models import own_code
from tests.support.ranks import free_port, run_ranks
from tests.support.tiny import save_model, tiny_config

quick = pytest.mark.quick
TOKEN = "hf_ThisIsNoRealToken0123456789abcdef"
PASSWORD = "correct-horse-battery"


# ----- code -----


def load_with_code(folder: Path, trust: bool) -> str:
    """Load a model that brings code; the error, and whether the code ran."""
    from transformers import dynamic_module_utils

    dynamic_module_utils.HF_MODULES_CACHE = str(folder.parent / "modules")
    sys.path.insert(0, dynamic_module_utils.HF_MODULES_CACHE)
    with pytest.raises(ModelError) as caught:  # also when trusted: the code is no model
        load_classifier(ModelConfig(name_or_path=str(folder), trust_remote_code=trust), ["x", "y"])
    return str(caught.value)


@pytest.mark.parametrize("trust", [False, True])
def test_code_of_a_model_runs_only_when_asked(tmp_path, trust):
    model = save_model(tmp_path / "model", layers=1)
    own_code("config.json")(model)
    own_code("tokenizer_config.json")(model)
    assert run_ranks(load_with_code, 1, model, trust)
    assert (tmp_path / "executed").exists() == trust
    assert ModelConfig().trust_remote_code is False and ModelConfig().allow_pickle is False


def test_a_run_folder_does_not_decide_that_code_may_run(llama, tmp_path, capsys):
    folder = finish(tmp_path, llama, "lora")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for risk in ("trust_remote_code", "allow_pickle"):
        asks = config | {"model": config["model"] | {risk: True}}
        (folder / "config.yaml").write_text(yaml.safe_dump(asks))
        (tmp_path / "in.jsonl").write_text('{"before": "a", "after": "b"}\n')
        command = ["predict", "--run", str(folder), "--input", str(tmp_path / "in.jsonl"), "--output", "-"]
        assert main(command) == 2
        assert f"add --{risk} to the command" in capsys.readouterr().err
        assert main([*command, f"--{risk}"]) == 0
        assert "predicted" in capsys.readouterr().out


@quick
def test_a_corpus_with_a_loading_script_is_refused_by_the_hub_client(tmp_path, monkeypatch):
    script = tmp_path / "someone/corpus/corpus.py"
    script.parent.mkdir(parents=True)
    script.write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="neither a file, a folder nor a hub dataset"):
        hub_splits("someone/corpus")
    assert not (tmp_path / "executed").exists()


RUNNERS = {"eval", "exec", "compile", "__import__", "system", "popen"}
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@quick
@pytest.mark.parametrize("file", sorted((ROOT / "irtune").rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_nothing_in_irtune_unpickles_or_evaluates(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not UNPICKLERS & {name.split(".")[0] for name in names}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in RUNNERS and called not in ("torch.load", "yaml.load", "os.system", "os.popen")
            assert not any(option.arg == "shell" for option in node.keywords)
            assert not any(o.arg == "allow_pickle" and ast.unparse(o.value) == "True" for o in node.keywords)


# ----- secrets -----


def train_with_a_token(config: Config, log: Path) -> None:
    """A run whose environment has a token; everything it prints goes to `log`."""
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ.update(HF_TOKEN=TOKEN, HUGGING_FACE_HUB_TOKEN=TOKEN, HTTPS_PROXY=f"http://me:{PASSWORD}@proxy:1")
    from irtune.train.run import run

    run(config)


def test_no_token_of_the_environment_is_in_anything_that_a_run_writes(llama, corpus, tmp_path):
    config = tiny_config(llama, corpus, tmp_path / "run", stage=0)
    run_ranks(train_with_a_token, 1, config, tmp_path / "log")
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any("tfevents" in path.name and b"micro_batch_size" in content for path, content in written.items())
    assert b"loss" in written[tmp_path / "log"] and b"micro_batch_size" in written[tmp_path / "run/config.yaml"]
    for path, content in written.items():
        assert TOKEN.encode() not in content and PASSWORD.encode() not in content, path


@quick
def test_a_configuration_made_in_python_is_saved_without_its_password(tmp_path):
    config = Config(model=ModelConfig(name_or_path=f"https://me:{PASSWORD}@host/model"))
    config.data.drop_labels = [TOKEN]
    write_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert PASSWORD not in text and TOKEN not in text and "https://me:***@host/model" in text


@quick
@pytest.mark.parametrize(
    "option",
    [f"--model.name_or_path=https://me:{PASSWORD}@host/model", f"--data.path=https://host/c.csv?token={PASSWORD}",
     f"--run.output_dir={TOKEN}", f"--data.token={TOKEN}", f"--optim.lr={TOKEN}", TOKEN, f"--{TOKEN}",
     f"--config={TOKEN}"],
    ids=range(8),
)  # fmt: skip
def test_no_secret_is_repeated_in_a_message(option, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data.path=x", option]) == 2
    said = "".join(capsys.readouterr())
    assert "error" in said and PASSWORD not in said and TOKEN not in said
    assert not list(tmp_path.iterdir())


@quick
@pytest.mark.parametrize("command", ["evaluate", "predict", "stats"])
def test_no_secret_of_an_input_is_repeated(command, llama, tmp_path, capsys, monkeypatch):
    def refuse(name: str) -> None:
        raise ConnectionError(f"no way to {name}")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    address = f"https://me:{PASSWORD}@host/rows"
    run = ["--run", str(finish(tmp_path, llama, "lora"))]
    given = {
        "evaluate": ["evaluate", *run, "--data", address],
        "predict": ["predict", *run, "--input", f"{address}.jsonl", "--output", "-"],
        "stats": ["data", "stats", "--data", address],
    }[command]
    assert main(given) == 2
    said = "".join(capsys.readouterr())
    assert "***" in said and PASSWORD not in said


# ----- ports -----


def listeners(port: int) -> set[str]:
    """Addresses on which somebody listens at `port`, as the kernel writes them."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if Path(table).exists() else ():
            address, number = line.split()[1].split(":")
            if int(number, 16) == port and line.split()[3] == "0A":
                found.add(address)
    return found


LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


def test_tensorboard_of_the_launch_script_listens_on_loopback_only(tmp_path):
    """The script with its environment replaced by this one; the server is the real one."""
    wanted = (ROOT / "requirements.txt").read_text()
    requirements = subprocess.run(["cksum"], input=wanted, capture_output=True, text=True, check=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / ".irtune-requirements").write_text(requirements.stdout)
    server = tmp_path / "bin/tensorboard"
    server.write_text(f'#!/bin/sh\nexec {sys.executable} -m tensorboard.main "$@"\n')
    server.chmod(0o755)
    (tmp_path / "run/tensorboard").mkdir(parents=True)
    port = free_port()
    command = ["bash", str(ROOT / "launch/tensorboard.sh"), str(tmp_path / "run"), "--port", str(port)]
    process = subprocess.Popen(command, env={**os.environ, "IRTUNE_VENV": str(tmp_path)}, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not listeners(port) and time.monotonic() < until:
            assert process.poll() is None, "TensorBoard did not start"
            time.sleep(0.1)
        assert listeners(port) and listeners(port) <= LOOPBACK
    finally:
        process.terminate()
        process.wait(20)


@quick
def test_no_launch_script_opens_a_port_to_others():
    texts = {path: path.read_text() for path in (ROOT / "launch").rglob("*") if path.suffix in (".sh", ".py", ".yaml")}
    assert len(texts) > 5
    for path, text in texts.items():
        assert not re.search(r"bind_all|0\.0\.0\.0|--host[ =](?!localhost|127\.0\.0\.1)", text), path


# ----- the page -----


@quick
def test_every_promise_names_tests_that_exist():
    text = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    table = text[: text.index("## What is not promised")]
    promises = re.findall(r"^\| (?!promise)(.+) \| (.+) \|$", table, re.MULTILINE)
    assert len(promises) >= 10
    for promise, tests in promises:
        named = re.findall(r"([\w/]+\.py): (\w+)", tests)
        rows = re.findall(r'"([^"]+)"', tests)
        assert named or rows, promise
        for file, function in named:
            assert f"def {function}(" in (ROOT / "tests" / file).read_text(), f"{file}: {function}"
        for row in rows:
            assert row in CASES, row
