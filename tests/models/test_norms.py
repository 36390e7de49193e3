"""RMS norms with a shorter backward pass."""

import copy

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from irtune.models.kernels.norms import _RMSNorm, shorten_norms

pytestmark = pytest.mark.quick


def norm_of(kind, dtype=torch.bfloat16):
    torch.manual_seed(0)
    norm = kind(24).to(dtype)
    norm.weight.data = torch.randn(24).to(dtype)
    norm.weight.requires_grad_(False)
    return norm


def numbers(dtype=torch.bfloat16, *, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return (scale * torch.randn(3, 50, 24, dtype=torch.float64, generator=generator)).to(dtype).requires_grad_()


def results(norm, x):
    """Output, and the gradient of the input."""
    output = norm(x)
    output.backward(torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape))
    gradient, x.grad = x.grad, None
    return output.detach(), gradient


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_outputs_are_the_models_bit_for_bit_and_gradients_no_worse(kind, scale):
    theirs = norm_of(kind)
    ours = copy.deepcopy(theirs)
    shorten_norms(ours)
    assert type(ours) is not type(theirs) and isinstance(ours, kind)
    x = numbers(scale=scale)
    (output, gradient), (wanted, autograds) = results(ours, x), results(theirs, x)
    assert torch.equal(output, wanted)
    exact = _exact_gradient(theirs, x)
    ours_off, theirs_off = ((found.double() - exact).norm() / exact.norm() for found in (gradient, autograds))
    assert ours_off < 1.05 * theirs_off < 0.01


def _exact_gradient(norm, x):
    wide = x.detach().double().requires_grad_()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    seed = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)
    (norm.weight.double() * wide * scale).backward(seed.double())
    return wide.grad


def test_the_formula():
    x = numbers(torch.float32)
    weight = torch.randn(24)
    assert torch.autograd.gradcheck(
        lambda x: _RMSNorm.apply(x, weight, 1e-6), (x,), eps=1e-2, atol=1e-2, rtol=1e-2, nondet_tol=0.0
    )


def test_it_keeps_no_wide_copy():
    kept = {}
    for name in ("theirs", "ours"):
        norm, x = norm_of(LlamaRMSNorm), numbers()
        if name == "ours":
            shorten_norms(norm)
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t
        ):
            norm(x)
        kept[name] = sum(sizes.values())
    rows, hidden = 150, 24
    assert kept["ours"] == 2 * rows * hidden + 2 * hidden + 4 * rows  # x, the weight, a number per row
    assert kept["theirs"] - kept["ours"] >= 2 * rows * hidden  # what is fp32 there is x itself here


def test_what_is_no_plain_norm_of_constant_weights_keeps_its_own():
    gemma, wide = norm_of(GemmaRMSNorm), norm_of(LlamaRMSNorm, torch.float32)
    shorten_norms(gemma)
    shorten_norms(wide)
    assert type(gemma) is GemmaRMSNorm and type(wide) is LlamaRMSNorm
    trained = norm_of(LlamaRMSNorm)
    shorten_norms(trained)
    trained.weight.requires_grad_(True)
    trained(numbers()).sum().backward()
    assert trained.weight.grad is not None
    trained.eval()
    assert "RMSNorm" not in type(trained(numbers()).grad_fn).__name__
