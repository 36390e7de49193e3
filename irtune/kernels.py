"""Kernels that are taken where they are faster than what a model would choose by itself."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.liger import apply_liger_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available

log = logging.getLogger("irtune")
CPU_ATTENTION = "sdpa_fp32"


def attention_in_fp32(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of bf16 tensors [batch, heads, length, dim], in training computed in fp32 and returned in bf16.

    On CPUs the backward pass of the bf16 flash kernel takes 2.6 times as long as that of the fp32 one (16 x 120 tokens,
    9 heads: 30.5 against 11.7 ms); the two casts cost less than a tenth of what that saves.
    Evaluation has no backward pass, and stays bit for bit what the model computes elsewhere.
    """
    if not module.training:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return output.to(query.dtype), None


AttentionInterface.register(CPU_ATTENTION, attention_in_fp32)
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

    A layer is compiled anew for each combination of trained or frozen and of an input with or without gradient: at
    most a handful, shared by all layers of one kind.
    """
    for layer in layers:
        layer.compile(dynamic=True)
