"""Attention on CPUs in bf16: two batched products for short texts, fp32 for long ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from irtune.models.kernels.masks import sdpa_mask_by_mark

CPU_ATTENTION = "cpu_bf16"
SHORT = 512  # keys, up to which probabilities are kept


_as_in_training: ContextVar[bool] = ContextVar("as_in_training", default=False)


@contextmanager
def as_in_training() -> Iterator[None]:
    """Inside, evaluation takes the attention of training, which can then be compared without dropout."""
    token = _as_in_training.set(True)
    try:
        yield
    finally:
        _as_in_training.reset(token)


def attention_on_cpus(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of bf16 tensors [batch, heads, length, dim] to [batch, length, heads, dim], as in transformers.

    In training, of short texts by `attention_by_products`, of long ones in fp32: on CPUs the backward pass of the bf16
    flash kernel is slower than that of the fp32 one.
    Evaluation has no backward pass, and stays bit for bit what the model computes elsewhere.
    """
    if not (module.training or _as_in_training.get()):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if is_short(key, options):
        return attention_by_products(module, query, key, value, attention_mask, **options)
    output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return output.to(query.dtype), None


def is_short(key: torch.Tensor, options: dict[str, Any]) -> bool:
    """Whether a training step takes `attention_by_products` for `key` [batch, heads, length, dim]."""
    special = options.get("dropout") or options.get("position_bias") is not None
    return key.shape[2] <= SHORT and not special


def attention_by_products(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(q k^T * scaling + mask) v as two batched bf16 products, heads that share keys in one.

    For short texts on CPUs those are faster, forward and backward, than the fp32 flash kernel, and keep fewer bytes,
    since keys and values are neither repeated nor widened. Products are rounded to bf16, as in transformers' own eager
    attention; the softmax is fp32, which is faster on CPUs than a bf16 one.

    Args:
        module: the attention, asked for `is_causal` where the argument is None.
        query: [batch, heads, length, dim].
        key, value: [batch, kv_heads, keys, dim]; kv_heads divides heads.
        attention_mask: bool, True where a query sees a key, or numbers to add; [batch or 1, 1 or heads, length, keys].
        scaling: None: 1 / sqrt(dim).
        is_causal: whether a query sees itself and what is before it only, where there is no mask.
    """
    length, keys = query.shape[2], key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None:
        attention_mask = torch.ones(1, 1, length, keys, dtype=torch.bool, device=query.device)
        attention_mask = attention_mask.tril() if causal else attention_mask
    if attention_mask.dtype == torch.bool:
        hidden = torch.full((), torch.finfo(wide).min, dtype=wide, device=query.device)
        attention_mask = torch.where(attention_mask, torch.zeros_like(hidden), hidden)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = _ByProducts.apply(query, key, value, attention_mask.to(wide), scaling)
    return output.transpose(1, 2).contiguous(), None


class _ByProducts(torch.autograd.Function):
    """softmax(scaling * q k^T + mask) v. Keeps q, k, v and the probabilities in the format of q."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Shapes as in `attention_by_products`, `mask` in fp32 or wider -> [batch, heads, length, dim]."""
        (batch, heads, length, dim), (shared, keys) = query.shape, key.shape[1:3]
        q = query.reshape(batch * shared, -1, dim)
        k, v = key.reshape(batch * shared, keys, dim), value.reshape(batch * shared, keys, -1)
        products = torch.bmm(q, k.transpose(1, 2)).view(batch, heads, length, keys)
        scores = torch.add(mask, products, alpha=scaling)
        weights = torch.softmax(scores, dim=-1).to(q.dtype).view(batch * shared, -1, keys)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scaling, ctx.shapes = scaling, (query.shape, key.shape, value.shape)
        return torch.bmm(weights, v).view(batch, heads, length, -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        """With probabilities p and their gradient g: that of the scores is p (g - sum of p g over the keys)."""
        q, k, v, weights = ctx.saved_tensors
        gradient = gradient.reshape(*q.shape[:2], -1)
        of_value = torch.bmm(weights.transpose(1, 2), gradient)
        of_weights = torch.bmm(gradient, v.transpose(1, 2))
        # What autograd calls for torch.softmax.
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(ctx.scaling)
        found = torch.bmm(of_scores, k), torch.bmm(of_scores.transpose(1, 2), q), of_value
        return *(tensor.view(shape) for tensor, shape in zip(found, ctx.shapes)), None, None


AttentionInterface.register(CPU_ATTENTION, attention_on_cpus)
AttentionMaskInterface.register(CPU_ATTENTION, sdpa_mask_by_mark)
