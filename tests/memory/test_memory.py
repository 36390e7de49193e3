"""Memory that is measured: live tensors, the process, and what benchmarks/memory compares."""

import json
import sys

import pytest
import torch

from benchmarks.memory import __main__ as memory
from benchmarks.memory.cases import Case, measure, save_model
from irtune.memory.measure import (
    LiveTensors,
    device_memory_bytes,
    host_memory_bytes,
    peak_host_memory_bytes,
    peak_memory_bytes,
)
from tests.support.ranks import run_ranks

MIB = 2**20
ROWS, LENGTH = 4, 64


@pytest.mark.quick
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_live_tensors_are_counted_once_and_until_they_are_gone(device):
    known = torch.empty(1000, device=device)
    with LiveTensors([known]) as live:
        first = torch.empty(256, device=device)
        view, again = first[:10], known.view(10, 100)
        assert live.now == live.peak == 1024
        second = first * 2
        assert live.now == 2048
        del first
        assert live.now == 2048  # the view holds it
        del view
        assert (live.now, live.peak) == (1024, 2048)
        live.reset_peak()
        del second
        assert (live.now, live.peak) == (0, 1024)
    del again


@pytest.mark.quick
def test_live_tensors_see_the_backward_pass():
    weight = torch.nn.Parameter(torch.ones(100, 100))
    with LiveTensors([weight]) as live:
        x = torch.ones(50, 100)
        loss = (x @ weight).tanh().sum()
        assert live.now == 4 * (50 * 100 + 50 * 100 + 1)  # the input, the output of tanh, and the sum
        loss.backward()
        del loss
        assert live.now == 4 * (50 * 100 + 100 * 100)  # the input and the gradient


@pytest.mark.quick
def test_the_memory_of_the_process_is_what_it_takes():
    before = host_memory_bytes()
    block = torch.ones(64 * MIB // 4)
    assert 60 * MIB < host_memory_bytes() - before < 80 * MIB
    peak = peak_host_memory_bytes()
    assert peak >= host_memory_bytes() - 4 * MIB  # the system updates the two at different times
    del block
    assert host_memory_bytes() - before < 16 * MIB
    assert peak_memory_bytes(torch.device("cpu")) == peak_host_memory_bytes() >= peak
    assert device_memory_bytes(torch.device("cpu")) is None


# ----- the benchmark, in its quick form -----


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    save_model(folder, "small", "cpu")
    return folder


@pytest.fixture(scope="module")
def measured(small):
    """What was measured, by system, quantisation and whether there was checkpointing."""
    found = {}

    def at(*case):
        if case not in found:
            (found[case],) = run_ranks(measure, 1, small, Case(*case, ROWS, LENGTH), "cpu")
        return found[case]

    return at


@pytest.mark.parametrize("case", [("ir", "none", False), ("full", "none", True), ("ir", "nf4", True)])
def test_the_plan_agrees_with_what_is_measured(measured, case):
    row = measured(*case)
    assert row["activations"] == pytest.approx(row["planned_activations"], rel=1e-4)  # but for a few numbers
    assert row["optimizer"] == row["planned_optimizer"]
    assert row["gradients"] == row["planned_gradients"]
    assert 0.9 < row["peak"] / row["planned_peak"] < 1.1
    assert row["peak"] < 1.1 * row["planned_beforehand"]


def test_ir_tuning_needs_less_than_the_trainer(measured):
    ours, theirs = measured("ir", "nf4", True), measured("trainer", "nf4", True)
    assert max(len(layers) for layers in ours["selected"]) < 6
    assert max(ours["optimizer"]) < 0.7 * theirs["optimizer"][0]
    assert ours["gradients"] < 0.7 * theirs["gradients"]
    assert ours["activations"] < 0.7 * theirs["activations"]  # which keeps hidden states in fp32
    assert ours["peak"] < 0.8 * theirs["peak"]


@pytest.mark.slow
def test_the_benchmark_writes_results_and_keeps_those_of_other_cases(tmp_path, monkeypatch, capsys):
    file = tmp_path / "out.json"
    file.write_text(json.dumps({"cases": [{"case": "lean, nf4", "system": "lean", "error": "no memory"}]}))
    arguments = ["--device", "cpu", "--only", "ir, none, checkpointing", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", ["memory.py", *arguments])
    assert memory.main() == 1  # one case has failed
    written = json.loads(file.read_text())
    assert (written["device"], written["shape"], written["rows"]) == ("cpu", "small", 4)
    failed, row = written["cases"]
    assert failed["error"] == "no memory" and row["peak"] > row["weights"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert "| lean, nf4 | no memory | | | | | | |" in lines
    (line,) = [line for line in lines if line.startswith("| ir, none, checkpointing |")]
    assert f"{row['peak'] / row['planned_peak']:.1%}" in line


@pytest.mark.quick
def test_the_table_compares_with_the_trainer():
    def row(system, peak, **more):
        return {"case": f"{system}, nf4", "system": system, "weights": 0, "activations": 0, "peak": peak} | more

    lines = memory.table([row("ir", 3 * 2**30, planned_peak=4 * 2**30), row("trainer", 6 * 2**30)]).splitlines()
    assert lines[2] == "| ir, nf4 | 0.0 | 0.0 | 3,072.0 | 4,096.0 | 75.0% | 50% |  |"
    assert lines[3] == "| trainer, nf4 | 0.0 | 0.0 | 6,144.0 |  |  | 100% |  |"
