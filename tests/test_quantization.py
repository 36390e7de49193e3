"""Quantised base weights: what is quantised, what is computed, and that training leaves the base bit for bit alone."""

import gc
import json
from pathlib import Path

import bitsandbytes.functional
import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from irtune.adapters import add_adapters, load_adapter, remember_origins, suppressed, write_adapter
from irtune.config import AdapterConfig, Config, ModelConfig, load_config
from irtune.config.engine_json import read_engine_json
from irtune.config.validate import check_config
from irtune.errors import ConfigError, ModelError
from irtune.importance import LayerScores
from irtune.models import Classifier, find_anatomy, is_linear, linear_names, load_classifier, output_projections
from irtune.quantization import dequantize, elements, is_quantized
from irtune.runtime import World
from irtune.signal_noise import layer_ratios, signal_to_noise
from tests.ranks import run_ranks
from tests.tiny import LAYERS, Rig, save_model

quick = pytest.mark.quick
LABELS = ["delighted teacher", "night-watch", "harbour"]  # words of the tiny vocabulary
BATCH = {
    "input_ids": torch.tensor([[4, 9, 11, 7, 5, 8], [6, 12, 10, 0, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
}


def load(folder: Path, quantization: str, dtype: str = "float32") -> Classifier:
    """A classifier with the head of seed 3, and padding in its batch."""
    torch.manual_seed(3)
    config = ModelConfig(name_or_path=str(folder), dtype=dtype, quantization=quantization)
    return load_classifier(config, LABELS)


def batch_for(model: nn.Module) -> dict[str, torch.Tensor]:
    return BATCH | {
        "input_ids": BATCH["input_ids"].masked_fill(BATCH["attention_mask"] == 0, model.config.pad_token_id)
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def rounded(module: nn.Module) -> torch.Tensor:
    """The weight that a quantised module stands for, [out, in], by hand from its bits."""
    weight = module.weight
    if not hasattr(weight, "quant_state"):
        scales = weight.SCB if module.state.SCB is None else module.state.SCB
        return weight.data.float() * scales[:, None] / 127
    state, packed = weight.quant_state, weight.data.contiguous().view(torch.uint8).flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    inner = state.state2  # the scales of 64 weights, of which 256 share a scale
    scales = inner.code[state.absmax.long()] * inner.absmax.repeat_interleave(256)[: state.absmax.numel()]
    scales = (scales + state.offset).repeat_interleave(64)[: codes.numel()]
    return (state.code[codes] * scales).view(state.shape).to(state.dtype)


@torch.no_grad()
def reference(folder: Path, quantized: Classifier, dtype: str) -> nn.Module:
    """The plain model with the rounded weights of `quantized`."""
    plain = load(folder, "none", dtype).model
    for name, module in quantized.model.named_modules():
        if is_quantized(module):
            target = plain.get_submodule(name)
            weight = rounded(module)
            target.weight.copy_(weight.T if isinstance(target, Conv1D) else weight)
    return plain


# ----- what is quantised -----


@quick
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_linear_modules_of_the_layers_are_quantised_and_nothing_else(request, architecture, quantization):
    folder = request.getfixturevalue(architecture)
    plain, quantized = load(folder, "none", "bfloat16"), load(folder, quantization, "bfloat16")
    wanted = {
        f"{plain.anatomy.layers}.{number}.{name}"
        for number in range(LAYERS)
        for name in linear_names(plain.model, plain.anatomy)
    }
    assert {name for name, module in quantized.model.named_modules() if is_quantized(module)} == wanted
    before = dict(plain.model.named_parameters())
    for name, parameter in quantized.model.named_parameters():
        if name.removesuffix(".weight") in wanted:
            weights = before[name].numel()
            assert parameter.numel() * parameter.element_size() == weights // (2 if quantization == "nf4" else 1)
            assert elements(parameter) == weights
            assert not parameter.requires_grad
        else:
            assert parameter.dtype == torch.bfloat16
            assert torch.equal(parameter, before[name])
    assert quantized.anatomy == plain.anatomy
    assert linear_names(quantized.model, quantized.anatomy) == linear_names(plain.model, plain.anatomy)


@quick
def test_a_head_of_several_modules_and_what_the_files_lack_stay_plain(tmp_path, bert):
    from safetensors.torch import load_file, save_file

    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(bert / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    classifier = load(tmp_path, "nf4")
    assert set(classifier.anatomy.head) == {"classifier", "bert.pooler.dense"}
    _, table = add_adapters(classifier, AdapterConfig(r=2))
    assert {parameter.dtype for _, parameter in table.head} == {torch.float32}
    assert any("pooler" in name for name, _ in table.head)
    del kept[next(name for name in kept if ".layer.3." in name and name.endswith("query.weight"))]
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layer\.3\.attention\.self\.query\.weight is not in the files"):
        load(tmp_path, "nf4")


@quick
def test_each_rank_loads_to_its_own_device(monkeypatch, llama):
    def answer(*_arguments, **options):
        places.append(options["device_map"])
        raise OSError("enough is known")

    places: list[dict] = []
    monkeypatch.setattr("irtune.models.AutoModelForSequenceClassification.from_pretrained", answer)
    monkeypatch.setattr("irtune.runtime.read_world", lambda: World(3, 1, 4, torch.device("cuda", 1)))
    for quantization, device in (("nf4", None), ("int8", None), ("nf4", torch.device("cpu"))):
        with pytest.raises(ModelError, match="enough is known"):
            load_classifier(ModelConfig(name_or_path=str(llama), quantization=quantization), LABELS, device)
    assert places == [{"": torch.device("cuda", 1)}] * 2 + [{"": torch.device("cpu")}]


@quick
def test_the_layers_are_found_by_what_weights_stand_for():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(2)])
            self.others = nn.ModuleList([nn.Linear(32, 64) for _ in range(2)])
            self.score = nn.Linear(64, 2)

    model = Half()
    for layer in model.layers:  # packed to a quarter of the numbers, below those of `others`
        packed, state = bitsandbytes.functional.quantize_4bit(
            layer.weight.data.bfloat16(), quant_type="nf4", quant_storage=torch.bfloat16
        )
        layer.weight = nn.Parameter(packed, requires_grad=False)
        layer.weight.quant_state = state
    assert sum(p.numel() for p in model.layers.parameters()) < sum(p.numel() for p in model.others.parameters())
    assert find_anatomy(model).layers == "layers"


# ----- what is computed -----


@quick
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_nf4_computes_what_its_weights_say_in_training_and_evaluation(request, architecture, dtype):
    """On CPUs with bf16 instructions, bitsandbytes' own evaluation fails at this width, or gives other numbers."""
    folder = request.getfixturevalue(architecture)
    classifier = load(folder, "nf4", dtype)
    plain = reference(folder, classifier, dtype)
    batch, targets = batch_for(plain), torch.tensor([0, 2])
    packed = {n: bits(p) for n, p in classifier.model.named_parameters()}
    unrounded = load(folder, "none", dtype).model
    for name, module in classifier.model.named_modules():
        if is_quantized(module):
            before = unrounded.get_submodule(name)
            weight = before.weight.T if isinstance(before, Conv1D) else before.weight
            error = (rounded(module) - weight).float().norm() / weight.float().norm()
            assert 0.05 < error < 0.12, "of Gaussian weights nf4 keeps all but 9 %"
            if module.in_features % 64 == 0:
                state = module.weight.quant_state
                assert torch.equal(rounded(module), bitsandbytes.functional.dequantize_4bit(module.weight.data, state))
    for training in (True, False, True, False):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                logits = [model.train(training)(**batch).logits for model in (classifier.model, plain)]
            assert torch.allclose(*logits, atol=1e-6 if dtype == "float32" else 1e-3, rtol=0)
            losses = [float(nn.functional.cross_entropy(each.float(), targets)) for each in logits]
            assert losses[0] == pytest.approx(losses[1], abs=1e-6 if dtype == "float32" else 1e-3)
    assert {n: bits(p) for n, p in classifier.model.named_parameters()} == packed
    gradients = []
    for model in (classifier.model, plain):  # through all layers, down to the embeddings
        embeddings = model.train().get_input_embeddings().weight.requires_grad_(True)
        nn.functional.cross_entropy(model(**batch).logits.float(), targets).backward()
        gradients.append(embeddings.grad.float())
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error < (1e-5 if dtype == "float32" else 1e-2)


@quick
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_int8_computes_what_its_weights_say(request, architecture):
    folder = request.getfixturevalue(architecture)
    classifier = load(folder, "int8")
    plain, batch = reference(folder, classifier, "float32"), batch_for(classifier.model)
    for training, tolerance in ((True, 1e-6), (False, 2e-2), (True, 1e-6)):  # evaluation rounds activations as well
        logits = [model.train(training)(**batch).logits for model in (classifier.model, plain)]
        assert torch.allclose(*logits, atol=tolerance * float(logits[1].detach().abs().max()), rtol=0)
    gradients = []
    for model in (classifier.model, plain):
        embeddings = model.train().get_input_embeddings().weight.requires_grad_(True)
        nn.functional.cross_entropy(model(**batch).logits, torch.tensor([0, 2])).backward()
        gradients.append(embeddings.grad)
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


@quick
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_nothing_is_kept_for_the_backward_pass(llama, quantization):
    """Neither the input nor, of nf4, the weights, which ZeRO 3 takes away between a module's two passes."""
    module = load(llama, quantization).model.model.layers[0].mlp.up_proj
    hidden = torch.randn(2, 5, 32, requires_grad=True)
    wanted = module(hidden).sum()
    gradient = torch.autograd.grad(wanted, hidden)[0]
    whole = module.weight.data
    between = hidden * 1.0  # which keeps nothing itself
    watched = [StorageWeakRef(between.untyped_storage())]
    if quantization == "nf4":
        module.weight.data = whole.clone()
        watched.append(StorageWeakRef(module.weight.data.untyped_storage()))
    loss = module(between).sum()
    del between
    if quantization == "nf4":
        module.weight.data = torch.empty(0)
    gc.collect()
    assert all(storage.expired() for storage in watched)
    module.weight.data = whole
    loss.backward()
    assert torch.equal(loss, wanted) and torch.equal(hidden.grad, gradient)


@quick
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_fp32_adapters_keep_no_second_copy(llama, quantization):
    """Activations kept for the backward pass: not more bytes than over a plain bf16 base, and none wide in fp32."""

    def kept(kind: str) -> tuple[int, int]:
        classifier = load(llama, kind, "bfloat16")
        model, _ = add_adapters(classifier, AdapterConfig(r=2))
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages, wide = {}, 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal wide
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage
                wide += tensor.dtype == torch.float32 and tensor.shape[-1] in (32, 64) and tensor.dim() == 3
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model.train()(**batch_for(classifier.model))
        assert output.logits.requires_grad
        return sum(storage.nbytes() for storage in storages.values()), wide

    plain, wide = kept("none")
    assert kept(quantization) == (plain, wide)
    # Llama's norms keep their input and its normalised form in fp32, two norms in each layer and one at the end.
    assert wide <= 2 * (2 * LAYERS + 1)


# ----- scores and counts that read weights -----


@quick
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_scores_of_weights_are_those_of_the_rounded_weights(request, architecture, quantization):
    folder = request.getfixturevalue(architecture)
    classifier = load(folder, quantization)
    plain = load(folder, "none")
    projections = output_projections(classifier.model, classifier.anatomy)
    name = "attn.c_proj" if architecture == "gpt2" else "self_attn.o_proj"
    layers = list(classifier.model.get_submodule(classifier.anatomy.layers).children())
    by_hand = [float(rounded(layer.get_submodule(name)).norm()) for layer in layers]
    _, table = add_adapters(classifier, AdapterConfig(r=2))  # peft wraps the modules
    norms = LayerScores(table, "weight", torch.device("cpu"), projections).reduce()
    assert norms == pytest.approx(by_hand, rel=1e-6)
    unrounded = [float(weight.norm()) for weight in output_projections(plain.model, plain.anatomy)]
    assert norms == pytest.approx(unrounded, rel=0.02) and norms != pytest.approx(unrounded, rel=1e-6)


@quick
def test_signal_to_noise_ratios_are_those_of_the_rounded_weights(llama):
    classifier = load(llama, "nf4")
    ratios = layer_ratios(classifier.model, classifier.anatomy)
    module = classifier.model.model.layers[2].mlp.gate_proj
    assert ratios["mlp.gate_proj"][2] == pytest.approx(signal_to_noise(rounded(module)), rel=1e-6)
    assert all(len(values) == LAYERS and all(value > 0 for value in values) for values in ratios.values())


# ----- adapters -----

KINDS = {
    "lora": {"r": 2},
    "rslora": {"r": 2},
    "dora": {"r": 2},
    "bottleneck": {"size": 8},
    "bottleneck-parallel": {"size": 8, "placement": "parallel"},
    "prefix": {"num_tokens": 3},
    "prompt": {"num_tokens": 3},
    "ltuning-prompt": {"size": 8},
    "ltuning-prefix": {"num_tokens": 2, "r": 4},
}
SILENT = ("lora", "rslora", "dora", "bottleneck", "bottleneck-parallel")
CASES = [("llama", kind, q) for kind in KINDS for q in ("nf4", "int8")]
CASES += [(other, kind, "nf4") for other in ("gpt2", "bert") for kind in ("lora", "dora", "bottleneck", "prefix")]


def with_adapters(folder: Path, name: str, quantization: str, dtype: str = "float32"):
    classifier = load(folder, quantization, dtype)
    adapter = AdapterConfig(type=name.removesuffix("-parallel"), **KINDS[name])
    return classifier, *add_adapters(classifier, adapter), adapter


def stir(name: str, parameter: nn.Parameter) -> None:
    generator = torch.Generator().manual_seed(len(name))
    parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


@quick
@pytest.mark.parametrize(("architecture", "name", "quantization"), CASES)
def test_types_start_right_learn_everywhere_and_come_back(request, tmp_path, architecture, name, quantization):
    folder = request.getfixturevalue(architecture)
    base = load(folder, quantization)
    batch = batch_for(base.model)
    with torch.no_grad():
        plain = base.model.eval()(**batch).logits
    _, model, table, adapter = with_adapters(folder, name, quantization)
    with torch.no_grad():
        first = model.eval()(**batch).logits
    assert (name in SILENT) == torch.allclose(first, plain, atol=1e-4)
    remember_origins(table)
    for full, parameter in (named for layer in table.layers for named in layer):
        stir(full, parameter)
    with torch.no_grad(), suppressed(table, range(LAYERS), factor=0.0):
        assert torch.allclose(model(**batch).logits, first, atol=1e-5)
    for full, parameter in table.head:
        stir(full, parameter)
    nn.functional.cross_entropy(model.train()(**batch).logits, torch.tensor([0, 2])).backward()
    assert not [full for full, parameter in table.all() if parameter.grad is None or not parameter.grad.any()]
    assert sum(p.requires_grad for p in model.parameters()) == len(table.all())
    with torch.no_grad():
        wanted = model.eval()(**batch).logits
    if isinstance(model, PeftModel):
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        loaded: nn.Module = PeftModel.from_pretrained(base.model, tmp_path).eval()
    else:
        write_adapter(tmp_path, {full: p.detach() for full, p in table.all()}, adapter, LABELS)
        loaded = load_adapter(base, tmp_path)
    with torch.no_grad():
        assert torch.allclose(loaded(**batch).logits, wanted, atol=1e-6)


@quick
def test_factors_over_4_bits_train_in_the_input_s_dtype(llama):
    classifier, model, table, _ = with_adapters(llama, "lora", "nf4", "bfloat16")
    factors = [m for n, m in model.named_modules() if n.endswith(("lora_A.default", "lora_B.default"))]
    assert len(factors) == 2 * 7 * LAYERS
    assert {parameter.dtype for _, parameter in table.all()} == {torch.float32}
    for training, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        seen: list[torch.dtype] = []
        handles = [
            factor.register_forward_hook(lambda *given, to=seen: to.append(given[2].dtype)) for factor in factors
        ]
        model.train(training)(**batch_for(classifier.model))
        for handle in handles:
            handle.remove()
        assert seen == [dtype] * len(factors)


@quick
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(("quantization", "tolerance"), [("nf4", 1e-5), ("int8", 2e-2)])
def test_a_model_can_be_made_plain_again(request, tmp_path, architecture, quantization, tolerance):
    """For merging: the adapters then fit the weights that they were trained on."""
    folder = request.getfixturevalue(architecture)
    classifier = load(folder, quantization)
    with torch.no_grad():
        wanted = classifier.model.eval()(**batch_for(classifier.model)).logits
    dequantize(classifier.model, torch.float32)
    assert {p.dtype for p in classifier.model.parameters()} == {torch.float32}
    assert not any(is_quantized(module) for module in classifier.model.modules())
    assert not classifier.model.is_quantized
    classifier.model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        logits = loaded.eval()(**batch_for(loaded)).logits
    assert torch.allclose(logits, wanted, atol=tolerance * float(wanted.abs().max()), rtol=0)


# ----- under ZeRO -----

LESS = 3  # layers: ZeRO 3 takes its time for every module
SELECTIONS = [[1], [0, 2], [2]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("small"), layers=LESS)


def train(model: Path, cases: list[tuple[int, str, dict]]) -> list[dict]:
    """For each stage, number format and options of a rig: losses, who moved, and what the base holds."""
    reports = []
    for stage, dtype, options in cases:
        rig = Rig(model, stage, dtype, **options)
        trained = {name for name, _ in rig.table.all()}
        constant = [(n, p) for n, p in rig.engine.module.named_parameters() if n not in trained]
        packed = [module.weight for module in rig.engine.module.modules() if is_quantized(module)]
        report = {"losses": [], "moved": [], "modules": len(packed)}
        report["held"] = sum(getattr(p, "ds_tensor", p).numel() * p.element_size() for p in packed)
        with rig.engine._whole([parameter for _, parameter in constant]):
            base = {name: bits(parameter) for name, parameter in constant}
        for selected in SELECTIONS:
            rig.engine.reselect(selected)
            before = rig.layer_weights()
            rig.steps = 0  # the same two steps every time: what is learnt is seen
            report["losses"].append(rig.train(2))
            after = rig.layer_weights()
            report["moved"].append([n for n in range(LESS + 1) if not torch.equal(before[n], after[n])])
        with rig.engine._whole([parameter for _, parameter in constant]):
            report["base is the same"] = {name: bits(parameter) for name, parameter in constant} == base
            report["packed bytes"] = sum(p.numel() * p.element_size() for p in packed)
        report["released"] = stage != 3 or not any(p.numel() for p in packed)
        reports.append(report)
        rig.engine.close()
    return reports


def check(report: dict, weights: int, quantization: str, share: int = 1) -> None:
    """Selected layers and the head have moved, others and the base have not by a bit, and something was learnt."""
    assert report["moved"] == [[*selected, LESS] for selected in SELECTIONS]
    assert report["base is the same"] and report["released"]
    assert report["modules"] == 7 * LESS
    assert report["packed bytes"] == weights // (2 if quantization == "nf4" else 1)
    assert report["held"] == report["packed bytes"] // share
    assert sum(report["losses"][-1]) < 0.9 * sum(report["losses"][0])


def layer_weights(folder: Path) -> int:
    """Elements of all linear modules of the layers."""
    classifier = load(folder, "none")
    layers = classifier.model.get_submodule(classifier.anatomy.layers)
    return sum(module.weight.numel() for module in layers.modules() if is_linear(module))


def test_a_replicated_base_on_zero_0_to_2(small):
    cases = [(0, "float32", "nf4", False), (2, "float32", "nf4", True), (1, "mixed", "nf4", False),
             (2, "bfloat16", "nf4", False), (0, "mixed", "int8", False), (1, "bfloat16", "int8", False),
             (2, "float32", "int8", True)]  # fmt: skip
    rigs = [(stage, dtype, {"quantization": kind, "recompute": again}) for stage, dtype, kind, again in cases]
    reports = run_ranks(train, 2, small, rigs)
    weights = layer_weights(small)
    for report in reports:
        for (_, _, kind, _), each in zip(cases, report):
            check(each, weights, kind)
        for first, second in zip(report[0]["losses"], report[1]["losses"]):
            assert second == pytest.approx(first, rel=1e-5)
    assert reports[0] == reports[1]


def test_nf4_in_pieces_on_zero_3(small):
    """The same losses as ZeRO 0, also after layers are chosen anew; each rank holds half of the packed bits."""
    dora = {"adapter": {"type": "dora", "r": 4}}
    offload = {"recompute": True, "zero": {"offload_param": {"device": "cpu", "pin_memory": False}}}
    cases = [(0, "float32", {}), (3, "float32", {}), (3, "float32", offload), (0, "float32", dora),
             (3, "float32", dora), (0, "mixed", {}), (3, "mixed", {})]  # fmt: skip
    cases = [(stage, dtype, options | {"quantization": "nf4"}) for stage, dtype, options in cases]
    weights = layer_weights(small)
    for report in run_ranks(train, 2, small, cases):
        for (stage, _, _), each in zip(cases, report):
            check(each, weights, "nf4", share=2 if stage == 3 else 1)
        losses = [[loss for pair in each["losses"] for loss in pair] for each in report]
        whole, pieces, offloaded, dora_whole, dora_pieces, mixed, mixed_pieces = losses
        assert pieces == pytest.approx(whole, rel=1e-5)
        assert offloaded == pytest.approx(whole, rel=1e-5)
        assert dora_pieces == pytest.approx(dora_whole, rel=1e-5)
        # In bf16 Adam's first step turns rounding into signs; unquantised bases differ as much.
        assert mixed_pieces[0] == mixed[0]
        assert mixed_pieces == pytest.approx(mixed, rel=0.05)


# ----- refusals -----


@quick
@pytest.mark.parametrize("kind", ["none", "bitfit", "spafit", "pissa"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_types_that_need_the_weights_themselves_are_refused(llama, kind, quantization):
    adapter = AdapterConfig(type=kind, dtype="model")
    config = Config(model=ModelConfig(quantization=quantization), adapter=adapter)
    said = [line for line in check_config(config) if "quantization" in line]
    assert len(said) == 1 and f"adapter.type {kind}" in said[0] and "set model.quantization to none" in said[0]
    with pytest.raises(ConfigError, match=f"adapter.type {kind} needs model.quantization none"):
        add_adapters(load(llama, quantization), adapter)


@quick
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "bottleneck", "prefix", "ltuning-prefix"])
def test_types_beside_constant_weights_are_accepted(kind):
    for quantization in ("nf4", "int8"):
        config = Config(model=ModelConfig(quantization=quantization), adapter=AdapterConfig(type=kind))
        assert not [line for line in check_config(config) if "quantization" in line]


@quick
def test_what_zero_3_cannot_cut_is_refused(tmp_path):
    def said(quantization: str, **zero: object) -> list[str]:
        file = tmp_path / "engine.json"
        file.write_text(json.dumps({"zero_optimization": zero}))
        try:
            config = load_config(["--data.path=x", f"--deepspeed={file}", f"--model.quantization={quantization}"])
        except ConfigError as error:
            return error.problems
        return read_engine_json(config, 2)[1]

    (problem,) = said("int8", stage=3)
    assert "model.quantization int8 does not go with zero_optimization.stage 3" in problem
    assert "set model.quantization to nf4, or --deepspeed to a file with stage 0, 1 or 2" in problem
    (problem,) = said("nf4", stage=3, zero_quantized_weights=True)
    assert "zero_optimization.zero_quantized_weights would round the packed weights" in problem
    assert said("nf4", stage=3) == said("int8", stage=2) == said("none", stage=3, zero_quantized_weights=True) == []


@quick
def test_a_model_that_is_quantised_already_is_refused(tmp_path, llama):
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((llama / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="holds weights that are quantised already; accepted: weights in 16 or 32"):
        load(tmp_path, "nf4")
