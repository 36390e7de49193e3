"""Kernels that are taken where they are faster than what a model would choose by itself."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch._dynamo
from torch import nn
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available

from irtune.models.kernels.attention import CPU_ATTENTION
from irtune.models.kernels.hardware import check_gpu, missing_compiler
from irtune.models.kernels.masks import track_padding
from irtune.models.kernels.norms import shorten_norms
from irtune.models.kernels.rotary import shorten_rotary

__all__ = [
    "add_fused_kernels",
    "attention_kernel",
    "check_gpu",
    "compile_layers",
    "shorten_on_cpus",
    "takes_any_kernel",
    "track_padding",
    "without_flash_on_cpu",
]

log = logging.getLogger("irtune")
COMBINATIONS = 64  # of what a compiled layer depends on


def attention_kernel(wanted: str, dtype: torch.dtype, kind: type[Any], *, on_cpu: bool | None = None) -> str:
    """The attention implementation that a model of the class `kind` gets for `model.attn_implementation`.

    One that the class does not have, or whose package is missing, is replaced by one that it has; that is said once.

    Args:
        wanted: sdpa, eager or flash_attention_2.
        dtype: number format of the model.
        kind: a class of transformers.
        on_cpu: whether the model runs on a CPU (None: whether this machine has no GPU).
    """
    on_cpu = not torch.cuda.is_available() if on_cpu is None else on_cpu
    if wanted == "flash_attention_2" and not getattr(kind, "_supports_flash_attn", False):
        _say_once(f"{kind.__name__} has no flash attention in transformers; sdpa is used instead")
        wanted = "sdpa"
    if wanted == "flash_attention_2" and not is_flash_attn_2_available():
        _say_once(
            "model.attn_implementation flash_attention_2 needs the package flash-attn, which is not installed here; "
            "sdpa is used instead"
        )
        wanted = "sdpa"
    if wanted == "sdpa" and not getattr(kind, "_supports_sdpa", False):
        _say_once(f"{kind.__name__} has no sdpa attention in transformers; its own (eager) is used instead")
        wanted = "eager"
    if wanted == "sdpa" and on_cpu and dtype == torch.bfloat16:
        if takes_any_kernel(kind):
            return CPU_ATTENTION
        _say_once(f"{kind.__name__} takes no other attention than its own, and keeps it on this CPU")
    return wanted


def takes_any_kernel(kind: type[Any]) -> bool:
    """Whether a class of transformers declares that its attention is whatever `AttentionInterface` holds.

    Classes that do not declare it may still accept a registered name, and then add a boolean mask to their scores.
    """
    declared = getattr(kind, "_supports_sdpa", False) and getattr(kind, "_supports_attention_backend", False)
    return bool(declared) and kind._can_set_attn_implementation()


@cache
def _say_once(sentence: str) -> None:
    log.warning("%s", sentence)


@contextmanager
def without_flash_on_cpu(model: Any) -> Iterator[None]:
    """Inside, a model that is still on the CPU attends by sdpa in place of flash attention, which needs a GPU."""
    wanted = model.config._attn_implementation
    if wanted != "flash_attention_2" or model.device.type != "cpu":
        yield
        return
    model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        model.config._attn_implementation = wanted


def shorten_on_cpus(model: nn.Module, *, compiled: bool) -> None:
    """Let a training step in bf16 on CPUs go over memory less often: norms and rotary embeddings, in place.

    Together they save 6 % of a step of SmolLM2 (80 of 1,355 ms, `python -m benchmarks.speed --sides a --profile a`).
    Of layers that are `compiled`, norms only: torch.compile cannot see through the other rotation, and fuses its own.
    """
    shorten_norms(model)
    if not compiled:
        shorten_rotary(model)


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

    A layer is compiled once for each combination of trained or frozen, with or without an update, with or without a
    gradient of its input, recomputed or not, training or evaluation; all layers of one kind share them. Says so where
    there is no compiler; the layers stay as they are then.
    """
    missing = missing_compiler(on_cpu=not torch.cuda.is_available())
    if missing:
        log.warning("model.compile needs a compiler (%s), and there is none; the layers are not compiled", missing)
        return
    # By default torch stops compiling after 8 of them.
    torch._dynamo.config.recompile_limit = max(COMBINATIONS, torch._dynamo.config.recompile_limit)
    for layer in layers:
        layer.compile(dynamic=True)
