"""Adapters beside quantised base weights."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification

from irtune.adapters import Suppression, load_adapter, write_adapter
from irtune.adapters.build import add_adapters
from irtune.config import AdapterConfig
from irtune.models.quantization import dequantize, is_quantized
from tests.support.quantized import LABELS, batch_for, load
from tests.support.tiny import LAYERS

quick = pytest.mark.quick


KINDS = {
    "lora": {"r": 2},
    "rslora": {"r": 2},
    "dora": {"r": 2},
    "bottleneck": {"size": 8},
    "bottleneck-parallel": {"size": 8, "placement": "parallel"},
    "bottleneck-connected": {"size": 8, "placement": "connected"},
    "lofit": {},
    "triadapt": {"r": 4},
    "mam": {"num_tokens": 3, "size": 8},
    "prefix": {"num_tokens": 3},
    "prompt": {"num_tokens": 3},
    "ltuning-prompt": {"size": 8},
    "ltuning-prefix": {"num_tokens": 2, "r": 4},
}
SILENT = ("lora", "rslora", "dora", "bottleneck", "bottleneck-parallel", "bottleneck-connected", "triadapt")
CASES = [("llama", kind, q) for kind in KINDS for q in ("nf4", "int8")]
CASES += [(other, kind, "nf4") for other in ("gpt2", "bert") for kind in ("lora", "dora", "bottleneck", "prefix")]


def with_adapters(folder: Path, name: str, quantization: str, dtype: str = "float32"):
    classifier = load(folder, quantization, dtype)
    adapter = AdapterConfig(type=name.removesuffix("-parallel").removesuffix("-connected"), **KINDS[name])
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
    assert name == "lofit" or (name in SILENT) == torch.allclose(first, plain, atol=1e-4)
    suppression = Suppression(table)
    for full, parameter in (named for layer in table.layers for named in layer):
        stir(full, parameter)
    with torch.no_grad(), suppression.suppressed(range(LAYERS), factor=0.0):
        assert torch.allclose(model(**batch).logits, first, atol=1e-5)
    for full, parameter in table.head:
        stir(full, parameter)
    nn.functional.cross_entropy(model.train()(**batch).logits, torch.tensor([0, 2])).backward()
    silent = [full for full, parameter in table.all() if parameter.grad is None or not parameter.grad.any()]
    assert all(full.endswith("head_offsets.offset") for full in silent), silent  # lofit, before heads are located
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
