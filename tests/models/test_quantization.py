"""Quantised base weights: what is quantised, and what is computed."""

import gc

import bitsandbytes.functional
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.pytorch_utils import Conv1D

from irtune.adapters.build import add_adapters
from irtune.config import AdapterConfig, ModelConfig
from irtune.distributed.runtime import World
from irtune.errors import ModelError
from irtune.models import load_classifier
from irtune.models.anatomy import find_anatomy, linear_names, output_projections
from irtune.models.quantization import is_quantized
from irtune.models.weights import elements
from irtune.selection.scores import LayerScores
from irtune.selection.signal_noise import layer_ratios, signal_to_noise
from tests.support.quantized import LABELS, batch_for, bits, load, reference, rounded
from tests.support.tiny import LAYERS

quick = pytest.mark.quick


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
    monkeypatch.setattr("irtune.models.classifier.AutoModelForSequenceClassification.from_pretrained", answer)
    monkeypatch.setattr("irtune.distributed.runtime.read_world", lambda: World(3, 1, 4, torch.device("cuda", 1)))
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
