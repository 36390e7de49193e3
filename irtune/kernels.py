"""Kernels that are taken where they are faster than what a model would choose by itself."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch._dynamo
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.liger import apply_liger_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available

log = logging.getLogger("irtune")
CPU_ATTENTION = "cpu_bf16"
SHORT = 512  # keys, up to which probabilities are kept
COMBINATIONS = 64  # of what a compiled layer depends on


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
    flash kernel takes 2.6 times as long as that of the fp32 one (16 x 120 tokens, 9 heads: 30.5 against 11.7 ms).
    Evaluation has no backward pass, and stays bit for bit what the model computes elsewhere.
    """
    if not module.training:
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
    since keys and values are neither repeated nor widened. Scores are rounded to bf16, as in transformers' own eager
    attention.

    Args:
        module: the attention, asked for `is_causal` where the argument is None.
        query: [batch, heads, length, dim].
        key, value: [batch, kv_heads, keys, dim]; kv_heads divides heads.
        attention_mask: bool, True where a query sees a key, or numbers to add; [batch or 1, 1 or heads, length, keys].
        scaling: None: 1 / sqrt(dim).
        is_causal: whether a query sees itself and what is before it only, where there is no mask.
    """
    batch, heads, length, dim = query.shape
    shared, keys = key.shape[1:3]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal:
        attention_mask = torch.ones(1, 1, length, keys, dtype=torch.bool, device=query.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        hidden = query.new_full((), torch.finfo(query.dtype).min)
        attention_mask = torch.where(attention_mask, query.new_zeros(()), hidden)
    query = query * (dim**-0.5 if scaling is None else scaling)
    query = query.reshape(batch * shared, heads // shared * length, dim)
    scores = torch.bmm(query, key.reshape(batch * shared, keys, dim).transpose(1, 2)).view(batch, heads, length, keys)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1).view(batch * shared, -1, keys)
    output = torch.bmm(weights, value.reshape(batch * shared, keys, -1))
    return output.view(batch, heads, length, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(CPU_ATTENTION, attention_on_cpus)
AttentionMaskInterface.register(CPU_ATTENTION, sdpa_mask)


def attention_kernel(wanted: str, dtype: torch.dtype) -> str:
    """The attention implementation to load a model with, for `model.attn_implementation` and its number format.

    Says so where the package of the wanted one is missing; sdpa is taken then.
    """
    if wanted == "flash_attention_2" and not is_flash_attn_2_available():
        log.warning(
            "model.attn_implementation flash_attention_2 needs the package flash-attn, which is not installed here; "
            "sdpa is used instead"
        )
        wanted = "sdpa"
    on_cpu = not torch.cuda.is_available()
    return CPU_ATTENTION if on_cpu and wanted == "sdpa" and dtype == torch.bfloat16 else wanted


def add_fused_kernels(model: nn.Module) -> None:
    """Replace norms, rotary embeddings and feed-forward activations by the fused kernels of liger-kernel, in place.

    Says so where they cannot be used; the model keeps its own kernels then.
    """
    missing = None
    if not torch.cuda.is_available():
        missing = "a GPU, and there is none"
    elif not is_liger_kernel_available():
        missing = "the package liger-kernel (0.3.0 or newer), which is not installed here"
    if missing:
        log.warning("model.fused_kernels needs %s; the model's own kernels are used instead", missing)
        return
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})  # the loss is irtune's


def compile_layers(layers: Sequence[nn.Module]) -> None:
    """Compile each layer by itself, with lengths that may change, in place.

    A layer is compiled anew for each combination of trained or frozen, with or without an update, with or without a
    gradient of its input, recomputed or not, training or evaluation; all layers of one kind share them.
    """
    # By default torch goes on without compiling after 8 of them.
    torch._dynamo.config.recompile_limit = max(COMBINATIONS, torch._dynamo.config.recompile_limit)
    for layer in layers:
        layer.compile(dynamic=True)
