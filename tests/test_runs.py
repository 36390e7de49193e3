"""Whole runs on real processes: invariants 1, 2, 3, 7 and 8 of docs/design.md, and the files of a run."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from irtune import evaluation
from irtune.app import run
from irtune.checkpoint import OPTIMIZER, TRAINABLE, read_tensors
from irtune.engine import Engine
from irtune.trainer import Trainer
from tests.ranks import run_ranks
from tests.runs import launch, losses, records, selections, train
from tests.test_engine import expected_bytes
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def base(llama, corpus, tmp_path_factory) -> Path:
    """2 ranks x 2 accumulation steps under ZeRO 2: what other splits and stages must equal."""
    config = tiny_config(llama, corpus, tmp_path_factory.mktemp("base") / "run", optim__gradient_accumulation_steps=2)
    return launch(config, 2)


@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (4, 1)])
def test_any_split_over_ranks_and_accumulation_is_the_same_run(llama, corpus, base, tmp_path, world, accumulation):
    config = tiny_config(llama, corpus, tmp_path / "run", optim__gradient_accumulation_steps=accumulation)
    folder = launch(config, world)
    assert selections(folder) == selections(base)
    assert losses(folder) == pytest.approx(losses(base), rel=1e-5)


def test_dropout_does_not_depend_on_the_split_either(llama, corpus, tmp_path):
    folders = [
        launch(
            tiny_config(llama, corpus, tmp_path / f"run{world}", adapter__dropout=0.3, optim__max_steps=3,
                        optim__gradient_accumulation_steps=2 // world), world)
        for world in (1, 2)
    ]  # fmt: skip
    assert losses(folders[0]) == pytest.approx(losses(folders[1]), rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_stages_agree(llama, corpus, base, tmp_path, stage):
    config = tiny_config(llama, corpus, tmp_path / "run", stage, optim__gradient_accumulation_steps=2)
    folder = launch(config, 2)
    assert selections(folder) == selections(base)
    assert losses(folder) == pytest.approx(losses(base), rel=1e-4)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_other_architectures_agree_over_splits_and_stages(request, corpus, tmp_path, kind):
    model = request.getfixturevalue(kind)
    folders = []
    for world, accumulation, stage in ((2, 2, 2), (1, 4, 0), (4, 1, 3)):
        config = tiny_config(
            model, corpus, tmp_path / f"run{world}", stage, optim__gradient_accumulation_steps=accumulation
        )
        folders.append(launch(config, world))
    for folder in folders[1:]:
        assert selections(folder) == selections(folders[0])
        assert losses(folder) == pytest.approx(losses(folders[0]), rel=1e-4)


def test_the_files_of_a_run(base, corpus):
    expected = {"config.yaml", "metrics.jsonl", "selection.jsonl", "results.json", "predictions.jsonl", "adapter",
                "checkpoints", "tensorboard", "predictions_test.jsonl"}  # fmt: skip
    assert {path.name for path in base.iterdir()} == expected
    results = json.loads((base / "results.json").read_text())
    for key in ("steps", "wall_seconds", "examples_per_second", "world_size", "zero_stage", "peak_memory_bytes",
                "peak_host_memory_bytes", "optimizer_state_bytes", "versions"):  # fmt: skip
        assert key in results
    assert json.loads((base / "checkpoints/step_6/state.json").read_text())["versions"] == results["versions"]
    state = results["optimizer_state_bytes_at_selections"]
    assert 0 < state["min"] <= state["mean"] <= state["max"]
    # Planned before the model was loaded; a test's processes share imports, so only the order is right here.
    assert 0.3 < results["planned_memory_bytes"] / results["peak_memory_bytes"] < 3
    assert (results["world_size"], results["zero_stage"], results["steps"]) == (2, 2, 6)
    for split, examples in (("dev", 20), ("test", 15)):
        assert {"accuracy", "macro_f1", "auprc", "per_class", "confusion_matrix"} <= set(results[split])
        assert results[split]["examples"] == examples == sum(map(sum, results[split]["confusion_matrix"]))
    predictions = [json.loads(line) for line in (base / "predictions.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (corpus / "dev.jsonl").read_text().splitlines()]
    assert [(p["id"], p["label"]) for p in predictions] == [(row["id"], row["label"]) for row in rows]
    right = sum(p["label"] == p["predicted"] for p in predictions) / len(predictions)
    assert results["dev"]["accuracy"] == pytest.approx(right)
    assert all(sum(p["probabilities"].values()) == pytest.approx(1, abs=1e-4) for p in predictions)
    scores = [json.loads(line) for line in (base / "selection.jsonl").read_text().splitlines()]
    assert [record["step"] for record in scores] == [0, 2, 4]  # none after the last step
    assert all(len(record["scores"]) == 6 and None not in record["scores"] for record in scores)
    assert [record["step"] for record in records(base, "train")] == [1, 2, 3, 4, 5, 6]
    assert len(records(base, "eval")) == 3
    assert list((base / "tensorboard").glob("events.out.tfevents.*"))


def test_tensorboard_has_the_scalars(base):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(base / "tensorboard"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    assert {"train/loss", "train/learning_rate", "speed/tokens_per_second", "dev/macro_f1"} <= tags
    assert {f"layer_score/{layer:02d}" for layer in range(6)} <= tags
    assert {f"layer_trained/{layer:02d}" for layer in range(6)} <= tags
    assert any(tag.startswith("memory/") for tag in tags)
    assert {"configuration/text_summary", "plan/text_summary"} <= set(board.Tags()["tensors"])
    plan = board.Tensors("plan/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "memory planned per rank under ZeRO 2" in plan and "optimizer state" in plan
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(losses(base), rel=1e-6)


def test_a_written_configuration_runs_again(base, tmp_path):
    values = yaml.safe_load((base / "config.yaml").read_text())
    assert values["optim"]["gradient_accumulation_steps"] == 2
    from irtune.config import load_config

    again = load_config(["--config", str(base / "config.yaml"), "--run.output_dir", str(tmp_path / "again")])
    assert losses(launch(again, 2)) == losses(base)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_adapter_reproduces_the_metrics_in_a_fresh_process(llama, corpus, tmp_path, dtype):
    base = launch(tiny_config(llama, corpus, tmp_path / "run", model__dtype=dtype), 2)
    command = [sys.executable, "-m", "tests.reload_adapter", base, llama, corpus, dtype]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    results = json.loads((base / "results.json").read_text())
    assert answer["accuracy"] == pytest.approx(results["dev"]["accuracy"], abs=1e-4)
    predictions = [json.loads(line) for line in (base / "predictions.jsonl").read_text().splitlines()]
    for ours, line in zip(answer["probabilities"], predictions, strict=True):
        assert ours == pytest.approx(list(line["probabilities"].values()), abs=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("state", ["offload", "drop"])
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


def plain_deepspeed(config, lr):
    """Method full without irtune's engine: deepspeed.initialize and peft LoRA on the same micro-batches."""
    import deepspeed

    from irtune import runtime
    from irtune.adapters import add_adapters
    from irtune.data import BatchPlan, Encoder, collate, read_corpus
    from irtune.models import load_classifier

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    world = runtime.read_world()
    runtime.start(world, 60)
    runtime.seed_everything(config.run.seed, deterministic=False)
    corpus = read_corpus(config.data)
    classifier = load_classifier(config.model, corpus.labels)
    encoder = Encoder(classifier.tokenizer, config.data, corpus.labels)
    encoded = [encoder.encode(example) for example in corpus.splits["train"]]
    plan = BatchPlan([len(e["input_ids"]) for e in encoded], 4, world.size, config.run.seed)
    model, _ = add_adapters(classifier, config.adapter)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0),
        config={"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}, "gradient_clipping": 1.0,
                "zero_allow_untested_optimizer": True},
    )  # fmt: skip
    found = []
    for step in range(6):
        mine = plan.step(step)[world.rank]
        pad = classifier.tokenizer.pad_token_id
        batch = collate([encoded[i] for i in mine], pad, [corpus.splits["train"][i].label for i in mine])
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        found.append(float(runtime.all_reduce(loss.detach()) / world.size))
    runtime.stop()
    return found


def test_method_full_is_plain_deepspeed_with_lora(llama, corpus, tmp_path):
    config = tiny_config(llama, corpus, tmp_path / "run", tuning__method="full", optim__schedule="constant")
    folder = launch(config, 2)
    assert losses(folder) == pytest.approx(run_ranks(plain_deepspeed, 2, config, config.optim.lr)[0], rel=1e-6)
    assert selections(folder) == [[0, 1, 2, 3, 4, 5]]


def train_and_watch(config):
    """Train; for each stretch between selections: the layers chosen, those that moved, state bytes, and parameters.

    What moved is read from whole weights, before the next selection and at the end.
    """
    seen = []
    reselect, finish = Engine.reselect, Trainer.finish

    def layers(engine):
        whole = engine.trainable()
        return [{name: whole[name] for name, _ in layer} for layer in engine.table.layers], {
            name: whole[name] for name, _ in engine.table.head
        }

    def close_stretch(engine):
        if seen:
            now, before = layers(engine)[0], seen[-1].pop("weights")
            pairs = enumerate(zip(before, now))
            seen[-1]["moved"] = [i for i, (a, b) in pairs if any(not torch.equal(a[name], b[name]) for name in a)]

    def watched_reselect(engine, selected):
        close_stretch(engine)
        reselect(engine, selected)
        weights, head = layers(engine)
        trained = [*head.values(), *(tensor for layer in selected for tensor in weights[layer].values())]
        seen.append({"selected": selected, "weights": weights, "bytes": engine.optimizer_state_bytes(),
                     "numel": sum(tensor.numel() for tensor in trained)})  # fmt: skip

    def watched_finish(trainer, folder):
        close_stretch(trainer.engine)
        return finish(trainer, folder)

    Engine.reselect, Trainer.finish = watched_reselect, watched_finish
    try:
        run(config)
    finally:
        Engine.reselect, Trainer.finish = reselect, finish
    return seen


def assert_selection_engages(stretches, stage, dtype, may_stand_still=False):
    for stretch in stretches:
        moved, selected = stretch["moved"], stretch["selected"]
        assert set(moved) <= set(selected) if may_stand_still else moved == selected
        assert stretch["bytes"] in expected_bytes(stage, dtype, stretch["numel"], 2, len(selected) + 1)


VARIANTS = {
    "reference preset": {"tuning__preset": "reference"},
    "stale": {"tuning__scores": "stale", "tuning__ema": 0.5, "tuning__num_splits": 2},
    "global": {"tuning__score": "global"},
    "weight": {"tuning__score": "weight"},
    "cosine": {"tuning__score": "cosine"},
    "rst": {"tuning__method": "rst", "tuning__budget": 0.34},
    "lisa": {"tuning__method": "lisa", "tuning__budget": 2},
    "cyclic": {"tuning__method": "cyclic", "tuning__budget": 2, "tuning__order": "descending"},
    "topk": {"tuning__method": "topk", "tuning__budget": 2},
    "grass": {"tuning__method": "grass", "tuning__budget": 2},
    "ist": {"tuning__method": "ist", "tuning__budget": 2, "optim__max_steps": 12},
    "full": {"tuning__method": "full"},
    "fixed": {"tuning__method": "fixed", "tuning__layers": "1,4-5"},
    "spectrum": {"tuning__method": "spectrum", "tuning__budget": 2},
    "ir with a budget": {"tuning__budget": 3},
    "bf16": {"model__dtype": "bfloat16"},
    "bf16 adapters": {"model__dtype": "bfloat16", "adapter__dtype": "model"},
    "checkpointing": {"model__gradient_checkpointing": "true"},
    "instruction": {"data__prompt": "instruction"},
    "targets": {"adapter__target_modules": "[q_proj, v_proj]"},
}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("stage", [2, 3])
def test_variants_train(llama, corpus, tmp_path, variant, stage):
    config = tiny_config(llama, corpus, tmp_path / "run", stage, **VARIANTS[variant])
    masters = config.adapter.dtype == "model" and config.model.dtype != "float32"
    first, second = run_ranks(train_and_watch, 2, config)
    assert [stretch["moved"] for stretch in first] == [stretch["moved"] for stretch in second]
    assert_selection_engages(first, stage, "bfloat16" if masters else "float32")
    assert all(0 < loss < 10 for loss in losses(tmp_path / "run"))
    once = config.tuning.method in ("fixed", "spectrum", "full")
    assert len(first) == 1 if once else len(first) >= 3
    most = 6 if config.tuning.method == "full" else 5
    assert all(1 <= len(chosen) <= most for chosen in selections(tmp_path / "run"))


TYPES = {
    "dora": {},
    "rslora": {},
    "pissa": {},
    "bottleneck": {"adapter__size": 8, "adapter__dropout": 0.1},
    "bottleneck parallel": {"adapter__size": 8, "adapter__placement": "parallel", "adapter__activation": "relu"},
    "bitfit": {},
    "prefix": {"adapter__num_tokens": 3},
    "none": {},
    "none with embeddings": {"adapter__embeddings": "true", "tuning__method": "lisa"},
    "ltuning-prefix": {"adapter__num_tokens": 2},
    "spafit": {"tuning__method": "spafit"},
    "spafit with ir": {"adapter__strata": "[1, 3]"},
    "bitfit in bf16": {"model__dtype": "bfloat16"},
    "none in bf16": {"model__dtype": "bfloat16"},
    "none with ist": {"tuning__method": "ist", "tuning__budget": 2, "optim__max_steps": 12},
    "prefix with ist": {"tuning__method": "ist", "tuning__budget": 2, "optim__max_steps": 12},
}


@pytest.mark.parametrize(
    ("name", "stage"),
    [*itertools.product(TYPES, (2, 3)), ("none", 0), ("none", 1), ("none in bf16", 0), ("none in bf16", 1)],
    ids=lambda value: str(value).replace(" ", "-"),
)
def test_types_of_adapters_train(llama, corpus, tmp_path, name, stage):
    options = {"adapter__type": name.split()[0]} | TYPES[name]
    config = tiny_config(llama, corpus, tmp_path / "run", stage, **options)
    bf16 = config.model.dtype == "bfloat16"
    first, second = run_ranks(train_and_watch, 2, config)
    assert [stretch["moved"] for stretch in first] == [stretch["moved"] for stretch in second]
    # In bf16 a small step may round away in the weight itself; the master remembers it.
    assert_selection_engages(first, stage, "bfloat16" if bf16 else "float32", may_stand_still=bf16)
    assert any(stretch["moved"] for stretch in first)
    assert all(0 < loss < 20 for loss in losses(tmp_path / "run"))
    if config.tuning.method == "spafit":
        assert [stretch["selected"] for stretch in first] == [[1, 2, 3, 4, 5]]
    if "strata" in str(options):
        assert all(0 not in stretch["selected"] for stretch in first)


@pytest.mark.parametrize("kind", ["prompt", "ltuning-prompt"])
@pytest.mark.parametrize("stage", [2, 3])
def test_types_outside_the_layers_train(llama, corpus, tmp_path, kind, stage):
    config = tiny_config(llama, corpus, tmp_path / "run", stage, adapter__type=kind, adapter__num_tokens=3)
    folder = launch(config, 2)
    first, last = (read_tensors(folder / f"checkpoints/step_{step}", TRAINABLE) for step in (3, 6))
    assert all(not torch.equal(first[name], last[name]) for name in first)
    assert all("layers." not in name for name in first)
    results = json.loads((folder / "results.json").read_text())
    assert results["layers_trained_per_step"] == 0
    numel = sum(tensor.numel() for tensor in first.values())
    assert results["optimizer_state_bytes"] in expected_bytes(stage, "float32", numel, 2, 1)


@pytest.mark.parametrize("stage", [1, 2, 3])
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
    with pytest.MonkeyPatch.context() as patch:
        falling = lambda *args: evaluation.metrics(*args) | {"accuracy": 1 / (1 + next(counter))}  # noqa: E731
        patch.setattr("irtune.trainer.metrics", falling)
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


def test_checkpointing_changes_memory_and_nothing_else(llama, corpus, base, tmp_path):
    for stage in (2, 3):
        config = tiny_config(llama, corpus, tmp_path / f"run{stage}", stage, optim__gradient_accumulation_steps=2,
                             model__gradient_checkpointing="true")  # fmt: skip
        folder = launch(config, 2)
        assert selections(folder) == selections(base)
        assert losses(folder) == pytest.approx(losses(base), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim__micro_batch_size": 40}, "larger than the training split of 64"),
        ({"data__path": "no/such/place/x.jsonl"}, "no file"),
        ({"model__name_or_path": "./nothing"}, "there is no folder './nothing'"),
        ({"adapter__target_modules": "[query]"}, "'query' matches no linear module .* self_attn.q_proj"),
        ({"run__resume": "elsewhere"}, "run.resume is 'elsewhere'"),
        ({"model__dtype": "float16", "adapter__dtype": "model"}, "needs a GPU"),
        ({"run__output_dir": "/proc/nowhere"}, "cannot write to '/proc/nowhere'"),
    ],
)
def test_user_errors_stop_all_ranks_before_anything_is_written(llama, corpus, tmp_path, options, message):
    import re

    config = tiny_config(llama, corpus, tmp_path / "run", **options)
    for error in run_ranks(train, 2, config):
        assert error is not None and re.search(message, error)
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_tokenizer(llama, corpus, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(llama, bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    (error,) = run_ranks(train, 1, tiny_config(bare, corpus, tmp_path / "run"))
    assert error.startswith("ModelError: model.name_or_path: no tokenizer can be loaded")


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


def test_the_reference_preset_scores_trained_layers_only(llama, corpus, tmp_path):
    folder = launch(tiny_config(llama, corpus, tmp_path / "run", tuning__preset="reference", tuning__interval=1), 2)
    lines = [json.loads(line) for line in (folder / "selection.jsonl").read_text().splitlines()]
    assert lines[0]["scores"] is None and len(lines[0]["selected"]) == 3
    for earlier, later in itertools.pairwise(lines):
        assert [layer for layer, score in enumerate(later["scores"]) if score is not None] == earlier["selected"]


def test_a_full_disk_is_one_sentence(llama, corpus, tmp_path, monkeypatch):
    config = tiny_config(llama, corpus, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("a file where a folder must be")
    error, other = run_ranks(train, 2, config)
    assert error.startswith("OutputError: cannot write")
    assert other is not None
