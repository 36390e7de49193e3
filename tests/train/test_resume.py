"""Runs that go on, or must not: invariant 7 of docs/design.md, and which checkpoints are kept."""

import itertools
import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest

from irtune.config import Config
from irtune.errors import CheckpointError
from irtune.evaluation import metrics as evaluation
from irtune.train import run as run_module
from irtune.train.checkpoint import OPTIMIZER, TRAINABLE, read_tensors
from irtune.train.resume import check_same_run
from irtune.train.run import run
from tests.support.ranks import run_ranks
from tests.support.runs import bare, launch, losses, records, selections, train
from tests.support.tiny import tiny_config


@pytest.mark.parametrize(
    ("stage", "state"), [(2, "offload"), (2, "drop"), (3, "offload"), pytest.param(3, "drop", marks=pytest.mark.slow)]
)
def test_interrupt_and_resume_is_no_interruption(llama, corpus, tmp_path, stage, state):
    options = {"tuning__deselected_state": state, "tuning__interval": 1, "run__eval_every": 2, "run__keep_last": 9}
    whole = launch(tiny_config(llama, corpus, tmp_path / "whole", stage, **options), 2)
    # The same run, cut after step 4: what a kill leaves behind, records of later steps included.
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints/step_6")
    shutil.rmtree(cut / "adapter")
    (cut / "checkpoints/latest").write_text("step_4")
    best = json.loads((cut / "checkpoints/step_4/state.json").read_text())["progress"]["best_step"]
    (cut / "checkpoints/best").write_text(f"step_{best}")
    launch(tiny_config(llama, corpus, cut, stage, **options), 2)
    assert losses(cut) == losses(whole)
    assert selections(cut) == selections(whole)
    for file in ("trainable.safetensors", "optimizer.safetensors"):
        assert (cut / "checkpoints/step_6" / file).read_bytes() == (whole / "checkpoints/step_6" / file).read_bytes()
    assert (cut / "predictions.jsonl").read_text() == (whole / "predictions.jsonl").read_text()


def test_resume_under_other_ranks_and_stages(llama, corpus, base, tmp_path):
    for world, accumulation, stage in ((1, 4, 0), (4, 1, 3)):
        cut = tmp_path / f"cut{world}"
        shutil.copytree(base, cut)
        shutil.rmtree(cut / "checkpoints/step_6")
        (cut / "checkpoints/latest").write_text("step_3")
        (cut / "checkpoints/best").write_text("step_3")
        launch(tiny_config(llama, corpus, cut, stage, optim__gradient_accumulation_steps=accumulation), world)
        assert losses(cut) == pytest.approx(losses(base), rel=1e-5)
        assert selections(cut) == selections(base)


def test_a_finished_run_is_not_trained_again(llama, corpus, base, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(base, again)
    launch(tiny_config(llama, corpus, again, optim__gradient_accumulation_steps=2), 2)
    assert losses(again) == losses(base)
    assert (again / "predictions.jsonl").read_text() == (base / "predictions.jsonl").read_text()


def test_a_finished_run_that_is_asked_for_more_goes_on(llama, corpus, tmp_path):
    folder = launch(tiny_config(llama, corpus, tmp_path / "run", optim__max_steps=4), 1)
    before = losses(folder)
    launch(tiny_config(llama, corpus, folder, optim__max_steps=8), 1)
    assert losses(folder)[:4] == before and len(losses(folder)) == 8
    rates = [record["lr"] for record in records(folder, "train")]
    assert rates[3:] == pytest.approx([0.01 / 4, *(0.01 * (1 - step / 8) for step in range(4, 8))])
    results = json.loads((folder / "results.json").read_text())
    assert results["steps"] == 8 and results["training_seconds"] < results["wall_seconds"]
    shorter = run_ranks(train, 1, tiny_config(llama, corpus, folder, optim__max_steps=6))
    assert "optim.max_steps was 8 and is 6" in shorter[0]


def test_what_a_run_started_from_is_not_read_again(llama, corpus, base, tmp_path):
    start = shutil.copytree(base, tmp_path / "start")
    config = tiny_config(llama, corpus, tmp_path / "run", optim__max_steps=2, model__start_from=start)
    before = losses(launch(config, 1))
    shutil.rmtree(start)
    after = losses(launch(tiny_config(llama, corpus, tmp_path / "run", optim__max_steps=3, model__start_from=start), 1))
    assert after[:2] == before and len(after) == 3


@pytest.mark.quick
def test_a_key_that_a_checkpoint_does_not_know_had_its_default():
    now = {"model": dict(vars(Config().model)), "seed": 0}
    old = {"model": {key: value for key, value in now["model"].items() if key != "pooling"}, "seed": 0}
    check_same_run(old, now, Path("step_1"))
    old["model"]["start_from"] = "runs/elsewhere"  # which the checkpoint has overwritten
    check_same_run(old, now, Path("step_1"))
    now["model"]["pooling"] = "mean"
    with pytest.raises(CheckpointError, match=r"model\.pooling was 'class' and is 'mean'"):
        check_same_run(old, now, Path("step_1"))


@pytest.mark.quick
def test_results_go_only_when_there_is_an_engine_to_make_new_ones(tmp_path, monkeypatch):
    results, world = tmp_path / "results.json", Mock(is_main=True)
    results.write_text("{}")
    monkeypatch.setattr(run_module, "build", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        run_module._train(Mock(), world, tmp_path)
    assert results.exists()
    there = []
    trainer = Mock()
    trainer.run.side_effect = lambda: there.append(results.exists()) or 1 / 0
    monkeypatch.setattr(run_module, "build", Mock(return_value=trainer))
    with pytest.raises(ZeroDivisionError):
        run_module._train(Mock(), world, tmp_path)
    assert there == [False]


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_own_weights_are_saved_only_once_they_trained_and_come_back(llama, corpus, tmp_path, stage):
    options = {"adapter__type": "none", "tuning__method": "cyclic", "tuning__order": "ascending", "run__keep_last": 9,
               "run__eval_every": 2, "model__dtype": "bfloat16"}  # fmt: skip
    whole = launch(tiny_config(llama, corpus, tmp_path / "whole", stage, **options), 2)
    for step, layers in ((2, {0}), (4, {0, 1}), (6, {0, 1, 2})):
        saved = read_tensors(whole / f"checkpoints/step_{step}", TRAINABLE)
        assert {int(name.split(".")[2]) for name in saved if ".layers." in name} == layers
        moments = read_tensors(whole / f"checkpoints/step_{step}", OPTIMIZER)
        assert {int(name.split(".")[2]) for name in moments if ".layers." in name} == layers  # parked ones too
        assert all(any(name.startswith(f"{own}/") for name in moments) for own in saved)
        assert {name.rpartition("/")[2] for name in moments} == {"exp_avg", "exp_avg_sq", "master"}
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints/step_6")
    (cut / "results.json").unlink()
    (cut / "checkpoints/latest").write_text("step_4")
    best = json.loads((cut / "checkpoints/step_4/state.json").read_text())["progress"]["best_step"]
    (cut / "checkpoints/best").write_text(f"step_{best}")
    launch(tiny_config(llama, corpus, cut, stage, **options), 2)
    assert losses(cut) == losses(whole)


def train_with_the_first_evaluation_best(config):
    """Train as if dev accuracy only ever fell."""
    counter = itertools.count()
    with pytest.MonkeyPatch.context() as patch, bare():
        falling = lambda *args: evaluation.metrics(*args) | {"accuracy": 1 / (1 + next(counter))}  # noqa: E731
        patch.setattr("irtune.train.trainer.metrics", falling)
        run(config)


@pytest.mark.parametrize("stage", [2, 3])
def test_layers_that_first_trained_after_the_best_step_are_what_they_were(llama, corpus, tmp_path, stage):
    """The best checkpoint of own weights lacks them: results must be those of that step all the same."""
    config = tiny_config(llama, corpus, tmp_path / "run", stage, adapter__type="none", tuning__method="cyclic",
                         tuning__order="ascending", run__eval_every=2, run__best_metric="accuracy")  # fmt: skip
    run_ranks(train_with_the_first_evaluation_best, 2, config)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert (results["best_step"], results["steps"], results["layers_ever_trained"]) == (2, 6, 3)
    best, *_, last = (r for r in records(tmp_path / "run", "eval") if r["split"] == "dev")
    assert results["dev"]["loss"] == pytest.approx(best["loss"], rel=1e-6)
    assert results["dev"]["loss"] != pytest.approx(last["loss"], rel=1e-3)


def test_another_run_in_the_folder_is_not_continued(llama, corpus, base, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    content = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    options = {"optim__gradient_accumulation_steps": 2}
    error, _ = run_ranks(train, 2, tiny_config(llama, corpus, copy, optim__lr=0.5, **options))
    assert "optim.lr was 0.01 and is 0.5" in error
    error, _ = run_ranks(train, 2, tiny_config(llama, corpus, copy, adapter__r=2, **options))
    assert "adapter.r was 4 and is 2" in error
    error, _ = run_ranks(train, 2, tiny_config(llama, corpus, copy, run__resume="never", **options))
    assert "holds a run already" in error
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == content


def test_save_every_counts_on_evaluation_steps_too(llama, corpus, tmp_path):
    options = {"run__save_every": 2, "run__eval_every": 1, "run__keep_last": 9, "optim__lr": 1e-9}
    folder = launch(tiny_config(llama, corpus, tmp_path / "run", **options), 1)  # so small a rate: step 1 stays best
    steps = {path.name for path in (folder / "checkpoints").glob("step_*")}
    assert {"step_1", "step_2", "step_4", "step_6"} <= steps
    assert "step_3" not in steps


def test_pruning_keeps_the_best_and_the_newest(llama, corpus, tmp_path):
    options = {"run__eval_every": 1, "run__keep_last": 1, "optim__lr": 1e-9}
    folder = launch(tiny_config(llama, corpus, tmp_path / "run", **options), 1)
    best = json.loads((folder / "results.json").read_text())["best_step"]
    assert {path.name for path in (folder / "checkpoints").glob("step_*")} == {"step_6", f"step_{best}"}


def test_going_back_to_an_earlier_checkpoint(llama, corpus, base, tmp_path):
    back, elsewhere = tmp_path / "back", tmp_path / "elsewhere"
    shutil.copytree(base, back)
    for folder in (back, elsewhere):
        earlier = str(back / "checkpoints/step_3")
        if folder == back and not Path(earlier).is_dir():
            pytest.fail("step_3 should be kept")
        options = {"optim__gradient_accumulation_steps": 2, "run__resume": earlier}
        launch(tiny_config(llama, corpus, folder, **options), 2)
        assert losses(folder)[-3:] == losses(base)[-3:]
        results = json.loads((folder / "results.json").read_text())
        assert (folder / f"checkpoints/step_{results['best_step']}").is_dir()
        assert (folder / "checkpoints/latest").read_text() == "step_6"


def test_a_full_disk_is_one_sentence(llama, corpus, tmp_path, monkeypatch):
    config = tiny_config(llama, corpus, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("a file where a folder must be")
    error, other = run_ranks(train, 2, config)
    assert error.startswith("OutputError: cannot write")
    assert other is not None
