"""Kernels that a run may take instead of the model's own."""

import logging
from functools import partialmethod

import pytest
import torch
from transformers import LlamaForSequenceClassification
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from irtune.config import ModelConfig, load_config
from irtune.errors import ConfigError
from irtune.models import kernels
from irtune.models.kernels import add_fused_kernels, attention_kernel, check_gpu, compile_layers
from irtune.models.kernels.attention import SHORT, attention_by_products, attention_on_cpus, is_short
from irtune.models.kernels.hardware import missing_compiler
from tests.support import tiny
from tests.support.ranks import run_ranks

SELECTIONS = [[1], [0]]


@pytest.mark.quick
def test_a_missing_package_is_named_with_what_is_used_instead(caplog):
    kernels._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "irtune"):
        assert attention_kernel("flash_attention_2", torch.float32, LlamaForSequenceClassification) == "sdpa"
    assert "needs the package flash-attn, which is not installed here; sdpa is used instead" in caplog.text


@pytest.mark.quick
@pytest.mark.parametrize(
    ("gpu", "reason"),
    [(False, "a GPU, and there is none"), (True, "the package liger-kernel (0.3.0 or newer), which is not installed")],
)
def test_fused_kernels_fall_back_aloud(gpu, reason, monkeypatch, caplog):
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: gpu)
    model = torch.nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING, "irtune"):
        add_fused_kernels(model)
    assert f"model.fused_kernels needs {reason}" in caplog.text and "own kernels are used instead" in caplog.text


@pytest.mark.quick
def test_compile_is_refused_where_it_cannot_be(tmp_path):
    with pytest.raises(ConfigError) as refusal:
        load_config(
            [
                f"--data.path={tmp_path}",
                "--model.compile=true",
                "--model.quantization=nf4",
                f"--deepspeed={tiny.engine_json(tmp_path, 3)}",
            ]
        )
    for reason in ("zero_optimization.stage 3", "model.quantization nf4"):
        assert f"model.compile does not go with {reason}" in str(refusal.value)


def _compiled(model, dtype, backend):
    rig = tiny.Rig(model, 2, dtype, compile=backend is not None)
    if backend is not None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
            compile_layers(rig.table.modules)
    losses = []
    for selected in SELECTIONS:
        rig.engine.module.train()
        rig.engine.reselect(selected)
        losses += rig.train(2)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    weights = [layer.tolist() for layer in rig.layer_weights()]  # plain numbers: tensors would outlive their process
    rig.close()
    return losses, weights, graphs


# mixed: a bf16 base, whose attention and norms are irtune's own. eager: the same graphs, not compiled further, which
# takes most of a minute.
@pytest.mark.parametrize(
    ("dtype", "near", "backend"),
    [
        ("float32", 1, "eager"),
        pytest.param("float32", 1, "inductor", marks=pytest.mark.slow),
        pytest.param("mixed", 1000, "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_layers_train_as_others_do_over_selections(tmp_path, dtype, near, backend):
    model = tiny.save_model(tmp_path / "model", layers=2)
    found = (run_ranks(_compiled, 1, model, dtype, chosen)[0] for chosen in (None, backend))
    (plain, weights, none), (compiled, others, graphs) = found
    assert none == 0 and 1 <= graphs <= 6  # one for each combination, not for each layer and selection
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(plain), rtol=1e-5 * near, atol=1e-6)
    if dtype == "float32":
        torch.testing.assert_close(others, weights, rtol=1e-3, atol=1e-4)


# ----- attention on CPUs -----


class _Attention(torch.nn.Module):
    """What a kernel asks its module for."""

    is_causal = True

    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups = groups


def _tensors(heads, shared, length, keys, dim):
    torch.manual_seed(0)
    sizes = [(heads, length), (shared, keys), (shared, keys)]
    return [torch.randn(2, number, rows, dim).bfloat16() for number, rows in sizes]


def _mask(length, keys, kind):
    """As transformers makes it for a batch whose first text is two tokens shorter."""
    if kind == "none":
        return None
    mask = torch.ones(2, 1, length, keys, dtype=torch.bool).tril(keys - length)
    mask[0, :, :, keys - 2 :] = False
    return mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def _results(kernel, module, tensors, dtype, mask, **options):
    """Output and gradients, in fp64."""
    inputs = [tensor.to(dtype).detach().clone().requires_grad_() for tensor in tensors]
    mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    output, _ = kernel(module, *inputs, mask, **options)
    torch.manual_seed(1)
    output.backward(torch.randn(output.shape, dtype=torch.float64).to(dtype))
    return [output.detach().double(), *(tensor.grad.double() for tensor in inputs)]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("heads", "shared", "length", "keys", "dim", "mask", "options"),
    [
        (4, 2, 9, 9, 48, "bool", {}),
        (4, 4, 9, 9, 64, "numbers", {"scaling": 0.3}),
        (6, 2, 7, 7, 64, "none", {}),
        (6, 2, 7, 7, 64, "none", {"is_causal": False}),
        (4, 2, 5, 8, 32, "bool", {}),
    ],
    ids=["padded", "own-scale", "causal", "both-ways", "prefix"],
)
def test_attention_by_products_is_attention(heads, shared, length, keys, dim, mask, options):
    module, tensors = _Attention(heads // shared), _tensors(heads, shared, length, keys, dim)
    made = _mask(length, keys, mask)
    exact = _results(sdpa_attention_forward, module, tensors, torch.float64, made, **options)
    found = _results(attention_by_products, module, tensors, torch.bfloat16, made, **options)
    precise = _results(attention_by_products, module, tensors, torch.float64, made, **options)
    for one, other, rounded in zip(precise, exact, found):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
        assert (rounded - other).norm() / other.norm() < 0.01  # bf16 has 8 bits: 0.002 of each of a few roundings


@pytest.mark.quick
def test_evaluation_long_texts_and_dropout_take_the_kernels_of_torch():
    module, (query, key, value) = _Attention(2), _tensors(4, 2, 9, 9, 16)
    theirs, _ = sdpa_attention_forward(module, query, key, value, None)
    assert torch.equal(attention_on_cpus(module.eval(), query, key, value, None)[0], theirs)
    module.train()
    assert torch.equal(
        attention_on_cpus(module, query, key, value, None)[0], attention_by_products(module, query, key, value, None)[0]
    )
    query, key, value = _tensors(2, 1, SHORT + 1, SHORT + 1, 8)
    wide, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), None)
    assert torch.equal(attention_on_cpus(module, query, key, value, None)[0], wide.bfloat16())
    assert not is_short(key[:, :, :9], {"dropout": 0.1})
    assert not is_short(key[:, :, :9], {"position_bias": torch.zeros(1)})


@pytest.mark.quick
def test_a_gpu_of_an_older_generation_is_told_what_it_lacks(monkeypatch, caplog):
    def on(capability, **model):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "sm_120a", "compute_120"])
        caplog.clear()
        return check_gpu(ModelConfig(**model), torch.device("cuda", 0)), caplog.text

    flash = {"dtype": "float16", "attn_implementation": "flash_attention_2"}
    older = "needs a GPU of compute capability {} or newer; this one (Tesla T4) has {}: use {}"
    assert on((7, 5), **flash) == (
        [f"model.attn_implementation flash_attention_2 {older.format(8.0, 7.5, 'sdpa')}"],
        "",
    )
    assert on((9, 0), **flash) == ([], "") == on((9, 0), dtype="bfloat16") == on((7, 5), dtype="float16")
    problems, said = on((7, 5), dtype="bfloat16", quantization="int8")
    assert problems == [] and "bfloat16 is fast on GPUs of compute capability 8.0 or newer; this one" in said
    problems, _ = on((7, 0), dtype="float32", quantization="int8")
    assert problems == [
        "this build of torch is for compute capability 7.5 or newer; this one (Tesla T4) has 7.0",
        f"model.quantization int8 {older.format(7.5, 7.0, 'nf4 or none')}",
    ]


@pytest.mark.quick
def test_without_a_compiler_layers_stay_as_they_are(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    layer = torch.nn.Linear(2, 2)
    compile_layers([layer])
    assert layer._compiled_call_impl is None
    assert (
        "model.compile needs a compiler (no-such-compiler), and there is none; the layers are not compiled"
        in caplog.text
    )
    assert missing_compiler(on_cpu=True) == "no-such-compiler"
    monkeypatch.setenv("CXX", "python")  # something that is there
    assert missing_compiler(on_cpu=True) is None
