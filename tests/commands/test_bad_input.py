"""The table of bad inputs: each gives one clear message or is handled, and leaves no trace."""

import contextlib
import io
import json
import os
import re
import traceback
from pathlib import Path

import pytest
import torch

from irtune.adapters import write_adapter
from irtune.adapters.build import add_adapters
from irtune.cli import main
from irtune.config import ModelConfig, write_config
from irtune.models import load_classifier
from tests.support.bad_input import CASES, SECTIONS
from tests.support.bad_input.case import Box
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config

pytestmark = pytest.mark.quick
LABELS = ["x", "y"]


def finish(folder: Path, llama: Path, kind: str) -> Path:
    """The folder of a finished run, as far as prediction needs it, without the training."""
    config = tiny_config(llama, folder, folder / "run", adapter__type=kind, adapter__size=8)
    classifier = load_classifier(ModelConfig(name_or_path=str(llama), dtype="float32"), LABELS)
    torch.manual_seed(0)
    model, table = add_adapters(classifier, config.adapter)
    target = folder / "run"
    if kind == "lora":
        model.save_pretrained(target / "adapter")
    else:
        write_adapter(target / "adapter", {name: p.data for name, p in table.all()}, config.adapter, LABELS)
    write_config(config, target / "config.yaml")
    results = {"steps": 1, "dev": {"per_class": {name: {"f1": 0.0} for name in LABELS}}}
    (target / "results.json").write_text(json.dumps(results))
    return target


@pytest.fixture(scope="session")
def finished(llama, tmp_path_factory) -> dict[str, Path]:
    return {kind: finish(tmp_path_factory.mktemp(kind), llama, kind) for kind in ("lora", "bottleneck")}


def attempt(case: str, box: Box) -> tuple[object, str, str, list[str], float]:
    """Make the input and start its command: exit status, output, errors, files that changed, growth in MiB."""
    arguments = CASES[case].build(box)
    before, start = box.snapshot(), peak_mib(reset=True)
    out, err = io.StringIO(), io.StringIO()
    here = Path.cwd()
    os.chdir(box.folder)  # what is written to no named place, lands there
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status: object = main(arguments)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        status = traceback.format_exc()
    finally:
        os.chdir(here)
    after = box.snapshot()
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return status, out.getvalue(), err.getvalue(), changed, peak_mib(reset=False) - start


def peak_mib(*, reset: bool) -> float:
    """Largest memory of this process since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.fixture(scope="session")
def boxes(llama, finished, tmp_path_factory):
    """An empty box for a case."""
    return lambda: Box(tmp_path_factory.mktemp("box"), llama, finished["lora"], finished["bottleneck"])


def attempts(cases: dict[str, Box]) -> dict[str, tuple]:
    return {name: attempt(name, box) for name, box in cases.items()}


@pytest.fixture(scope="session")
def measured(boxes):
    """Boxes and outcomes of the cases with a limit, all in one fresh process, where little memory can be reused."""
    limited = sorted((case for case in CASES.values() if case.most_mib is not None), key=lambda case: case.most_mib)
    cases = {case.name: boxes() for case in limited}
    (outcomes,) = run_ranks(attempts, 1, cases)
    return {name: (box, outcomes[name]) for name, box in cases.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_input(name, boxes, request):
    case = CASES[name]
    if case.most_mib is None:
        box = boxes()
        status, out, err, changed, _ = attempt(name, box)
    else:
        box, (status, out, err, changed, grown) = request.getfixturevalue("measured")[name]
        assert grown <= case.most_mib, f"grew by {grown:.0f} MiB"
    assert status == (0 if case.handled else 2), f"{status}\n{err}"
    assert "Traceback" not in out + err
    assert not changed, f"written before everything was checked, or outside run.output_dir, or executed: {changed}"
    if case.handled:
        case.check(out, box)
    else:
        assert wanted(case.told).search(err), f"not said: {case.told}\n{err}"
        assert len(err) < 10_000
    assert "pass4word" not in out + err and "hf_AbCd" not in out + err


def wanted(told: str) -> re.Pattern[str]:
    return re.compile(".*?".join(re.escape(part.strip()) for part in told.split("...")), re.DOTALL)


def test_no_two_cases_have_one_name():
    assert len(CASES) == sum(map(len, SECTIONS.values()))
    assert len(CASES) >= 60
