"""Attention masks without a look at the device.

transformers leaves the mask of torch's fused attention out where no example is padded, and reads the padding mask on
the host to find out. `data.collate` knows, and notes it on the mask: an attribute `padded`, true where it holds a 0.
A model that `track_padding` has seen makes the same masks without that read. Masks without the attribute are read.
"""

from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

_padded: ContextVar[bool | None] = ContextVar("padded", default=None)  # None: not known


def track_padding(model: nn.Module) -> None:
    """Let a model of transformers that is called with an `attention_mask` of collate's not read it on the host."""

    def enter(_module: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        _padded.set(getattr(kwargs.get("attention_mask"), "padded", None))

    model.register_forward_pre_hook(enter, with_kwargs=True)
    model.register_forward_hook(lambda *_: _padded.set(None) and None, always_call=True)


def sdpa_mask_by_mark(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """As transformers' sdpa_mask, with its results."""
    padded, mask = _padded.get(), kwargs.get("attention_mask")
    if padded:
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    elif padded is False and mask is not None and mask.shape[-1] == kwargs["q_length"] == kwargs["kv_length"]:
        kwargs["attention_mask"] = None  # neither a prefix nor a cache precedes it
    return sdpa_mask(*args, **kwargs)


AttentionMaskInterface.register("sdpa", sdpa_mask_by_mark)
