"""Adapter types: how they start, what they train, that they come back from a file; and suppressing them."""

import itertools

import pytest
import torch
from peft import PeftModel

from irtune.adapters import Suppression, load_adapter, write_adapter
from irtune.adapters.build import add_adapters
from irtune.config import AdapterConfig, Config, ModelConfig, TuningConfig, load_config
from irtune.config.checks import check_config
from irtune.errors import CheckpointError, ConfigError
from irtune.models import load_classifier

pytestmark = pytest.mark.quick


@pytest.fixture
def model_and_table(llama):
    classifier = load_classifier(ModelConfig(name_or_path=str(llama), dtype="float32"), ["a", "b"])
    model, table = add_adapters(classifier, AdapterConfig(r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval(), table


def test_suppressed_adapters_act_less_and_come_back_bit_for_bit(model_and_table):
    model, table = model_and_table
    batch = {"input_ids": torch.arange(4, 16).reshape(2, 6)}
    suppression = Suppression(table)
    with torch.no_grad():
        before = model(**batch).logits
        with suppression.suppressed([1, 3]):
            during = model(**batch).logits
        with suppression.suppressed([1, 3], factor=1.0):
            same = model(**batch).logits
        after = model(**batch).logits
    assert not torch.equal(before, during)
    assert torch.equal(before, same)
    assert torch.equal(before, after)


def test_scaling_comes_back_when_an_exception_flies(model_and_table):
    _, table = model_and_table
    module = table.modules[2].self_attn.q_proj
    before = dict(module.scaling)

    def fail():
        with Suppression(table).suppressed([2]):
            assert module.scaling["default"] == before["default"] * 0.25
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert module.scaling == before


KINDS = {
    "lora": {},
    "dora": {},
    "rslora": {},
    "pissa": {},
    "bottleneck": {"size": 8},
    "bottleneck-parallel": {"size": 8, "placement": "parallel", "activation": "relu", "scale": 4.0},
    "bottleneck-connected": {"size": 8, "placement": "connected"},
    "mam": {"num_tokens": 3, "size": 8, "activation": "relu", "scale": 4.0},
    "bitfit": {},
    "prefix": {"num_tokens": 3},
    "prompt": {"num_tokens": 3},
    "dept": {"num_tokens": 3, "r": 4},
    "ept": {"num_tokens": 3, "r": 4, "size": 8},
    "none": {},
    "hft": {},
    "lofit": {},
    "sparse": {"density": 0.05},
    "triadapt": {"r": 4},
    "spafit": {},
    "ltuning-prompt": {"size": 8},
    "ltuning-prefix": {"num_tokens": 2, "r": 4},
    "ltuning-prompt-entailment": {"size": 8, "label_head": "entailment"},
    "ltuning-prefix-entailment": {"num_tokens": 2, "r": 4, "label_head": "entailment"},
}
# Those that compute at first what the model does without them.
SILENT = ("lora", "dora", "rslora", "pissa", "bottleneck", "bottleneck-parallel", "bottleneck-connected", "bitfit",
          "none", "hft", "sparse", "triadapt", "spafit")  # fmt: skip
REFUSED = [("gpt2", "hft")]  # by the architecture; test_literature.py has the reasons
BATCH = {
    "input_ids": torch.tensor([[4, 9, 11, 7, 5, 8], [6, 12, 10, 0, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
}


OWN_WEIGHTS = ("none", "hft", "bitfit", "spafit")


def build(folder, name, dtype="float32"):
    """A model with adapters, its table, and what the base answers without them."""
    torch.manual_seed(3)
    classifier = load_classifier(ModelConfig(name_or_path=str(folder), dtype=dtype), ["one thing", "other", "third"])
    kind = name.removesuffix("-parallel").removesuffix("-connected").removesuffix("-entailment")
    pad = classifier.model.config.pad_token_id
    batch = BATCH | {"input_ids": BATCH["input_ids"].masked_fill(BATCH["attention_mask"] == 0, pad)}
    with torch.no_grad():
        plain = classifier.model.eval()(**batch).logits
    own = "model" if kind in OWN_WEIGHTS else "float32"
    adapter = AdapterConfig(type=kind, **KINDS[name], dtype=own)
    model, table = add_adapters(classifier, adapter)
    return model.eval(), table, adapter, batch, plain


def stir(table):
    """Give every trainable parameter other values."""
    for name, parameter in table.all():
        generator = torch.Generator().manual_seed(len(name))
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [case for case in itertools.product(("llama", "gpt2", "bert"), KINDS) if case not in REFUSED],
)
def test_types_start_right_and_learn_everywhere(request, architecture, name):
    model, table, _, batch, plain = build(request.getfixturevalue(architecture), name)
    logits = model(**batch).logits
    assert logits.shape == (2, 3)
    assert name == "lofit" or (name in SILENT) == torch.allclose(logits, plain, atol=1e-4)  # silent up to its noise
    stir(table)
    loss = torch.nn.functional.cross_entropy(model(**batch).logits, torch.tensor([0, 2]))
    loss.backward()
    trained = dict(table.all())
    for full, parameter in model.named_parameters():
        assert parameter.requires_grad == (full in trained)
    silent = [full for full, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()]
    # A key's bias adds the same to all its products with a query: the softmax does not see it.
    silent = [full for full in silent if not (full.endswith("bias") and ("k_proj" in full or ".key." in full))]
    silent = [full for full in silent if not full.endswith("head_offsets.offset")]  # before heads are located
    if name.endswith("-entailment"):  # a bias moves all candidates alike, and so does F where all labels are <unk>
        silent = [full for full in silent if full not in ("base.classifier.bias", "label_pooling.weight")]
    assert not silent


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_padding_and_company_do_not_change_an_answer(request, architecture, name):
    model, table, _, batch, _ = build(request.getfixturevalue(architecture), name)
    stir(table)
    with torch.no_grad():
        together = model(**batch).logits
        alone = model(input_ids=batch["input_ids"][1:, :3], attention_mask=batch["attention_mask"][1:, :3]).logits
    assert torch.allclose(together[1:], alone, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("lora", "dora", "rslora", "pissa")])
def test_irtunes_own_format_reproduces_the_logits(llama, tmp_path, name):
    model, table, adapter, batch, _ = build(llama, name)
    stir(table)
    write_adapter(tmp_path, {name: p.detach() for name, p in table.all()}, adapter, ["one thing", "other", "third"])
    torch.manual_seed(99)  # other random first values
    base = load_classifier(ModelConfig(name_or_path=str(llama), dtype="float32"), ["one thing", "other", "third"])
    loaded = load_adapter(base, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("name", ["lora", "dora", "rslora", "pissa"])
def test_peft_reproduces_the_logits(llama, tmp_path, name):
    model, table, _, batch, _ = build(llama, name)
    stir(table)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    base = load_classifier(ModelConfig(name_or_path=str(llama), dtype="float32"), ["one thing", "other", "third"])
    loaded = PeftModel.from_pretrained(base.model, tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(**batch).logits, model(**batch).logits, atol=1e-6)
    with pytest.raises(CheckpointError, match="peft"):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "dora",
        "pissa",
        "bottleneck",
        "bottleneck-connected",
        "mam",
        "bitfit",
        "none",
        "hft",
        "lofit",
        "sparse",
        "triadapt",
        "prefix",
        "ltuning-prefix",
        "spafit",
    ],
)
def test_every_type_in_layers_can_be_suppressed_and_comes_back(llama, name):
    model, table, _, batch, _ = build(llama, name)
    suppression = Suppression(table)
    with torch.no_grad():
        first = model(**batch).logits
    for layer in table.layers:
        for full, parameter in layer:
            generator = torch.Generator().manual_seed(len(full))
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    before = {full: parameter.detach().clone() for full, parameter in table.all()}
    with torch.no_grad():
        moved = model(**batch).logits
        with suppression.suppressed([1, 2, 3, 4, 5], factor=0.25):
            during = model(**batch).logits
        with suppression.suppressed(range(6), factor=0.0):
            off = model(**batch).logits
        after = model(**batch).logits
    assert not torch.equal(during, moved)
    assert torch.allclose(off, first, atol=1e-5)
    assert torch.equal(after, moved)
    assert all(torch.equal(before[full], parameter) for full, parameter in table.all())


def test_bitfit_takes_the_biases_there_are_and_adds_them_where_there_are_none(llama, bert):
    _, table, *_ = build(bert, "bitfit")
    assert all(name.endswith(".bias") for layer in table.layers for name, _ in layer)
    assert {name.split(".")[-2] for name, _ in table.layers[0]} == {"query", "key", "value", "dense", "LayerNorm"}
    _, table, *_ = build(llama, "bitfit")
    assert len(table.layers[0]) == 7  # q, k, v, o, gate, up, down


def test_spafit_has_three_strata(llama):
    _, table, *_ = build(llama, "spafit")  # of 6 layers: [0, 1) frozen, [1, 2) biases, [2, 6) LoRA and biases
    assert not table.layers[0]
    assert all("lora" not in name for name, _ in table.layers[1]) and len(table.layers[1]) == 7
    low_rank = [name for name, _ in table.layers[2] if "lora_" in name]
    assert len(low_rank) == 8 and all(".self_attn." in name for name in low_rank)
    assert len([name for name, _ in table.layers[2] if name.endswith(".bias")]) == 7 and len(table.layers[2]) == 15


def test_spafit_puts_lora_on_the_chosen_parts_of_the_attention_and_trains_every_bias(bert):
    classifier = load_classifier(ModelConfig(name_or_path=str(bert), dtype="float32"), ["a", "b"])
    adapter = AdapterConfig(type="spafit", target_modules=["query", "value"], dtype="model")
    _, table = add_adapters(classifier, adapter)
    names = [name.partition(".layer.2.")[2] for name, _ in table.layers[2]]
    assert {name.partition(".lora_")[0] for name in names if "lora_" in name} == {
        "attention.self.query",
        "attention.self.value",
    }
    assert {name.replace(".base_layer", "") for name in names if "lora_" not in name} == {
        f"{part}.bias"
        for part in (
            "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
            "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm",
        )
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"adapter\.target_modules: 'output\.dens' matches no linear module"):
        add_adapters(
            load_classifier(ModelConfig(name_or_path=str(bert), dtype="float32"), ["a", "b"]),
            AdapterConfig(type="spafit", target_modules=["output.dens"], dtype="model"),
        )


@pytest.mark.parametrize("strata", [[4, 3], [0, 7], [6, 6], [-1, 2], [1, 2, 3]])
def test_strata_that_overlap_or_leave_the_range(llama, strata):
    said = check_config(Config(adapter=AdapterConfig(type="spafit", strata=strata)))
    if not any("adapter.strata" in line for line in said):
        classifier = load_classifier(ModelConfig(name_or_path=str(llama), dtype="float32"), ["a", "b"])
        with pytest.raises(ConfigError, match=r"adapter\.strata is .* accepted"):
            add_adapters(classifier, AdapterConfig(type="spafit", strata=strata, dtype="model"))


def test_unknown_types_and_impossible_combinations_are_refused():
    said = "\n".join(check_config(Config(adapter=AdapterConfig(type="bottelneck"))))
    assert "did you mean bottleneck" in said and "ltuning-prefix" in said
    for kind in ("prompt", "ltuning-prompt", "dept", "ept"):
        config = Config(adapter=AdapterConfig(type=kind), tuning=TuningConfig(method="ir"))
        assert any("not in layers: it needs tuning.method full, not ir" in line for line in check_config(config))
        assert load_config([f"--adapter.type={kind}", "--data.path=x"]).tuning.method == "full"
    own = Config(adapter=AdapterConfig(type="none"), model=ModelConfig(dtype="bfloat16"))
    assert any("adapter.dtype to model" in line for line in check_config(own))
    assert load_config(["--adapter.type=none", "--data.path=x"]).adapter.dtype == "model"
    assert load_config(["--tuning.method=spafit", "--data.path=x"]).adapter.type == "spafit"


def test_a_prefix_needs_a_kernel_that_takes_one(llama):
    config = ModelConfig(name_or_path=str(llama), dtype="float32", attn_implementation="eager")
    with pytest.raises(ConfigError, match=r"adapter\.type prefix needs model\.attn_implementation sdpa, not eager"):
        add_adapters(load_classifier(config, ["a", "b"]), AdapterConfig(type="prefix"))
