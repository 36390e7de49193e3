"""Attention kernels that compute nothing and keep what the real ones keep, for passes on the meta device.

The fused kernels of scaled_dot_product_attention keep their inputs, their output, the mask as numbers, and the log of
each row's normaliser in fp32. Batches of texts are padded, so there is a mask, and with a mask transformers repeats the
keys and values that several heads share (grouped-query attention).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import moe
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask

from irtune.adapters.prefix_attention import KERNELS, with_prefix
from irtune.models.kernels import attention_kernel, takes_any_kernel
from irtune.models.kernels.attention import CPU_ATTENTION, attention_by_products, is_short


class _Fused(torch.autograd.Function):
    """A fused attention: no scores [length, length] per head are ever kept."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """q, k, v [batch, heads, length, dim], mask [batch, 1, length, length] -> [batch, heads, length, dim]."""
        batch, heads, length = q.shape[:3]
        output = q.new_empty((batch, length, heads, v.shape[-1])).transpose(1, 2)
        normaliser = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        numbers = [] if mask is None else [q.new_empty(mask.shape)]
        ctx.save_for_backward(q, k, v, output, normaliser, *numbers)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        """The gradients' shapes."""
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


def _shared(module: nn.Module, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Keys and values once per head of the queries."""
    return [repeat_kv(tensor, getattr(module, "num_key_value_groups", 1)) for tensor in tensors]


def _sdpa(module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **_: Any) -> Any:
    if mask is not None:
        k, v = _shared(module, k, v)
    return _Fused.apply(q, k, v, mask).transpose(1, 2).contiguous(), None


def _on_cpus(module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **options: Any) -> Any:
    if not module.training:
        return _sdpa(module, q, k, v, mask)
    if is_short(k, options):
        return attention_by_products(module, q, k, v, mask, **options)
    return _sdpa(module, q.float(), k.float(), v.float(), mask)[0].to(q.dtype), None


def _flash(module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _mask: Any, **_: Any) -> Any:
    return _Fused.apply(q, k, v, None).transpose(1, 2).contiguous(), None


def _eager(module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **_: Any) -> Any:
    k, v = _shared(module, k, v)
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v).transpose(1, 2).contiguous(), weights


# Making a mask must not look at values, which the meta device does not have, to see whether it can be left out.
_ALWAYS = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}


def _bool_mask(*arguments: Any, **options: Any) -> torch.Tensor | None:
    return sdpa_mask(*arguments, **(options | _ALWAYS))


def _number_mask(*arguments: Any, **options: Any) -> torch.Tensor:
    return eager_mask(*arguments, **(options | _ALWAYS))


def _no_mask(*_: Any, **__: Any) -> None:
    return None


_STAND_INS: dict[str, tuple[Any, Any]] = {
    "sdpa": (_sdpa, _bool_mask),
    CPU_ATTENTION: (_on_cpus, _bool_mask),
    "flash_attention_2": (_flash, _no_mask),
    "eager": (_eager, _number_mask),
}
for _name, (_kernel, _mask) in _STAND_INS.items():
    AttentionInterface.register(f"planned_{_name}", _kernel)
    AttentionMaskInterface.register(f"planned_{_name}", _mask)
    if _name in KERNELS:  # those that prefixes can precede
        KERNELS[f"planned_{_name}"] = _kernel
        AttentionInterface.register(f"prefix_planned_{_name}", with_prefix(_kernel))
        AttentionMaskInterface.register(f"prefix_planned_{_name}", _mask)


def _has_meta_product(_input: torch.Tensor, weight: torch.Tensor, _offsets: torch.Tensor) -> bool:
    return weight.dtype == torch.bfloat16


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """A context in which kernels that models keep as their own do not look at values, which the meta device lacks.

    Those are the masks of transformers' attentions, and a product of experts that on that device takes bf16 only.
    """
    kept = {name: ALL_MASK_ATTENTION_FUNCTIONS[name] for name in ("sdpa", "eager")}
    grouped = moe._can_use_grouped_mm
    AttentionMaskInterface.register("sdpa", _bool_mask)
    AttentionMaskInterface.register("eager", _number_mask)
    moe._can_use_grouped_mm = _has_meta_product  # type: ignore[assignment]
    try:
        yield
    finally:
        moe._can_use_grouped_mm = grouped
        for name, mask in kept.items():
            AttentionMaskInterface.register(name, mask)


@contextlib.contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """A context in which `attention_places` finds the attentions of a model on the meta device.

    It calls the model without a mask, and then transformers looks at positions for texts that share a row.
    """

    def with_mask(_module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return arguments, {"attention_mask": torch.ones_like(keywords["input_ids"])} | keywords

    handle = model.register_forward_pre_hook(with_mask, with_kwargs=True)
    AttentionMaskInterface.register("prefix_trace", _no_mask)
    try:
        yield
    finally:
        AttentionMaskInterface.register("prefix_trace", sdpa_mask)
        handle.remove()


def stand_in(wanted: str, dtype: torch.dtype, device: str, kind: type[Any]) -> str:
    """Name of the stand-in for the attention that a run on `device` (cuda or cpu) gives a model of the class `kind`.

    Classes that take no other kernel than their own keep it.
    """
    chosen = attention_kernel(wanted, dtype, kind, on_cpu=device == "cpu")
    return f"planned_{chosen}" if takes_any_kernel(kind) and chosen in _STAND_INS else chosen
