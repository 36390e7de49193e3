"""Whole runs on real processes: invariants 2, 3 and 8 of docs/design.md, and the files of a run."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from irtune.engine import Engine
from tests.support.ranks import run_cases, run_ranks
from tests.support.runs import launch, losses, records, selections, train
from tests.support.tiny import Rig, tiny_config


@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (4, 1)])
def test_any_split_over_ranks_and_accumulation_is_the_same_run(llama, corpus, base, tmp_path, world, accumulation):
    config = tiny_config(llama, corpus, tmp_path / "run", optim__gradient_accumulation_steps=accumulation)
    folder = launch(config, world)
    assert selections(folder) == selections(base)
    assert losses(folder) == pytest.approx(losses(base), rel=1e-5)


def _gradients(model, sizes):
    """Of the mean loss over eight examples in micro-batches of `sizes`, averaged over them, and the mean itself."""
    rig = Rig(model, 0, accumulation=len(sizes))
    rig.engine.reselect([0, 3])
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(4, 60, (8, 9), generator=generator), torch.randint(0, 3, (8,), generator=generator)
    first, loss = 0, 0.0
    for size in sizes:
        part = slice(first, first + size)
        batch = {"input_ids": ids[part], "attention_mask": torch.ones_like(ids[part]), "labels": labels[part]}
        loss += float(rig.engine.forward_backward(batch, size * len(sizes) / 8)) / len(sizes)
        first += size
        if first < 8:
            rig.engine.step(0.0)
    trained = [parameter for layer in (0, 3) for _, parameter in rig.table.layers[layer]]
    gradients = [parameter.grad.flatten().tolist() for parameter in trained]
    rig.close()
    return loss, gradients


def test_micro_batches_of_unequal_size_make_the_gradient_of_the_mean_over_examples(llama):
    whole, parts = (run_ranks(_gradients, 1, llama, sizes)[0] for sizes in ((8,), (1, 5, 2)))
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    for one, other in zip(parts[1], whole[1], strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-4, atol=1e-6)


def test_micro_batches_by_tokens_do_not_depend_on_the_split(llama, corpus, tmp_path):
    found = []
    for world in (1, 2):
        config = tiny_config(llama, corpus, tmp_path / f"run{world}", optim__micro_batch_tokens=160, run__log_every=1,
                             optim__gradient_accumulation_steps=2 // world, data__max_length=64)  # fmt: skip
        folder = launch(config, world)
        found.append((losses(folder), selections(folder)))
    (one, chosen), (two, others) = found
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=1e-4, atol=1e-5)
    assert others == chosen and len(one) > 3
    results = json.loads((folder / "results.json").read_text())
    assert 0 < results["examples_per_step"] != 8


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
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


@pytest.mark.slow
def test_without_padding_a_run_is_the_same(gpt2, corpus, tmp_path):
    """On the same examples: a step's only micro-batch is sorted by length, or not."""
    kinds = [(0, "false", "false"), (0, "true", "false"), (3, "true", "true")]
    configs = [
        tiny_config(gpt2, corpus, tmp_path / f"run{number}", stage, optim__max_steps=4, data__padding_free=packed,
                    data__length_bucket=1, model__gradient_checkpointing=recomputed)
        for number, (stage, packed, recomputed) in enumerate(kinds)
    ]  # fmt: skip
    assert run_cases(train, 1, [(config,) for config in configs]) == [[None]] * 3
    padded, *others = (tmp_path / f"run{number}" for number in range(3))
    for other in others:
        assert losses(other) == pytest.approx(losses(padded), rel=1e-5)
        assert selections(other) == selections(padded)
        assert records(other, "train")[0]["padding_share"] == 0 < records(padded, "train")[0]["padding_share"]


def test_the_files_of_a_run(base, corpus):
    expected = {"config.yaml", "metrics.jsonl", "selection.jsonl", "results.json", "predictions.jsonl", "adapter",
                "checkpoints", "tensorboard", "predictions_test.jsonl", "logs"}  # fmt: skip
    assert {path.name for path in base.iterdir()} == expected
    results = json.loads((base / "results.json").read_text())
    for key in ("steps", "wall_seconds", "examples_per_second", "world_size", "zero_stage", "peak_memory_bytes",
                "peak_host_memory_bytes", "optimizer_state_bytes", "parked_state_bytes", "versions"):  # fmt: skip
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


def test_the_adapter_reproduces_the_metrics_in_a_fresh_process(llama, corpus, tmp_path):
    dtypes = ("float32", "bfloat16")
    runs = [launch(tiny_config(llama, corpus, tmp_path / dtype, model__dtype=dtype), 2) for dtype in dtypes]
    words = [str(word) for pair in zip(runs, dtypes) for word in pair]
    command = [sys.executable, "-m", "tests.support.reload_adapter", llama, corpus, *words]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for folder, answer, tolerance in zip(
        runs, answers, (1e-4, 1e-3), strict=True
    ):  # bf16 rounds other batches otherwise
        results = json.loads((folder / "results.json").read_text())
        assert answer["accuracy"] == pytest.approx(results["dev"]["accuracy"], abs=1e-4)
        predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        for ours, line in zip(answer["probabilities"], predictions, strict=True):
            assert ours == pytest.approx(list(line["probabilities"].values()), abs=tolerance)


def plain_deepspeed(config, lr):
    """Method full without irtune's engine: deepspeed.initialize and peft LoRA on the same micro-batches."""
    import deepspeed

    from irtune.adapters.build import add_adapters
    from irtune.data import BatchSampler, Encoder, collate, read_corpus
    from irtune.distributed import runtime
    from irtune.models import load_classifier

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    world = runtime.read_world()
    runtime.start(world, 60)
    runtime.seed_everything(config.run.seed, deterministic=False)
    corpus = read_corpus(config.data)
    classifier = load_classifier(config.model, corpus.labels)
    encoder = Encoder(classifier.tokenizer, config.data, corpus.labels)
    encoded = [encoder.encode(example) for example in corpus.splits["train"]]
    plan = BatchSampler([len(e["input_ids"]) for e in encoded], 4, world.size, config.run.seed)
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


def training_modes(config):
    """The error of a run, and for each micro-batch whether all modules were in training mode."""
    seen = []
    original = Engine.forward_backward

    def forward_backward(self, batch, weight):
        seen.append(all(module.training for module in self.module.modules()))
        return original(self, batch, weight)

    Engine.forward_backward = forward_backward
    return train(config), seen


@pytest.mark.parametrize("method", ["full", "ir"])
def test_every_step_is_made_in_training_mode(llama, corpus, tmp_path, method):
    options = {"tuning__method": method, "optim__max_steps": 4, "run__eval_every": 2, "run__save_every": 2}
    config = tiny_config(llama, corpus, tmp_path / "run", **options)
    assert run_ranks(training_modes, 1, config) == [(None, [True] * 4)]  # from_pretrained gives a model to evaluate


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_checkpointing_changes_memory_and_nothing_else(llama, corpus, base, tmp_path, stage):
    config = tiny_config(llama, corpus, tmp_path / "run", stage, optim__gradient_accumulation_steps=2,
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


def test_the_reference_preset_scores_trained_layers_only(llama, corpus, tmp_path):
    folder = launch(tiny_config(llama, corpus, tmp_path / "run", tuning__preset="reference", tuning__interval=1), 2)
    lines = [json.loads(line) for line in (folder / "selection.jsonl").read_text().splitlines()]
    assert lines[0]["scores"] is None and len(lines[0]["selected"]) == 3
    for earlier, later in itertools.pairwise(lines):
        assert [layer for layer, score in enumerate(later["scores"]) if score is not None] == earlier["selected"]
