"""Keys and values that are put before those of an attention, in any model whose attention goes through transformers.

Attention modules are not known by name: one forward pass shows which module of a layer calls the kernel, and with how
many heads of which size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from irtune.adapters.trainable import layer_list
from irtune.distributed.partitioned import runnable
from irtune.errors import ConfigError, ModelError
from irtune.models import Classifier
from irtune.models.kernels import takes_any_kernel
from irtune.models.kernels.attention import CPU_ATTENTION, attention_on_cpus
from irtune.models.kernels.masks import sdpa_mask_by_mark

KERNELS: dict[str, Any] = {"sdpa": sdpa_attention_forward, CPU_ATTENTION: attention_on_cpus}


class KeysAndValues(nn.Module):
    """Base of what gives an attention more keys and values."""

    def forward(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """key, value [batch, heads, length, dim] -> the same with P more in front, [batch, heads, P + length, dim]."""
        raise NotImplementedError


@dataclass(frozen=True)
class AttentionPlace:
    """An attention: its module, and the heads and dimensions of its keys and values."""

    module: nn.Module
    heads: int
    key_dim: int
    value_dim: int


def with_prefix(kernel: Any, trace: list[AttentionPlace] | None = None) -> Any:
    """The attention function that puts a module's `prefix` before its keys and values and then calls `kernel`.

    `trace` is filled with the attentions that are called.
    """

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        if trace is not None:
            trace.append(AttentionPlace(module, key.shape[1], key.shape[3], value.shape[3]))
        prefix = getattr(module, "prefix", None)
        if isinstance(prefix, KeysAndValues):
            length = key.shape[2]
            key, value = prefix(key, value)
            attention_mask = _wider(module, attention_mask, query, key.shape[2] - length, options)
        return kernel(module, query, key, value, attention_mask, **options)

    return attention


def _wider(
    module: nn.Module, mask: torch.Tensor | None, query: torch.Tensor, more: int, options: dict[str, Any]
) -> torch.Tensor | None:
    """The mask with `more` keys in front that every query sees; None stays None where nothing is masked."""
    if mask is None:
        causal = options.get("is_causal")
        if not (getattr(module, "is_causal", True) if causal is None else causal):
            return None
        length = query.shape[2]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device).tril()
    front = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
    return torch.cat([front(*mask.shape[:3], more), mask], dim=3)


for _name, _kernel in KERNELS.items():
    AttentionInterface.register(f"prefix_{_name}", with_prefix(_kernel))
    AttentionMaskInterface.register(f"prefix_{_name}", sdpa_mask_by_mark)
AttentionMaskInterface.register("prefix_trace", sdpa_mask_by_mark)


def attention_places(classifier: Classifier, kind: str) -> list[AttentionPlace]:
    """The attention of each layer, after making the model look for prefixes.

    Raises:
        ConfigError: when another kernel than sdpa was asked for.
        ModelError: when the layers' attention does not go through transformers' attention interface.
    """
    model: Any = classifier.model
    kernel = model.config._attn_implementation
    if not takes_any_kernel(type(model)):
        raise _no_place(model, kind)
    if kernel not in KERNELS:
        raise ConfigError(f"adapter.type {kind} needs model.attn_implementation sdpa, not {kernel}")
    trace: list[AttentionPlace] = []
    AttentionInterface.register("prefix_trace", with_prefix(KERNELS[kernel], trace))
    model.set_attn_implementation("prefix_trace")
    training = model.training
    model.eval()
    with torch.no_grad(), runnable(model, layer_list(classifier)):
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device))
    model.train(training)
    model.set_attn_implementation(f"prefix_{kernel}")
    layers = [list(layer.modules()) for layer in layer_list(classifier)]
    found = [[place for place in trace if place.module in modules] for modules in layers]
    if any(len(places) != 1 for places in found):
        raise _no_place(model, kind)
    return [places[0] for places in found]


def _no_place(model: nn.Module, kind: str) -> ModelError:
    return ModelError(
        f"adapter.type {kind}: {type(model).__name__} does not have one attention per layer that goes through "
        "transformers' attention interface; use lora or bottleneck"
    )
