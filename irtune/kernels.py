"""Kernels that are taken where they are faster than what a model would choose by itself."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

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
    """The attention implementation to load a model with, for `model.attn_implementation` and its number format."""
    on_cpu = not torch.cuda.is_available()
    return CPU_ATTENTION if on_cpu and wanted == "sdpa" and dtype == torch.bfloat16 else wanted
