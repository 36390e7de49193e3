"""benchmarks/speed: that it compares what it says it does. Its figures are nobody's promise."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import __main__ as speed
from benchmarks.speed import before_after
from benchmarks.speed import report as speed_report
from benchmarks.speed import worker as speed_worker
from benchmarks.speed.matrix_products import LinearShape, Matrices, ModelShape, Step, flops, products, shape_of
from benchmarks.speed.turns import Clock, Turn, chosen_steps, counted, spread
from irtune.adapters.build import add_adapters
from irtune.config import AdapterConfig, ModelConfig
from irtune.models import load_classifier
from tests.support import ROOT
from tests.support.ranks import run_ranks
from tests.support.tiny import save_model

TINY = ModelShape(2, (LinearShape(4, 6, 2, leads=True), LinearShape(6, 4, 0, leads=False)), heads=1, head_size=4)


# ----- side f -----

FORWARD = 2 * (3 * 4 * 6 + 3 * 6 * 4 + 3 * 4 * 2 + 3 * 2 * 6 + 3 * 4 * 3 + 3 * 3 * 4)  # a layer, 3 tokens
ATTENTION_BACKWARD = 2 * 4 * 3 * 4 * 3
SECOND = 2 * 3 * 4 * 6  # gradient of the second module's input


@pytest.mark.quick
@pytest.mark.parametrize(
    ("selected", "backward"),
    [
        ((), 0),
        # The upper layer only: its first module gets the gradients of A and B, and of what lies between them.
        ((1,), ATTENTION_BACKWARD + SECOND + 2 * (3 * 6 * 2 + 6 * 3 * 2 + 2 * 3 * 4)),
        # The lower one too: in the upper one the input's gradient goes on through base and adapter.
        ((0, 1), 2 * (ATTENTION_BACKWARD + SECOND + 2 * (3 * 6 * 2 + 6 * 3 * 2 + 2 * 3 * 4)) + 2 * 3 * (6 * 4 + 2 * 4)),
        # The lower one alone: the upper one's adapter passes gradients on and has none of its own.
        (
            (0,),
            2 * (ATTENTION_BACKWARD + SECOND)
            + 2 * (3 * 6 * 2 + 6 * 3 * 2 + 2 * 3 * 4)
            + 2 * 3 * (6 * 4 + 6 * 2 + 2 * 4),
        ),
    ],
)
def test_products_are_those_of_a_hand_count(selected, backward):
    assert flops(TINY, Step(1, 3, selected, (0, 1))) == 2 * FORWARD + backward


@pytest.mark.quick
def test_updates_that_are_zero_need_no_products():
    lora = 2 * (3 * 4 * 2 + 3 * 2 * 6)  # forward, of the lower layer
    both, upper = (flops(TINY, Step(1, 3, (1,), adapted)) for adapted in ((0, 1), (1,)))
    assert both - upper == lora
    # Above the lowest trained layer, the gradient need not pass an update that is zero either.
    both, lower = (flops(TINY, Step(1, 3, (0,), adapted)) for adapted in ((0, 1), (0,)))
    assert both - lower == lora + 2 * (3 * 6 * 2 + 3 * 2 * 4)


@pytest.mark.quick
def test_every_product_is_run_at_its_size():
    step = Step(2, 3, (1,), (0, 1))
    matrices = Matrices(TINY, torch.float32, torch.device("cpu"), own=True)
    results = [call() for call in matrices.prepared(step)]
    wanted = [(p.batch, p.m, p.n) if p.what == "attention" else (p.m, p.n) for p in products(TINY, step)]
    assert [tuple(result.shape) for result in results] == wanted
    assert {result.dtype for result in results} == {torch.float32}
    assert len(matrices.turn([step, step], warm_up=1)) == 2


def test_shapes_are_read_off_the_model(tmp_path):
    classifier = load_classifier(ModelConfig(name_or_path=str(save_model(tmp_path / "m")), dtype="float32"), ["a", "b"])
    model, table = add_adapters(classifier, AdapterConfig(r=4, target_modules=["q_proj", "down_proj"]))
    shape = shape_of(model, table)
    assert (shape.layers, shape.heads, shape.head_size) == (6, 4, 8)
    q, k, v, o, gate, up, down = shape.linears
    assert q == LinearShape(32, 32, 4, leads=True)
    assert k == v == LinearShape(32, 16, 0, leads=True)
    assert o == LinearShape(32, 32, 0, leads=False)
    assert gate == up == LinearShape(32, 64, 0, leads=False)
    assert down == LinearShape(64, 32, 4, leads=False)


# ----- turns -----


@pytest.mark.quick
def test_the_steps_of_a_turn_stand_for_the_epoch():
    sizes = list(range(100))
    chosen = spread(sizes, 10, 0.5, seed=1)
    assert sorted(chosen) == [5, 15, 25, 35, 45, 55, 65, 75, 85, 95]
    assert chosen != sorted(chosen)
    assert sorted(spread(sizes, 4, 0.999, seed=0)) == [24, 49, 74, 99]
    epoch = [[[i, i]] for i in range(100)]
    steps = chosen_steps(epoch, sizes, warm_up=2, steps=10, turn=0)
    assert steps[0] == [[99, 99]] and steps[1] == [[50, 50]]
    assert sorted(batches[0][0] for batches in steps[2:]) == sorted(chosen)
    other = chosen_steps(epoch, sizes, warm_up=2, steps=10, turn=1)
    assert not {batches[0][0] for batches in steps[2:]} & {batches[0][0] for batches in other[2:]}


@pytest.mark.quick
def test_the_clock_times_the_steps_after_the_warm_up():
    clock = Clock(torch.device("cpu"))
    for warm_up in (0, 2):
        clock.begin(warm_up, steps=3)
        started = time.perf_counter()
        for number in range(warm_up + 3):
            time.sleep(0.05 if number < warm_up else 0.02)
            clock.tick()
        turn, total = clock.turn(), time.perf_counter() - started
        assert len(turn.seconds) == 3 and 0.06 <= sum(turn.seconds) <= total - warm_up * 0.05
        assert 0 <= turn.cpu_seconds < sum(turn.seconds)
    clock.begin(1, steps=3)
    clock.tick()
    with pytest.raises(AssertionError, match="did not make all steps"):
        clock.turn()


@pytest.mark.quick
def test_tokens_are_counted_with_and_without_padding():
    turn = counted(Turn([1.0, 1.0]), [[[0, 1], [2, 2]], [[1, 1], [0, 0]]], [3, 5, 7])
    assert (turn.examples, turn.tokens, turn.padded_tokens) == (8, 3 + 5 + 14 + 10 + 6, 10 + 14 + 10 + 6)
    assert counted(Turn([1.0]), [[[0, 1]]], [3, 5], width=16).padded_tokens == 32


@pytest.mark.quick
def test_ratios_are_of_medians_with_the_spread_of_rounds():
    def side(letter, *rates):
        turns = [Turn([2.0], examples=int(2 * rate), tokens=8, padded_tokens=10) for rate in rates]
        return speed_report.summary(letter, turns, 2**20)

    sides = {"a": side("a", 10, 20, 30), "c": side("c", 10, 10, 5)}
    assert speed_report.ratios(sides) == {"a/c": {"ratio": 2.0, "median_of_rounds": 2.0, "low": 1.0, "high": 6.0}}
    assert sides["a"]["padding_share"] == pytest.approx(0.2)
    assert sides["a"]["tokens_per_second"] == 4.0


# ----- the whole -----


def _work(job: str) -> int:
    return speed_worker.work(argparse.Namespace(worker=job))


def run_here(file: Path, *arguments: str) -> tuple[dict, list[str]]:
    """`benchmarks/speed --quick` with its processes forked, which saves their imports; the JSON, and the command."""
    commands = []

    def launched(command: list[str], **options: Any) -> subprocess.CompletedProcess:
        commands.append(command)
        ranks = [int(part.partition("=")[2]) for part in command if part.startswith("--nproc_per_node=")] or [1]
        assert run_ranks(_work, ranks[0], command[-1]) == [0] * ranks[0]
        return subprocess.CompletedProcess(command, 0)

    argv = ["speed.py", "--quick", "--device", "cpu", "--output", str(file), "--starts", "0", "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*argv, *arguments, "--model.dtype", "float32"])
        patch.setattr(speed.subprocess, "run", launched)
        assert speed.main() == 0
    return json.loads(file.read_text()), commands[0]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The JSON of a quick run of all sides, and the picture."""
    file = tmp_path_factory.mktemp("speed") / "speed.json"
    result, command = run_here(file, "--profile", "e", "--sides", "abcdefgh")
    assert command[0] == sys.executable and command[1].endswith("speed/__main__.py")
    return result, file.with_suffix(".png")


@pytest.mark.slow
def test_all_sides_ran_on_as_many_examples(quick):
    result, _ = quick
    sides = result["sides"]
    assert list(sides) == list("abcdefgh")
    for letter, side in sides.items():
        assert len(side["rounds"]) == 2
        for entry in side["rounds"]:
            assert entry["examples"] == 8 * entry["steps"] and entry["examples_per_second"] > 0
            assert letter == "f" or 0.05 < entry["cpu_share"] < 1.5  # more: autograd's own threads
            assert entry["steps"] == len(entry["step_seconds"]) == (2 if letter == "d" else 4)
            assert sum(entry["step_seconds"]) == pytest.approx(
                entry["examples"] / entry["examples_per_second"], rel=0.01
            )
    peaks = {letter: side["peak_memory_bytes"] for letter, side in sides.items()}
    assert peaks["f"] is None and 0 < peaks["a"] < peaks["b"] and 0 < peaks["c"] < peaks["d"]
    assert sides["d"]["padding_share"] > sides["c"]["padding_share"]
    assert sides["h"]["padding_share"] == 0 < sides["a"]["padding_share"]
    assert sides["f"]["rounds"][0]["tokens"] == sides["a"]["rounds"][0]["tokens"]


@pytest.mark.slow
def test_the_bare_loop_sees_the_same_batches_and_losses(quick):
    sides = quick[0]["sides"]
    for ours, bare in zip(sides["b"]["rounds"], sides["e"]["rounds"]):
        assert len(set(bare["digests"])) > 2  # different batches, warm-up and timed
        assert ours["digests"] == bare["digests"]
        assert len(bare["losses"]) == 5
        assert ours["losses"] == pytest.approx(bare["losses"], rel=1e-4)
    assert len(set(sides["e"]["rounds"][0]["losses"])) == 5
    # irtune ir saw them too, and trained fewer layers.
    assert sides["a"]["rounds"][0]["digests"][-5:] == sides["e"]["rounds"][0]["digests"]
    assert all(0 < len(layers) < 6 for layers in sides["a"]["rounds"][0]["selected"])


@pytest.mark.slow
def test_the_file_has_every_figure(quick):
    result, picture = quick
    assert set(result["ratios"]) == set(speed_report.PAIRS)
    for entry in result["ratios"].values():
        assert entry["low"] <= entry["high"]
    assert result["trainer_formats"]["chosen"] == "fp32"
    matrix = result["matrix"]
    assert all(rate > 0 for rate in matrix["flops_per_second"]) and matrix["large_product_flops_per_second"] > 0
    assert result["selection"]["share_of_step_time"] == pytest.approx(
        (
            result["selection"]["seconds_scoring_step"]
            - result["selection"]["seconds_plain_step"]
            + result["selection"]["seconds_per_selection"]
        )
        / (result["selection"]["interval"] * result["sides"]["a"]["seconds_per_step"])
    )
    assert {letter: entry["examples"] for letter, entry in result["evaluation"].items()} == dict.fromkeys("abc", 16)
    assert result["host_waits_between_log_lines"] is None  # there is no device to wait for
    assert any("mm" in row["operation"] for row in result["profile"]["e"])
    for name in ("device", "threads", "ranks", "model", "corpus", "batch", "adapter", "versions", "arguments"):
        assert result[name]
    assert str(ROOT) not in json.dumps(result)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    table = speed_report.table(result)
    assert f"| a: irtune ir | {result['sides']['a']['examples_per_second']:.2f} |" in table and "| a/c |" in table


@pytest.mark.slow
def test_two_ranks_share_the_work(tmp_path):
    options = ("--ranks", "2", "--sides", "bce", "--rounds", "1", "--one-at-a-time")
    result, command = run_here(tmp_path / "two.json", *options)
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    sides = result["sides"]
    assert (result["ranks"], result["batch"]["global"]) == (2, 16)
    assert all(side["rounds"][0]["examples"] == 4 * 16 for side in sides.values())
    ours, bare = sides["b"]["rounds"][0], sides["e"]["rounds"][0]
    assert ours["digests"] == bare["digests"]
    assert ours["losses"] == pytest.approx(bare["losses"], rel=1e-4)  # gradients are averaged


STARTING = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--run.output_dir") + 1])
time.sleep(0.5)
if "--fail" in sys.argv:
    sys.exit("error: no such thing")
folder.mkdir()
(folder / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1}))
time.sleep(60)
"""


@pytest.mark.quick
def test_the_start_ends_with_the_first_step(tmp_path, capsys):
    launch = [sys.executable, "-c", STARTING]
    seconds = speed._start(launch, [], tmp_path / "run", dict(os.environ))
    assert seconds is not None and 0.5 < seconds < 20
    assert speed._start(launch, ["--fail"], tmp_path / "other", dict(os.environ)) is None
    assert "error: no such thing" in capsys.readouterr().err


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sides", "fa"], "--sides is 'fa'; accepted: some of abcdefgh, f only after a"),
        (["--model", "/nowhere"], "--model: there is no folder /nowhere"),
        (["--model", "."], "--data is None; accepted: a corpus (default: iterater in the folder IRTUNE_DATA)"),
        (["--device", "cuda"], "--device is cuda, and there is no GPU; accepted: cpu"),
        (["--shape", "x"], "--shape is 'x'; accepted: llama3.1-8b, llama3.2-1b, small"),
    ],
)
def test_mistakes_are_told(arguments, sentence, monkeypatch, capsys):
    monkeypatch.delenv("IRTUNE_DATA", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["speed.py", *arguments])
    try:
        status = speed.main()
    except SystemExit as stop:  # argparse's own way
        status = stop.code
    assert status == 2
    assert sentence in capsys.readouterr().err


# ----- before and after -----


def _result(**rates: Sequence[float]) -> dict[str, Any]:
    return {"sides": {side: {"rounds": [{"examples_per_second": one} for one in each]} for side, each in rates.items()}}


@pytest.mark.quick
def test_a_side_that_became_slower_beside_its_peers_is_named():
    before = before_after.rounds([_result(a=[6, 8, 7], c=[4, 5, 4]), _result(a=[3.1], c=[2])])
    assert before == {"a/c": [1.5, 1.6, 1.75, 1.55]}
    text, slower = before_after.table(before, {"a/c": [1.5], "a/g": [1.0]})
    assert text.endswith("| a/c | 1.575 | 1.500 | -4.8% |  |") and not slower
    text, slower = before_after.table(before, {"a/c": [1.45, 1.0, 3.0]})
    assert text.endswith("| a/c | 1.575 | 1.450 | -7.9% | slower |") and slower


def _worktrees() -> str:
    return subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.quick
@pytest.mark.parametrize("now", [True, False])
def test_the_benchmark_of_each_tree_is_called_as_it_was_then(tmp_path, monkeypatch, now):
    (tmp_path / "benchmarks/speed").mkdir(parents=True)
    if now:
        (tmp_path / "benchmarks/speed/__main__.py").touch()
    monkeypatch.setenv("IRTUNE_DATA", "corpora")
    calls = []

    def run(command, *, cwd, env, check):
        calls.append((command[1:3], cwd, env["IRTUNE_DATA"], check))
        Path(command[-1]).write_text("{}")

    monkeypatch.setattr(before_after.subprocess, "run", run)
    assert before_after.measure(tmp_path, tmp_path / "found.json", ["--sides", "ac"]) == {}
    ((program, place, data, check),) = calls
    assert program == (["-m", "benchmarks.speed"] if now else ["benchmarks/speed.py", "--recipe"])
    assert place == tmp_path and data == str(Path("corpora").resolve()) and check


@pytest.mark.quick
def test_before_and_after_are_measured_by_turns(tmp_path, monkeypatch, capsys):
    if not (ROOT / ".git").exists():
        pytest.skip("the sources are not in a git repository")
    trees, worktrees = [], _worktrees()

    def measured(tree, output, options):
        trees.append((tree == ROOT, (tree / "train.py").is_file(), options))
        return _result(a=[2.0 if tree == ROOT else 1.0], c=[1.0])

    monkeypatch.setattr(before_after, "measure", measured)
    assert before_after.main(["HEAD", "--sides", "ac"]) == 0
    assert trees == [(False, True, ["--sides", "ac"]), (True, True, ["--sides", "ac"])] * before_after.TURNS
    assert "| a/c | 1.000 | 2.000 | +100.0% |  |" in capsys.readouterr().out
    monkeypatch.setattr(before_after, "measure", lambda *_: _result(a=[1.0]))
    assert before_after.main(["HEAD", "--sides", "a"]) == 2
    assert "no ratio to compare; --sides needs one of abh and one of cdg" in capsys.readouterr().err
    assert before_after.main(["no-such-commit"]) == 2 and "'no-such-commit' cannot be" in capsys.readouterr().err
    assert before_after.main(["--sides", "ac"]) == 2 and "name the commit" in capsys.readouterr().err
    assert _worktrees() == worktrees
