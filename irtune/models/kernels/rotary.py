"""Rotary position embeddings of a model on CPUs, in fewer passes over memory."""

import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

NAME = "apply_rotary_pos_emb"
Rotation = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class _Rotate(torch.autograd.Function):
    """q cos + rotate_half(q) sin, and so for k; with x = (a, b), rotate_half(x) = (-b, a).

    A rotation: its backward pass is the one by the opposite angle. Keeps angles only.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query [batch, heads, length, dim], key likewise; cos, sin [batch or 1, 1, length, dim] of equal halves."""
        half = sin.shape[-1] // 2
        signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        ctx.save_for_backward(cos, signed)
        return _rotated(query, cos, signed), _rotated(key, cos, signed)

    @staticmethod
    def backward(ctx: Any, query: torch.Tensor, key: torch.Tensor) -> Any:  # type: ignore[override]
        """The gradients, rotated back."""
        cos, signed = ctx.saved_tensors
        return _rotated(query, cos, -signed), _rotated(key, cos, -signed), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, signed: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), signed)


def shorten_rotary(model: nn.Module) -> None:
    """Let the attentions of `model` rotate queries and keys with `_Rotate` in bf16 training steps, in place.

    Only those whose own rotation, a function of transformers beside their class, turns random numbers as `_Rotate`
    does: some models pair other numbers. Attentions with fp32 weights are left alone.
    """
    for module in model.modules():
        short = _shortened(type(module))  # type: ignore[arg-type]  # classes have a hash
        if short is not None and not any(weight.dtype == torch.float32 for weight in module.parameters()):
            module.__class__ = short


@cache
def _shortened(kind: type[nn.Module]) -> type[nn.Module] | None:
    """`kind` with another rotation; None where it has none, or one of another kind."""
    forward = kind.forward
    if not isinstance(forward, types.FunctionType) or NAME not in forward.__code__.co_names:
        return None
    theirs = forward.__globals__.get(NAME)
    if theirs is None or not _is_rotation(theirs):
        return None
    # The same code, with one of the names that it looks up bound to something else: other models are not concerned.
    names = forward.__globals__ | {NAME: _rotation_instead_of(theirs)}
    short = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    short.__kwdefaults__ = forward.__kwdefaults__
    return type(kind.__name__, (kind,), {"forward": short, "__module__": kind.__module__})


def _rotation_instead_of(theirs: Rotation) -> Rotation:
    def rotate(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As transformers' function of this name."""
        plain = not args and not kwargs and q.dtype == k.dtype == cos.dtype == torch.bfloat16
        plain = plain and q.shape[-1] == k.shape[-1] == cos.shape[-1]  # else a part of each head is rotated
        if not plain or not (q.requires_grad and k.requires_grad):
            return theirs(q, k, cos, sin, *args, **kwargs)
        return _Rotate.apply(q, k, cos.unsqueeze(1), sin.unsqueeze(1))

    return rotate


def _is_rotation(theirs: Rotation) -> bool:
    """Whether a model's own function computes what `_Rotate` does."""
    sizes = (2, 4, 3, 8), (2, 2, 3, 8), (2, 3, 4)
    generator = torch.Generator().manual_seed(0)
    q, k, angles = (torch.randn(size, generator=generator, device="cpu") for size in sizes)
    cos, sin = (torch.cat((part, part), dim=-1) for part in (angles.cos(), angles.sin()))
    try:
        wanted = theirs(q, k, cos, sin)
        found = _Rotate.apply(q, k, cos.unsqueeze(1), sin.unsqueeze(1))
        return all(torch.allclose(ours, own, atol=1e-5) for ours, own in zip(found, wanted, strict=True))
    except (TypeError, ValueError, RuntimeError):  # called in another way
        return False
