"""Kernels that are taken where they are faster than what a model would choose by itself."""

import logging
from collections.abc import Sequence

import torch
import torch._dynamo
from torch import nn
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available

from irtune.models.kernels.attention import CPU_ATTENTION
from irtune.models.kernels.masks import track_padding

__all__ = ["add_fused_kernels", "attention_kernel", "compile_layers", "track_padding"]

log = logging.getLogger("irtune")
COMBINATIONS = 64  # of what a compiled layer depends on


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
