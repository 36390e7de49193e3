"""Attention of texts that stand one after another in one row: each text by itself.

The model makes its masks for the padded batch, as ever; a `Row` that goes with a mask says that queries, keys and
values are without padding. Text i then gets its own corner of row i of the mask.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from irtune.models.kernels.attention import CPU_ATTENTION, SHORT, attention_on_cpus
from irtune.models.kernels.masks import sdpa_mask_by_mark

ROW_MULTIPLE, TEXT_MULTIPLE = 64, 16  # in bf16 on CPUs, where every new shape of a product is compiled
PACKED: dict[str, Any] = {"sdpa": sdpa_attention_forward, CPU_ATTENTION: attention_on_cpus}


@dataclass
class Row:
    """Texts one after another, and behind them places that nothing reads.

    lengths: of the texts, in tokens. width: of the padded batch. places: where each place of the row comes from in the
    flattened batch, int64 [tokens]; the last `tail` of them come from anywhere. multiple: the attention of a text
    reads so many places, of which the mask hides those of the next text; the tail is long enough for the last one.
    """

    lengths: list[int]
    width: int
    places: torch.Tensor
    tail: int
    multiple: int
    _made: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, lengths: list[int], hidden: torch.Tensor) -> "Row":
        """The row of the texts of a batch whose hidden states are `hidden` [batch, width, dim]."""
        few_shapes = hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu"
        multiple, total, width = TEXT_MULTIPLE if few_shapes else 1, sum(lengths), hidden.shape[1]
        tail = -(-(total + multiple - 1) // ROW_MULTIPLE) * ROW_MULTIPLE - total if few_shapes else 0
        places = [torch.arange(length) + number * width for number, length in enumerate(lengths)]
        row = torch.cat([*places, torch.zeros(tail, dtype=torch.long)])
        if hidden.device.type == "cuda":
            row = row.pin_memory()
        return cls(lengths, width, row.to(hidden.device, non_blocking=True), tail, multiple)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returned when it was first asked for under `key`: all layers share it."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """[batch or 1, width, ...] -> [1, tokens, ...]."""
        flat, places = states.flatten(0, 1), self.places
        if states.shape[0] != len(self.lengths):  # the same for all texts
            places = self.once("positions", lambda: self.places % self.width)
        return flat.index_select(0, places).unsqueeze(0)

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """[1, tokens, dim] -> [batch, width, dim], with zeros in place of padding."""
        total = sum(self.lengths)
        padded = states.new_zeros(len(self.lengths) * self.width, states.shape[-1])
        return padded.index_copy(0, self.places[:total], states[0, :total]).view(len(self.lengths), self.width, -1)

    def offsets(self, device: torch.device) -> torch.Tensor:
        """Where texts begin and the last one ends, int32 [texts + 1]."""

        def make() -> torch.Tensor:
            ends = torch.tensor([0, *self.lengths]).cumsum(0).int()
            return (ends.pin_memory() if device.type == "cuda" else ends).to(device, non_blocking=True)

        return self.once("offsets", make)


def numbers_of(mask: torch.Tensor, *, alike: bool = False) -> torch.Tensor:
    """A mask as numbers to add, in fp32 or wider; only that of the first text where those of all texts are `alike`.

    All layers share it. The mask keeps it, since it refers to its `Row`: a row that kept masks would be a cycle, whose
    tensors stay until Python looks for such.
    """
    found: torch.Tensor | None = getattr(mask, "numbers", None)
    if found is None:
        wide = torch.promote_types(mask.dtype, torch.float32) if mask.is_floating_point() else torch.float32
        one = mask.detach()[:1] if alike else mask.detach()
        if mask.dtype == torch.bool:
            found = torch.zeros(one.shape, device=mask.device).masked_fill_(~one, torch.finfo(wide).min)
        else:
            found = one.to(wide, copy=True)  # a view would refer to the mask
        mask.numbers = found  # type: ignore[attr-defined]
    return found


def text_by_text(kernel: Any) -> Any:
    """The attention function that calls `kernel` where no `Row` goes with the mask, and attends text by text else."""

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        row: Row | None = getattr(attention_mask, "row", None)
        if row is None or attention_mask is None:
            return kernel(module, query, key, value, attention_mask, **options)
        dropout, scaling = options.get("dropout") or 0.0, options.get("scaling")
        keeps_probabilities = query.element_size() == 2 or dropout  # as attention of padded batches does
        if query.device.type == "cpu" and keeps_probabilities and max(row.lengths) <= SHORT:
            return products_by_text(row, query, key, value, [numbers_of(attention_mask)], scaling, dropout), None
        if _on_gpu(query, dropout) and query.shape[-1] == value.shape[-1] <= 256:
            return _by_flash(row, module, query, key, value, options), None
        return _by_kernel(kernel, row, module, query, key, value, attention_mask, options), None

    return attention


def _on_gpu(query: torch.Tensor, dropout: float) -> bool:
    """Whether torch's flash attention takes tensors like this one."""
    return query.device.type == "cuda" and query.element_size() == 2 and not dropout


def _by_kernel(
    kernel: Any,
    row: Row,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    options: dict[str, Any],
) -> torch.Tensor:
    """`kernel` for one text after the other."""
    sizes = [*row.lengths, row.tail] if row.tail else row.lengths
    found = []
    for number, (length, *text) in enumerate(
        zip(row.lengths, *(tensor.split(sizes, dim=2) for tensor in (query, key, value)))
    ):
        corner = mask[number % mask.shape[0]].unsqueeze(0)[..., :length, :length]
        found.append(kernel(module, *text, corner, **options)[0])
    if row.tail:
        found.append(found[0].new_zeros(1, row.tail, *found[0].shape[2:]))
    return torch.cat(found, dim=1)


def _by_flash(
    row: Row, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """torch's flash attention for texts of various lengths, which needs no mask: `can_pack` knows the masks."""
    causal, window = options.get("is_causal"), options.get("sliding_window")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    reach = -1 if window is None else window - 1  # as transformers calls flash attention
    offsets, longest = row.offsets(query.device), max(row.lengths)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    attend: Any = varlen_attn
    output = attend(
        q,
        k,
        v,
        offsets,
        offsets,
        longest,
        longest,
        scale=options.get("scaling"),
        window_size=(reach, 0 if causal else reach),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.unsqueeze(0)


def products_by_text(
    row: Row,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masks: list[torch.Tensor],
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """As `attention_by_products`, in any format: softmax(q k^T * scaling + masks) v, text by text.

    Args:
        row: the texts.
        query: [1, heads, tokens, dim].
        key, value: [1, kv_heads, tokens, dim].
        masks: each [batch or 1, heads or 1, width, width], added; see `numbers_of`.
        scaling: None: 1 / sqrt(dim).
        dropout: of the probabilities.

    Returns:
        [1, tokens, heads, dim], with zeros in the tail.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _ProductsByText.apply(query, key, value, row, masks, scaling, dropout)


class _ProductsByText(torch.autograd.Function):
    """Keeps q, k, v, and of each text the probabilities in the format of q and what dropout left."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        row: Row,
        masks: list[torch.Tensor],
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        """Shapes as in `products_by_text`."""
        heads, shared = query.shape[1], key.shape[1]
        output = query.new_zeros(1, query.shape[2], heads, value.shape[3])
        kept, start = [], 0
        for number, length in enumerate(row.lengths):
            read = _read(row, length)
            q, k, v = (tensor[0, :, start : start + read] for tensor in (query, key, value))
            products = torch.bmm(q.reshape(shared, -1, q.shape[-1]), k.transpose(1, 2)).view(heads, read, read)
            first, *more = [mask[number % mask.shape[0], :, :read, :read] for mask in masks]
            scores = torch.add(first, products, alpha=scaling)
            for mask in more:
                scores += mask
            weights = torch.softmax(scores, dim=-1).to(q.dtype).view(shared, -1, read)
            applied = weights
            if dropout:
                applied, left = torch.native_dropout(weights, dropout, True)
                kept.append(left)
            kept.append(weights)
            found = torch.bmm(applied, v).view(heads, read, -1)
            output[0, start : start + length] = found[:, :length].transpose(0, 1)
            start += length
        ctx.save_for_backward(query, key, value, *kept)
        ctx.row, ctx.scaling, ctx.dropout = row, scaling, dropout
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        """As that of `attention_by_products`. A text's gradients are of its own places only."""
        query, key, value, *kept = ctx.saved_tensors
        shared, start = key.shape[1], 0
        found = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)]
        for number, length in enumerate(ctx.row.lengths):
            read = _read(ctx.row, length)
            q, k, v = (tensor[0, :, start : start + read] for tensor in (query, key, value))
            q = q.reshape(shared, -1, q.shape[-1])
            of_output = gradient[0, start : start + read].transpose(0, 1).contiguous()
            of_output[:, length:] = 0  # that of the next text
            of_output = of_output.view(shared, -1, of_output.shape[-1])
            weights = kept[(number + 1) * (2 if ctx.dropout else 1) - 1]
            of_weights = torch.bmm(of_output, v.transpose(1, 2))
            applied = weights
            if ctx.dropout:
                left = kept[2 * number].to(weights.dtype) / (1 - ctx.dropout)
                applied, of_weights = weights * left, of_weights * left
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(ctx.scaling)
            parts = (
                torch.bmm(of_scores, k).view(query.shape[1], read, -1),
                torch.bmm(of_scores.transpose(1, 2), q),
                torch.bmm(applied.transpose(1, 2), of_output),
            )
            for whole, part in zip(found, parts):
                whole[0, :, start : start + length] = part[:, :length]
            start += length
        return *found, None, None, None, None


def _read(row: Row, length: int) -> int:
    """Places that the attention of a text of `length` tokens reads."""
    return min(-(-length // row.multiple) * row.multiple, row.width)


for _name, _kernel in PACKED.items():
    AttentionInterface.register(f"packed_{_name}", text_by_text(_kernel))
    AttentionMaskInterface.register(f"packed_{_name}", sdpa_mask_by_mark)
