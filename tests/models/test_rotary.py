"""Rotary embeddings in fewer passes over memory."""

import copy

import pytest
import torch
from transformers import GPTNeoXConfig, LlamaConfig, PhiConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention
from transformers.models.llama import modeling_llama
from transformers.models.phi.modeling_phi import PhiAttention

from irtune.models.kernels.rotary import NAME, _Rotate, shorten_rotary

pytestmark = pytest.mark.quick
BATCH, LENGTH, HIDDEN = 2, 7, 32


def gpt_neox():
    """Rotates half of each head, in the function itself."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(hidden_size=HIDDEN, num_attention_heads=4, rotary_pct=0.5, attn_implementation="eager")
    return GPTNeoXAttention(config, layer_idx=0).bfloat16().train()


def attention_of(kind, settings, dtype=torch.bfloat16):
    torch.manual_seed(0)
    config = settings(hidden_size=HIDDEN, num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager")
    return kind(config, layer_idx=0).to(dtype).train()


def llama(dtype=torch.bfloat16):
    return attention_of(modeling_llama.LlamaAttention, LlamaConfig, dtype)


def angles(dtype, dim=HIDDEN // 4):
    half = torch.randn(BATCH, LENGTH, dim // 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [torch.cat((part, part), dim=-1).to(dtype) for part in (half.cos(), half.sin())]


def results(attention, dtype, dim=HIDDEN // 4):
    """Output, and the gradient of the input, in fp64; the first `dim` numbers of each head are rotated."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(BATCH, LENGTH, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    output, *_ = attention(x, position_embeddings=tuple(angles(dtype, dim)), attention_mask=None)
    output.backward(torch.linspace(-1, 2, output.numel(), dtype=torch.float64).view(output.shape).to(dtype))
    return output.detach().double(), x.grad.double()


def test_an_attention_computes_the_same_and_is_no_further_from_exact():
    theirs = llama()
    ours, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    shorten_rotary(ours)
    assert type(ours) is not type(theirs) and isinstance(ours, modeling_llama.LlamaAttention)
    compared = zip(results(ours, torch.bfloat16), results(theirs, torch.bfloat16), results(exact, torch.float64))
    for found, wanted, right in compared:
        ours_off, theirs_off = ((numbers - right).norm() / right.norm() for numbers in (found, wanted))
        assert 0 < ours_off < 1.1 * theirs_off < 0.02


def test_it_is_taken_in_training_steps_only():
    attention = llama()
    shorten_rotary(attention)
    rotate = type(attention).forward.__globals__[NAME]
    query = torch.randn(BATCH, 4, LENGTH, 8).bfloat16()
    cos, sin = angles(torch.bfloat16)
    found, wanted = rotate(query, query, cos, sin), modeling_llama.apply_rotary_pos_emb(query, query, cos, sin)
    assert all(torch.equal(ours, own) for ours, own in zip(found, wanted))
    query.requires_grad_()
    assert "_Rotate" in type(rotate(query, query, cos, sin)[0].grad_fn).__name__


def test_the_backward_pass_turns_back():
    cos, sin = (part.unsqueeze(1) for part in angles(torch.float64))
    inputs = [torch.randn(BATCH, heads, LENGTH, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2)]
    assert torch.autograd.gradcheck(lambda q, k: _Rotate.apply(q, k, cos, sin), inputs)


def test_other_models_and_other_rotations_are_left_alone():
    before = modeling_llama.apply_rotary_pos_emb
    wide, partial = llama(torch.float32), attention_of(PhiAttention, PhiConfig)
    shorten_rotary(wide)
    shorten_rotary(llama())
    assert type(wide) is modeling_llama.LlamaAttention
    assert modeling_llama.apply_rotary_pos_emb is before and type(llama()) is modeling_llama.LlamaAttention
    wanted = results(partial, torch.bfloat16, 4)
    shorten_rotary(partial)  # phi cuts the part that is rotated out beforehand: the rotation itself is the same
    assert type(partial) is not PhiAttention
    for found, own in zip(results(partial, torch.bfloat16, 4), wanted):
        torch.testing.assert_close(found, own, rtol=0.02, atol=0.02)
    partial = gpt_neox()  # cuts it out in the rotation, which is taken then
    wanted = results(partial, torch.bfloat16, 4)
    shorten_rotary(partial)
    assert all(torch.equal(found, own) for found, own in zip(results(partial, torch.bfloat16, 4), wanted))
    interleaved = type("Interleaved", (modeling_llama.LlamaAttention,), {"forward": _uses(_pairs_of_neighbours)})
    module = copy.deepcopy(llama())
    module.__class__ = interleaved
    shorten_rotary(module)
    assert type(module) is interleaved


def _pairs_of_neighbours(q, k, cos, sin):
    """The rotation of GPT-J: (x0, x1), (x2, x3), ..."""
    cos, sin = (part[..., : part.shape[-1] // 2].repeat_interleave(2, -1).unsqueeze(1) for part in (cos, sin))
    turned = [torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) for x in (q, k)]
    return tuple(x * cos + t * sin for x, t in zip((q, k), turned))


def _uses(rotation):
    names = {NAME: rotation}
    exec(f"def forward(self, q, k, cos, sin):\n    return {NAME}(q, k, cos, sin)\n", names)
    return names["forward"]
