"""The plan: counted, not guessed; exact where it says so."""

import json

import pytest
import torch

from irtune.adapters import add_adapters
from irtune.cli import main
from irtune.config import AdapterConfig, Config, DataConfig, ModelConfig, TuningConfig
from irtune.models import load_classifier
from irtune.planner import count, estimate, state_bytes, worst_selection
from tests.ranks import run_ranks
from tests.tiny import Rig

SELECTIONS = [[1, 2], [2, 3], [0, 5], [1, 2, 4], [5], [0, 1, 2, 3, 4, 5]]


def config_for(model, **adapter) -> Config:
    return Config(
        model=ModelConfig(name_or_path=str(model), dtype="float32"),
        adapter=AdapterConfig(**({"r": 4} | adapter)),
        data=DataConfig(path="x", labels=["a", "b", "c"], max_length=32),
    )


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["lora", "dora", "bottleneck", "bitfit", "none", "spafit"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_counts_are_those_of_the_real_model(request, architecture, kind):
    folder = request.getfixturevalue(architecture)
    dtype = "model" if kind in ("none", "bitfit", "spafit") else "float32"
    config = config_for(folder, type=kind, dtype=dtype)
    parts = count(config)
    model, table = add_adapters(load_classifier(config.model, ["a", "b", "c"]), config.adapter)
    assert parts.layers == [[parameter.numel() for _, parameter in layer] for layer in table.layers]
    assert parts.head == [parameter.numel() for _, parameter in table.head]
    trained = {id(parameter) for _, parameter in table.all()}
    # peft keeps the untrained head beside the trained one; the plan builds it in the same way.
    constant = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in trained)
    assert parts.linear + parts.rest == constant


def measured_bytes(model, stage, dtype):
    rig = Rig(model, stage, dtype)
    found = []
    for selected in SELECTIONS:
        rig.engine.reselect(selected)
        found.append(rig.engine.optimizer_state_bytes())
    rig.close()
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("world", "dtype"), [(1, "float32"), (2, "float32"), (2, "bfloat16"), (4, "float32")])
def test_optimizer_state_is_planned_to_the_byte(llama, stage, world, dtype):
    parts = count(config_for(llama))
    each = 2 if dtype == "bfloat16" else 4
    wanted = [
        state_bytes([*(parts.layers[i] for i in layers), parts.head], stage, world, each) for layers in SELECTIONS
    ]
    assert run_ranks(measured_bytes, world, llama, stage, dtype) == [wanted] * world


@pytest.mark.quick
def test_activations_are_what_autograd_keeps_on_a_real_forward_pass(llama):
    """Apart from the attention, whose kernel differs on a CPU: a model with tiny heads has little of it."""
    config = config_for(llama)
    parts = count(config, [2, 3])
    model, table = add_adapters(load_classifier(config.model, ["a", "b", "c"]), config.adapter)
    table.set_trainable([2, 3])
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}
    holders = []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            holders.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(input_ids=torch.randint(5, 50, (1, 32)))
    assert parts.activations == pytest.approx(sum(kept.values()), rel=0.1)
    assert count(config, [0, 5]).activations > count(config, [4, 5]).activations > count(config, [5]).activations


@pytest.mark.quick
def test_the_worst_selection_starts_at_the_lowest_layer():
    assert worst_selection(Config(tuning=TuningConfig(method="ir")), 30) == [0, *range(11, 30)]  # .65 of 30
    assert worst_selection(Config(tuning=TuningConfig(method="lisa")), 30) == [0, 29]
    assert worst_selection(Config(tuning=TuningConfig(method="full")), 4) == [0, 1, 2, 3]


@pytest.mark.quick
def test_estimates_add_up_and_scale(llama):
    config = config_for(llama)
    parts = count(config)

    def at(**changes):
        options = {"stage": 2, "quantization": "none", "world": 2, "selected": [0, 5], "memory": None} | changes
        return estimate(parts, config, **options)

    one = at()
    assert one.total == one.base + one.adapters + one.gradients + one.optimizer + one.activations
    assert one.fits is None and one.largest_micro_batch is None
    assert at(quantization="nf4").base < at(quantization="int8").base < one.base
    assert at(stage=3, world=4).base < at(stage=3, world=2).base < one.base
    assert at(stage=0).optimizer == 8 * sum(parts.head + parts.layers[0] + parts.layers[5])
    assert at(selected=range(6)).optimizer == at().optimizer_full
    assert at(world=1).sent_per_step == 8 * 6  # only the scores
    roomy = at(memory=2**40)
    assert roomy.fits and roomy.largest_micro_batch > 1000
    assert not at(memory=2**30).fits and at(memory=2**30).largest_micro_batch == 0


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "billions", "layers"),
    [("llama3.1-8b", 7.5, 32), ("deepseek-r1-distil-8b", 7.5, 32), ("llama2-13b", 12.85, 40), ("mistral-7b", 7.11, 32),
     ("qwen3-8b", 7.57, 36), ("phi-2", 2.65, 32), ("meta-llama/Llama-3.1-70B", 69.5, 80)],
)  # fmt: skip
def test_presets_need_no_download(name, billions, layers, capsys):
    assert main(["plan", "--model.name_or_path", name, "--gpus", "8", "--gpu-memory", "80GiB", "--json"]) == 0
    rows = {(row["stage"], row["quantization"]): row for row in json.loads(capsys.readouterr().out)}
    assert rows[2, "none"]["base"] == pytest.approx(2e9 * billions, rel=0.02)
    assert rows[3, "none"]["base"] == pytest.approx(2e9 * billions / 8, rel=0.02)
    assert (3, "nf4") not in rows
    assert rows[2, "none"]["fits"] == (billions < 30)


@pytest.mark.quick
def test_mistakes_are_reported_together(capsys):
    assert main(["plan", "--gpus", "0", "--zero", "5", "--gpu-memory", "much"]) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in ("--gpus is '0'", "--zero is '5'", "--gpu-memory is 'much'", "80GiB"))
    assert main(["plan", "--adapter.type", "prompt"]) == 2
    assert "not planned" in capsys.readouterr().err
