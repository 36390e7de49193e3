"""The side on which texts are padded, where a model reads its class at the last place."""

from typing import Any

import torch
from torch import nn


def suit_pooling(model: nn.Module, tokenizer: Any) -> None:
    """Let a model that reads the class at the last place, whatever is there, get its padding on the left.

    Such classes say so by `summary_type` last (XLNet). Batches still come padded on the right.
    """
    if pools_last_place(model.config):
        tokenizer.padding_side = "left"  # which an export tells its users
        model.register_forward_pre_hook(_move_left, with_kwargs=True)


def pools_last_place(settings: Any) -> bool:
    """Whether a model with these settings reads the class at the last place, whatever is there."""
    return getattr(settings, "summary_type", None) == "last"


def _move_left(_module: nn.Module, arguments: tuple, batch: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return arguments, batch
    length = mask.shape[1]
    padding = length - (mask * torch.arange(1, length + 1, device=mask.device)).amax(1, keepdim=True)
    places = (torch.arange(length, device=mask.device) - padding) % length
    moved: dict[str, Any] = {
        name: tensor.gather(1, places) if isinstance(tensor, torch.Tensor) and tensor.shape == mask.shape else tensor
        for name, tensor in batch.items()
    }
    if hasattr(mask, "padded"):
        moved["attention_mask"].padded = mask.padded
    return arguments, moved
