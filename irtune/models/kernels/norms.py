"""RMS norms of a model on CPUs, with a backward pass of few passes over memory."""

from functools import cache
from typing import Any

import torch
from torch import nn

PROBE = 8  # hidden size at which a class is tried


class _RMSNorm(torch.autograd.Function):
    """w * x / rms(x) for a constant w. Keeps x and one number per row, where autograd keeps x in fp32 as well."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [..., hidden] -> the same shape and dtype, computed in fp32 in the order of transformers' norms."""
        wide = x.to(torch.float32, copy=True)  # written over below
        scale = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return wide.mul_(scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        """With s = 1 / rms(x) and h = w * gradient: s h - x s^3 (h . x) / hidden."""
        x, weight, scale = ctx.saved_tensors
        wide, result = x.float(), gradient.float() * weight.float()
        along = torch.linalg.vecdot(result, wide).unsqueeze(-1) * scale.pow(3) / -x.shape[-1]
        return result.mul_(scale).addcmul_(wide, along).to(x.dtype), None, None


class _ShortNorm(nn.Module):
    """Mixed into a class of norms: a training step over constant weights takes `_RMSNorm`."""

    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> the same shape and dtype."""
        if self.training and hidden_states.requires_grad and not self.weight.requires_grad:
            return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


def shorten_norms(model: nn.Module) -> None:
    """Let the bf16 RMS norms of `model` compute the same numbers with a shorter backward pass, in place.

    Classes whose forward pass is not bit for bit w * x / rms(x), tried on random numbers, are left alone.
    """
    for module in model.modules():
        kind = type(module)
        weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
        if isinstance(weight, nn.Parameter) and eps is not None and weight.dtype == torch.bfloat16:
            short = _shortened(kind)  # type: ignore[arg-type]  # classes have a hash
            if short is not None:
                module.__class__ = short


@cache
def _shortened(kind: type[nn.Module]) -> type[nn.Module] | None:
    """`kind` with `_ShortNorm` before it; None where it computes something else."""
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.device("cpu"):
            norm: Any = kind(PROBE).to(torch.bfloat16)
            norm.weight.data = torch.randn(PROBE, generator=generator).bfloat16()
            x = torch.randn(64, PROBE, generator=generator).bfloat16()
            same = torch.equal(norm(x), _RMSNorm.apply(x, norm.weight, norm.variance_epsilon))
    except (TypeError, AttributeError, RuntimeError):  # made in another way
        return None
    return type(kind.__name__, (_ShortNorm, kind), {"__module__": kind.__module__}) if same else None
