"""The plan: counted, not guessed; exact where it says so."""

import dataclasses
import json
import os
import random
import re

import pytest
import torch

from benchmarks.memory.__main__ import table
from irtune.adapters import adapter_traits, add_adapters
from irtune.cli import main
from irtune.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimConfig, TuningConfig
from irtune.config.presets import MODELS
from irtune.distributed import runtime
from irtune.engine.recompute import Recompute
from irtune.errors import ModelError
from irtune.memory import count, estimate, state_bytes, worst_selection
from irtune.memory.measure import LiveTensors, host_memory_bytes
from irtune.models import RunFacts, load_classifier
from irtune.models.skeleton import SHAPES, empty_classifier
from tests.support import ROOT
from tests.support.ranks import run_ranks
from tests.support.tiny import LAYERS, Rig

OWN_FORMAT = ("none", "hft", "bitfit", "spafit")  # types whose parameters are the model's own
OUTSIDE = ("prompt", "ltuning-prompt", "dept", "ept")
KINDS = [
    "lora",
    "dora",
    "bottleneck",
    "bitfit",
    "none",
    "hft",
    "spafit",
    "prefix",
    "mam",
    "lofit",
    "sparse",
    "triadapt",
    "ltuning-prefix",
    *OUTSIDE,
]
LABELS = ["a", "b c", "d"]
ROWS, LENGTH = 3, 40


def config_for(model, kind="lora", dtype="float32", checkpointing=False, **tuning) -> Config:
    return Config(
        model=ModelConfig(name_or_path=str(model), dtype=dtype, gradient_checkpointing=checkpointing),
        adapter=AdapterConfig(type=kind, r=4, size=8, density=0.05, dtype="model" if kind in OWN_FORMAT else "float32"),
        data=DataConfig(path="x", labels=LABELS, max_length=LENGTH),
        optim=OptimConfig(micro_batch_size=ROWS),
        tuning=TuningConfig(**({"method": "full"} if kind in OUTSIDE else {}) | tuning),
    )


def real_step(network, table):
    """Bytes kept and at most alive in a real step on this CPU, and at most alive in an evaluation batch."""
    for _, parameter in table.all():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    weights = [*network.parameters(), *network.buffers()]

    def batch(rows):
        mask = torch.ones(rows, LENGTH, dtype=torch.long)
        mask[0, -3:] = 0  # a padded text: attention gets a mask
        return {"input_ids": torch.randint(5, 50, (rows, LENGTH)), "attention_mask": mask}

    with LiveTensors(weights) as live:
        logits = network.train()(**batch(ROWS)).logits
        loss = torch.nn.functional.cross_entropy(logits, torch.zeros(ROWS, dtype=torch.long))
        del logits
        kept = live.now
        loss.backward()
    with torch.no_grad(), LiveTensors(weights) as evaluation:
        network.eval()(**batch(2 * ROWS))
    return kept, live.peak, evaluation.peak


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("architecture", "dtype", "checkpointing", "off"),
    [
        ("llama", "float32", False, 0),
        ("llama", "bfloat16", True, 0),
        ("bert", "float32", True, 0),
        # CPU kernels of LayerNorm keep a row's mean and deviation in bf16, where the plan, as for GPUs, has fp32.
        ("gpt2", "bfloat16", False, 0.01),
    ],
)
def test_parameters_and_steps_are_planned_as_they_really_are(request, architecture, dtype, checkpointing, off, kind):
    config = config_for(request.getfixturevalue(architecture), kind, dtype, checkpointing)
    selected = [] if kind in OUTSIDE else [2, 3]
    if (architecture, kind) == ("gpt2", "hft"):
        with pytest.raises(ModelError, match="cannot be halved by matrix"):
            count(config, selected, device="cpu", slope=False)
        return
    parts = count(config, selected, device="cpu", slope=False)
    classifier = load_classifier(config.model, LABELS)
    classifier.run = RunFacts.of(config)
    own = {id(buffer) for buffer in classifier.model.buffers()}
    network, table = add_adapters(classifier, config.adapter)
    assert parts.layers == [[parameter.numel() for _, parameter in layer] for layer in table.layers]
    assert parts.head == [parameter.numel() for _, parameter in table.head]
    constant = set(network.parameters()) - {parameter for _, parameter in table.all()}
    # peft keeps the untrained head beside the trained one; the plan builds it in the same way.
    added = sum(buffer.nbytes for buffer in network.buffers() if id(buffer) not in own)
    added += sum(tensor.nbytes for _, tensor in table.decided())
    assert parts.constant == sum(parameter.numel() for parameter in constant) + added // parts.weight_bytes
    table.set_trainable(selected)
    traits = adapter_traits(config.adapter)
    recompute = Recompute(table.modules, reentrant=False, always=checkpointing, traits=traits)
    recompute.set_trained(selected)
    assert (parts.kept, parts.peak, parts.evaluation) == pytest.approx(real_step(network, table), rel=off, abs=0)


@pytest.mark.quick
def test_places_of_sparse_updates_are_counted(llama):
    """peft keeps those of shira outside of buffers and parameters."""
    config = config_for(llama, "shira")
    parts = count(config, [2, 3], device="cpu", slope=False)
    network, table = add_adapters(load_classifier(config.model, LABELS), config.adapter)
    constant = set(network.parameters()) - {parameter for _, parameter in table.all()}
    places = [part.shira_indices["default"] for part in network.modules() if getattr(part, "shira_indices", None)]
    assert len(places) == LAYERS * 7
    rest = sum(parameter.numel() for parameter in constant)
    assert parts.constant == rest + sum(tensor.nbytes for tensor in places) // parts.weight_bytes


@pytest.mark.quick
def test_checkpointing_counts_only_above_the_lowest_selected_layer(llama):
    def kept(lowest):
        return count(config_for(llama, checkpointing=True), [lowest, 5], slope=False).kept

    boundary = ROWS * LENGTH * 32 * 4  # the input of a layer: 32 dimensions in fp32
    assert kept(0) - kept(1) == kept(1) - kept(2) == kept(4) - kept(5) == boundary
    stored = count(config_for(llama), [0, 5], slope=False)
    assert kept(0) < stored.kept / 4
    # A step that scores all layers recomputes those that do not train, wherever they are.
    scored = count(config_for(llama), [3, 5], slope=False)
    assert 0 < scored.scoring < scored.peak < stored.peak
    assert 0 < stored.scoring < stored.peak
    assert count(config_for(llama, score="weight"), [3, 5], slope=False).scoring == 0


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["lora", "dora", "bottleneck", "prefix"])
def test_scoring_takes_no_more_than_training(llama, kind):
    for dtype in ("float32", "bfloat16"):
        for selected in ([0, 3], [1, 3, 5], [3, 4]):
            parts = count(config_for(llama, kind, dtype), selected, device="cpu", slope=False)
            assert 0 < parts.scoring <= parts.peak, (dtype, selected)


# ----- optimizer state -----

rng = random.Random(4)
SELECTIONS = [sorted(rng.sample(range(LAYERS), rng.randint(1, LAYERS))) for _ in range(50)]
WHOLE_MATRIX = bool(os.environ.get("IRTUNE_WHOLE_MATRIX"))


def states_and_memory(model, stages, dtypes):
    """For each stage (and how many selections) and format: optimizer state and host memory after each selection."""
    found = {}
    for stage, selections in stages.items():
        for dtype in dtypes:  # engines of one process share its group: it is left at the end only
            rig = Rig(model, stage, dtype)
            rows = []
            for selected in SELECTIONS[:selections]:
                rig.engine.reselect(selected)
                rig.train()  # memory is that of a run: gradients, buckets, moments that are not zero
                rows.append((rig.engine.optimizer_state_bytes(), host_memory_bytes()))
            rig.engine.close()
            found[stage, dtype] = rows
    runtime.stop()
    return found


@pytest.mark.parametrize(
    ("world", "stages"),
    # Steps of ZeRO 3, and of more ranks than cores, take seconds: fewer of them, unless all is asked for.
    [
        (1, {0: 12, 1: 12, 2: 12, 3: 2}),
        (2, {0: 5, 1: 5, 2: 5, 3: 1}),
        pytest.param(2, {0: 50, 1: 50, 2: 50, 3: 3}, marks=pytest.mark.slow),
        pytest.param(4, {0: 5, 1: 5, 2: 5, 3: 2}, marks=pytest.mark.slow),
    ],
    ids=["1", "2", "2-long", "4"],
)
def test_optimizer_state_is_planned_to_the_byte_and_memory_does_not_grow(llama, world, stages):
    many = dict.fromkeys(stages, len(SELECTIONS)) if WHOLE_MATRIX else stages
    parts = count(config_for(llama), slope=False)
    results = run_ranks(states_and_memory, world, llama, many, ["float32", "bfloat16"], timeout=1800)
    for rank, found in enumerate(results):
        for (stage, dtype), rows in found.items():
            chosen, each = SELECTIONS[: many[stage]], 2 if dtype == "bfloat16" else 4
            groups = [[*(parts.layers[layer] for layer in selected), parts.head] for selected in chosen]
            wanted = [state_bytes(group, stage, world, each) for group in groups]
            assert [state for state, _ in rows] == wanted, f"rank {rank}, ZeRO {stage}, {dtype}"
            if len(rows) == 50:  # over the last 40: in the first ones, each layer is parked for the first time
                grown = rows[-1][1] / rows[9][1] - 1
                assert grown < 0.02, f"rank {rank}, ZeRO {stage}, {dtype}: host memory grew by {grown:.1%}"


# ----- estimates -----


@pytest.mark.quick
def test_the_worst_selection_starts_at_the_lowest_layer():
    def worst(num_layers, some=None, **tuning):
        return worst_selection(Config(tuning=TuningConfig(**tuning)), some or range(num_layers), num_layers)

    assert worst(30, method="ir") == [0, *range(12, 30)]  # at most .65 of 30: 19
    assert worst(20, method="ir") == [0, *range(8, 20)]  # 13
    assert worst(30, method="ir", rule="reference") == [0, *range(11, 30)]  # its cut lies at .35 or above: 20
    assert worst(30, method="ir", budget=2) == worst(30, method="lisa") == [0, 29]
    assert worst(4, method="full") == [0, 1, 2, 3]
    assert worst(6, [4, 5], method="spafit") == [4, 5]
    assert worst(6, method="fixed", layers="2,-1") == [2, 5]
    assert worst_selection(Config(), [], 6) == []


@pytest.mark.quick
def test_estimates_add_up_and_scale(llama):
    config = config_for(llama)
    parts = count(config, [0, 5])

    def at(**changes):
        return estimate(parts, config, **{"stage": 2, "quantization": "none", "world": 2} | changes)

    one = at()
    fixed = one.base + one.adapters + one.gradients + one.optimizer + one.buffers
    assert one.total == fixed + one.activations == fixed + max(parts.peak, parts.scoring)
    assert one.fits is None and one.largest_micro_batch is None
    assert at(quantization="nf4").base < one.base and at(quantization="int8").base < one.base
    assert at(stage=3, world=4).base < at(stage=3, world=2).base < one.base
    assert at(stage=0).optimizer == 8 * sum(parts.head + parts.layers[0] + parts.layers[5])
    exact = at().optimizer_full - at().optimizer
    assert exact <= at().parked <= exact * 17 / 16  # torch's rounding of pinned memory
    on_cpu = dataclasses.replace(parts, device="cpu")
    assert estimate(on_cpu, config, stage=2, quantization="none", world=2).parked == exact > 0
    assert at(world=1).sent_per_step == 8 * LAYERS  # only the scores
    # DeepSpeed's file: two buckets of fp32 numbers, and state that waits in host memory.
    small = at(zero={"reduce_bucket_size": 1000, "overlap_comm": True})
    assert small.buffers == at(stage=0).buffers + 2 * 4 * 1000
    moved = at(zero={"reduce_bucket_size": 1000, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}})
    assert small.total - moved.total == one.optimizer + one.gradients == moved.host - small.host
    roomy = at(memory=2**40)
    assert roomy.fits and roomy.largest_micro_batch > 1000
    assert not at(memory=2**30).fits and at(memory=2**30).largest_micro_batch == 0
    # The micro-batch that is said to fit does, and one more does not.
    memory = 4 * 2**30
    largest = at(memory=memory).largest_micro_batch
    for rows, fits in ((largest, True), (largest + 1, False)):
        config.optim.micro_batch_size = rows
        again = estimate(count(config, [0, 5]), config, stage=2, quantization="none", world=2, memory=memory)
        assert again.fits is fits and again.largest_micro_batch == largest


@pytest.mark.quick
def test_a_cpu_counts_everything_in_one_memory(llama):
    config = config_for(llama)
    parts = count(config, [0, 5], device="cpu", slope=False)
    plan = estimate(parts, config, stage=2, quantization="none", world=1, process=10**6)
    trained = sum(parts.head + parts.layers[0] + parts.layers[5])
    assert plan.buffers == 4 * trained  # of a bucket, only what is written is there
    named = (plan.process, plan.base, plan.adapters, plan.gradients, plan.optimizer, plan.buffers, plan.activations)
    assert plan.total == sum(named) + plan.parked


PRESETS = {"llama3.1-8b": (7.5, 32), "deepseek-r1-distil-8b": (7.5, 32), "llama2-13b": (12.85, 40),
           "mistral-7b": (7.11, 32), "qwen3-8b": (7.57, 36), "phi-2": (2.65, 32),
           "meta-llama/Llama-3.1-70B": (69.5, 80)}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", PRESETS)
def test_presets_need_no_download(name):
    billions, layers = PRESETS[name]
    model, anatomy = empty_classifier(
        ModelConfig(name_or_path=MODELS.get(name, name)), LABELS, lambda kind: "planned_sdpa"
    )
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1e9 * billions, rel=0.01)
    assert anatomy.num_layers == layers


@pytest.mark.quick
def test_a_large_model_is_planned_for_many_ranks(capsys):
    where = [
        "--gpus",
        "8",
        "--gpu-memory",
        "80GiB",
        "--model.gradient_checkpointing=true",
        "--tuning.method=full",
        "--json",
    ]
    assert main(["plan", "--model.name_or_path", "meta-llama/Llama-3.1-70B", *where]) == 0
    rows = {(row["stage"], row["quantization"]): row for row in json.loads(capsys.readouterr().out)}
    assert rows[2, "none"]["base"] == pytest.approx(2 * 69.5e9, rel=0.01)
    assert rows[3, "none"]["base"] == pytest.approx(2 * 69.5e9 / 8, rel=0.01)
    assert rows[2, "nf4"]["base"] == pytest.approx(rows[2, "none"]["base"] / 4, rel=0.1)
    assert rows[2, "nf4"]["base"] < rows[2, "int8"]["base"] < rows[2, "none"]["base"]
    assert not rows[2, "none"]["fits"] and rows[2, "nf4"]["fits"]


@pytest.fixture
def unseen(monkeypatch):
    """A preset of which nothing is on this machine."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 100}  # fmt: skip
    monkeypatch.setitem(SHAPES, "some/model", ("llama", shape))
    return "some/model"


@pytest.mark.quick
@pytest.mark.parametrize("kind", [*(kind for kind in KINDS if not kind.startswith("ltuning")), "pissa", "rslora"])
def test_every_adapter_type_but_l_tuning_can_be_planned_for_a_model_that_is_not_here(unseen, kind, capsys):
    arguments = ["plan", "--model.name_or_path", unseen, "--adapter.type", kind, "--data.max_length=32"]
    assert main(arguments) == 0
    assert "assumed: 5 labels, since the corpus is not read" in capsys.readouterr().out


@pytest.mark.quick
def test_l_tuning_is_planned_with_the_tokens_of_the_labels(llama, tmp_path):
    """Memory of the virtual tokens' layers grows with them, so a tokenizer that is not here is an error."""
    config = config_for(llama, "ltuning-prompt")
    short = count(config, [], slope=False)
    config.data.labels = [f"{label} of many words and many more" for label in LABELS]
    assert count(config, [], slope=False).peak > short.peak
    config.model.name_or_path = str(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="nowhere"):
        count(config, [], slope=False)


@pytest.mark.quick
def test_labels_are_counted_where_they_are_known(llama):
    config = config_for(llama)
    rows = {"in data.labels": sum(count(config, slope=False).head) // 32}  # a head of 32 numbers per label
    assert count(config, slope=False).assumed == ()
    config.data.labels = {"x": "long label", "y": "long label", "z": "d"}  # old names to new ones
    rows["renamed"] = sum(count(config, slope=False).head) // 32
    config.data.labels = None
    rows["nowhere"] = sum(count(config, slope=False).head) // 32
    rows["of the corpus"] = sum(count(config, labels=["a", "b", "c", "d"], slope=False).head) // 32
    assert rows == {"in data.labels": 3, "renamed": 2, "nowhere": 5, "of the corpus": 4}


@pytest.mark.quick
def test_mistakes_are_reported_together(unseen, capsys):
    assert main(["plan", "--gpus", "0", "--zero", "5", "--gpu-memory", "much"]) == 2
    said = capsys.readouterr().err
    assert all(
        part in said
        for part in ("--gpus: '0'", "--zero: '5'", "--gpu-memory: 'much'", "80GiB", "3 errors in the options")
    )
    model = ["plan", "--model.name_or_path", unseen]
    assert main([*model, "--tuning.method=fixed", "--tuning.layers=40"]) == 2
    assert "'40' is outside the layers 0 to 1" in capsys.readouterr().err
    assert main([*model, "--adapter.type", "prefix", "--model.attn_implementation", "eager"]) == 2
    assert "needs model.attn_implementation sdpa, not eager" in capsys.readouterr().err
    assert main([*model, "--gpus"]) == 2
    assert "--gpus: expected one argument" in capsys.readouterr().err


@pytest.mark.quick
def test_the_page_shows_what_commands_print(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```console\n\$ python -m irtune (.*)\n((?s:.*?))^```$", page, re.MULTILINE)
    assert len(blocks) == 1
    for command, output in blocks:
        assert main(command.split()) == 0
        assert capsys.readouterr().out == output, f"docs/memory.md is out of date: {command}"
    results = json.loads((ROOT / "benchmarks" / "results" / "memory-cpu.json").read_text(encoding="utf-8"))
    assert table(results["cases"]) in page
