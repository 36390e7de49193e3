"""benchmarks/gpu_day.sh, rehearsed on the simulated device: that it runs, not what it would measure."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile

import pytest

from benchmarks.gpu.check import CASES, Runs, common, row_of, verdict
from benchmarks.gpu.slim import slim
from irtune.config import load_config
from tests.support import ROOT
from tests.support.simulated.client import needs_compiler


@pytest.mark.quick
def test_the_cases_are_runs_that_irtune_accepts(llama, corpus):
    assert len(CASES) == 38
    for name, case in CASES.items():
        assert case.equals in {"", *CASES}, name
        for options in (case.options, case.then or []):
            load_config([*common(llama, corpus), *options])


@pytest.mark.quick
def test_a_case_is_told_from_what_it_must_equal(tmp_path):
    runs = Runs.__new__(Runs)
    runs.folder = tmp_path
    for name, loss, selected in (("cpu fp32", 1.5, [1]), ("fp32 zero2", 1.501, [1]), ("bf16 zero2", 1.4, [2])):
        folder = runs.place(name)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1, "loss": loss}) + "\n")
        (folder / "selection.jsonl").write_text(json.dumps({"selected": selected}) + "\n")
    ended = {"cpu fp32", "fp32 zero2", "bf16 zero2"}
    good = row_of(runs, "fp32 zero2", None, 3.0, ended)
    assert good["good"] and verdict(good).endswith("as cpu fp32 (loss 1.0e-03, selections equal)")
    runs.place("bf16 zero2").rename(runs.place("bf16 zero1"))
    assert row_of(runs, "fp32 zero2", None, 3.0, {"fp32 zero2"})["good"]  # nothing to compare with
    (runs.place("fp32 zero2") / "selection.jsonl").write_text('{"selected": [2]}\n')
    bad = row_of(runs, "fp32 zero2", None, 3.0, ended)
    assert not bad["good"] and "DIFFERS from cpu fp32" in verdict(bad)
    assert "out of memory" in verdict(row_of(runs, "dora", "out of memory", 3.0, ended))


@pytest.mark.quick
def test_a_wheel_loses_the_libraries_of_other_versions(tmp_path):
    wheel = tmp_path / "package-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for name in ("package/lib_cuda130.so", "package/lib_cuda118.so", "package/lib_cpu.so", "package/__init__.py"):
            file.writestr(name, name)
        file.writestr("package-1.dist-info/RECORD", "")
    (tmp_path / "slim").mkdir()
    with zipfile.ZipFile(slim(wheel, tmp_path / "slim", "cuda130")) as file:
        left = ["package/lib_cuda130.so", "package/lib_cpu.so", "package/__init__.py"]
        assert file.namelist() == [*left, "package-1.dist-info/RECORD"]
        record = file.read("package-1.dist-info/RECORD").decode().splitlines()
    assert [line.split(",")[0] for line in record] == [*left, "package-1.dist-info/RECORD"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_rehearsal(tmp_path_factory, tmp_path):
    environment = os.environ | {
        "OUT": str(tmp_path), "PY": sys.executable, "SHAPE": "small", "LITTLE": "small", "TOKENS": "32", "ROWS": "2",
        "SIDES": "ac", "ALL_SIDES": "abf", "ROUNDS": "1", "STEPS": "3", "MEMORY": "ir, none", "WORKERS": "2",
        "FACTS": "--size 64 --megabytes 1", "CHECK_ONLY": "cpu fp32,fp32 zero2", "CHECK_SECONDS": "300",
        "SECONDS_IN_ALL": "1500", "PATIENCE": "9", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1",
        "FAKE_CUDA_CACHE": str(tmp_path_factory.getbasetemp()),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests/support/simulated/site"))),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "benchmarks/gpu_day.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    summary = (tmp_path / "summary.txt").read_text()
    assert done.returncode == 0, summary + done.stderr
    for phase in ("environment", "correctness", "models written", "speed-small", "memory-ir-none", "nf4-run"):
        assert f"{phase}: exit 0" in summary, summary
    assert "as cpu fp32" in summary and "2 cases, 0 not as wanted" in summary
    with tarfile.open(tmp_path / "results.tgz") as kept:
        names = {name.removeprefix("./") for name in kept.getnames()}
        assert {"speed-small.json", "memory.json", "check/check.json", "correctness.log"} <= names
        speed = json.load(kept.extractfile("./speed-small.json"))
    assert speed["host_waits_between_log_lines"] == "none"  # of a device whose debug mode does nothing
