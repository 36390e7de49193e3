"""Layers without padding: inside them, the texts of a batch stand one after another in one row.

Outside of them nothing changes: the model embeds a padded batch, with the positions of each text, makes its masks, and
reads its classes from padded hidden states. Before the first layer the places of tokens are taken out, [batch, width,
dim] -> [1, tokens, dim], and behind the last they are put back. Attention is computed text by text, by
kernels/packed.py. A model that `pack_layers` has seen does so for batches whose attention mask has the attribute
`lengths`, which `collate` sets where it is asked to.
"""

import inspect
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

from irtune.models.kernels import takes_any_kernel
from irtune.models.kernels.packed import PACKED, Row, numbers_of, products_by_text

MASKED = {"full_attention", "sliding_attention"}  # kinds of layers whose masks are known
PER_TOKEN = ("position_embeddings", "position_ids")  # what layers get beside hidden states, [batch or 1, width, ...]
_lengths: ContextVar[list[int] | None] = ContextVar("lengths", default=None)
_row: ContextVar[Row | None] = ContextVar("row", default=None)


def cannot_pack(model: Any) -> str | None:
    """Why the layers of `model`, a classifier without adapters, cannot do without padding; None where they can."""
    name, settings = type(model).__name__, model.config.get_text_config()
    if any(isinstance(part, MPNetSelfAttention) for part in model.modules()):
        return None
    kinds = set(getattr(settings, "layer_types", None) or MASKED)
    if not takes_any_kernel(type(model)) or not kinds <= MASKED:
        return f"{name} takes no other attention than its own"
    if model.config._attn_implementation not in PACKED:
        return f"attention {model.config._attn_implementation} needs padding"
    return None


def pack_layers(model: Any, layers: Sequence[nn.Module]) -> None:
    """Let `layers`, all those of `model`, do without padding, in place. `cannot_pack` says whether they can."""
    if model.config._attn_implementation in PACKED and takes_any_kernel(type(model)):
        model.set_attn_implementation(f"packed_{model.config._attn_implementation}")
    for part in model.modules():
        if type(part) is MPNetSelfAttention:
            part.__class__ = _PackedMPNetAttention
    model.register_forward_pre_hook(_enter, with_kwargs=True)
    model.register_forward_hook(_leave, always_call=True)
    layers[0].register_forward_pre_hook(_pack, with_kwargs=True)
    for layer in layers:
        layer.register_forward_pre_hook(_mark, with_kwargs=True)
    layers[-1].register_forward_hook(_unpack)


def tokens_of(mask: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """The attention mask [batch, length] of hidden states [batch, length, dim], also where they stand in one row."""
    if states.shape[:2] == mask.shape:
        return mask
    return (torch.arange(states.shape[1], device=mask.device) < sum(mask.lengths)).to(mask.dtype)[None]  # type: ignore


def _enter(_module: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
    mask = kwargs.get("attention_mask")
    # Where nothing is padded there is nothing to leave out, and models may make no mask.
    _lengths.set(getattr(mask, "lengths", None) if getattr(mask, "padded", False) else None)


def _leave(*_: Any) -> None:
    _lengths.set(None)
    _row.set(None)


def _pack(_layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    lengths = _lengths.get()
    if lengths is None:
        return None
    row = Row.of(lengths, args[0])
    _row.set(row)
    return (row.pack(args[0]), *args[1:]), kwargs


def _mark(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Note the row on the masks, which recomputation gets too, and pack what a layer gets for each token."""
    row = _row.get()
    if row is None:
        return None
    # By name: a reentrant recomputation makes other tensors of those that it gets by place.
    names = list(inspect.signature(layer.forward).parameters)
    kwargs = dict(zip(names[1:], args[1:])) | kwargs

    for name, value in kwargs.items():
        if name in PER_TOKEN and value is not None:
            kwargs[name] = _packed(row, value)
        elif isinstance(value, torch.Tensor) and value.dim() == 4:
            value.row = row  # type: ignore[attr-defined]
    return args[:1], kwargs


def _packed(row: Row, value: Any) -> Any:
    """A tensor without padding, or a tuple of such."""
    if isinstance(value, tuple):
        return tuple(_packed(row, item) for item in value)
    # With the tensor itself, lest another one get its id.
    return row.once(("packed", id(value)), lambda: (value, row.pack(value)))[1]


def _unpack(_layer: nn.Module, _args: tuple, output: Any) -> Any:
    row = _row.get()
    if row is None:
        return None
    return (row.unpack(output[0]), *output[1:]) if isinstance(output, tuple) else row.unpack(output)


class _PackedMPNetAttention(MPNetSelfAttention):
    """MPNet's attention, which does not go through transformers' attention interface."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        output_attentions: bool = False,
        **options: Any,
    ) -> tuple[torch.Tensor, ...]:
        """As MPNet's; attention_mask and position_bias are of the padded batch."""
        row: Row | None = getattr(attention_mask, "row", None)
        if row is None or attention_mask is None or position_bias is None:
            return super().forward(hidden_states, attention_mask, position_bias, output_attentions, **options)
        shape = (*hidden_states.shape[:2], -1, self.attention_head_size)
        query, key, value = (part(hidden_states).view(shape).transpose(1, 2) for part in (self.q, self.k, self.v))
        dropout = self.dropout.p if self.training else 0.0
        numbers = [numbers_of(position_bias, alike=True), numbers_of(attention_mask)]
        found = products_by_text(row, query, key, value, numbers, None, dropout)
        return (self.o(found.flatten(2)),)
