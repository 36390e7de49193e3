"""What a configuration will need, counted on a model without weights: parameters, state, activations, communication.

Nothing is loaded. Adapters are built on the meta device, and activations are those tensors that a forward pass there
keeps for the backward pass. The attention kernel is taken to keep its inputs, its output and one number per row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from irtune.adapters import LayerTable, add_adapters
from irtune.config import Config
from irtune.errors import ConfigError
from irtune.models import Classifier, is_linear
from irtune.shapes import empty_classifier

ATTENTION = "planner"
RESERVE = 1.5 * 2**30  # bytes of a GPU that are never ours: CUDA context, communication buffers, fragments
NF4_BITS = (
    4 + 8 / 64 + 32 / (64 * 256)
)  # double quantisation: an 8-bit scale per 64 weights, an fp32 one per 256 scales
NOT_PLANNED = ("ltuning-prompt", "ltuning-prefix", "prompt", "prefix")


class _FlashAttention(torch.autograd.Function):
    """Keeps what flash attention keeps: q, k, v, the output, and the log of each row's normaliser in fp32."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v [batch, heads, length, dim] -> [batch, heads, length, dim]."""
        output = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, output, torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Never called: nothing is computed on the meta device."""
        raise NotImplementedError


def _attention(module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **_: Any) -> Any:
    return _FlashAttention.apply(q, k, v).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@dataclass(frozen=True)
class Parts:
    """Counts of a model, in elements or bytes of the whole model.

    linear: weights of the layers' linear modules, which quantisation shrinks. rest: other constant weights.
    layers: for each layer, the elements of each trainable parameter. head: those of the head.
    activations: bytes kept for the backward pass of one example of `length` tokens when `selected` layers train.
    transient: bytes of one layer's activations, which the backward pass or a recomputation needs at a time.
    boundary: bytes of one layer's input for one example.
    """

    linear: int
    rest: int
    layers: list[list[int]]
    head: list[int]
    activations: int
    transient: int
    boundary: int
    weight_bytes: int
    trained_bytes: int


@dataclass(frozen=True)
class Estimate:
    """Bytes per rank under one ZeRO stage and format of the base; `fits` is None without a known memory."""

    stage: int
    quantization: str
    base: int
    adapters: int
    gradients: int
    optimizer: int
    optimizer_full: int
    activations: int
    host: int
    sent_per_step: int
    total: int
    fits: bool | None
    largest_micro_batch: int | None


def count(config: Config, selected: Sequence[int] | None = None) -> Parts:
    """Count the model of `config` with its adapters; `selected` layers train (None: as `worst_selection` says).

    Raises:
        ConfigError: for adapter types that need the tokenizer or the weights to be built.
    """
    if config.adapter.type in NOT_PLANNED:
        raise ConfigError(f"plan: adapter.type {config.adapter.type} is not planned yet; use one of the other types")
    model, anatomy = empty_classifier(config.model, len(config.data.labels or ()) or 5, ATTENTION)
    linear = sum(
        module.weight.numel()
        for layer in model.get_submodule(anatomy.layers).children()
        for module in layer.modules()
        if is_linear(module)
    )
    adapter = config.adapter
    if adapter.type == "pissa":  # the same shapes; its first values come from weights that are not here
        adapter = type(adapter)(**(vars(adapter) | {"type": "lora"}))
    classifier = Classifier(model, SimpleNamespace(), anatomy)  # type: ignore[arg-type]
    with torch.device("meta"):
        network, table = add_adapters(classifier, adapter)
    trained = {id(parameter) for _, parameter in table.all()}
    constant = sum(parameter.numel() for parameter in network.parameters() if id(parameter) not in trained)
    frozen_linear = 0 if table.pretrained else linear
    chosen = worst_selection(config, table.num_layers) if selected is None else list(selected)
    kept, boundary = _activations(network, table, chosen, config)
    every = (
        kept if len(chosen) == table.num_layers else _activations(network, table, range(table.num_layers), config)[0]
    )
    return Parts(
        linear=frozen_linear,
        rest=constant - frozen_linear,
        layers=[[parameter.numel() for _, parameter in layer] for layer in table.layers],
        head=[parameter.numel() for _, parameter in table.head],
        activations=kept,
        transient=every // table.num_layers,
        boundary=boundary,
        weight_bytes=2 if config.model.dtype != "float32" else 4,
        trained_bytes=table.head[0][1].element_size(),
    )


def worst_selection(config: Config, num_layers: int) -> list[int]:
    """As many layers as the method may train at a time, the lowest among them: the longest backward pass."""
    from irtune.selection import PAPER_BUDGETS, layer_budget, takes_budget

    tuning = config.tuning
    if not takes_budget(tuning.method):
        return list(range(num_layers))
    share: int | float = tuning.budget or PAPER_BUDGETS.get(tuning.method, tuning.max_fraction)
    return [0, *range(num_layers - layer_budget(share, num_layers) + 1, num_layers)]


def _activations(network: nn.Module, table: LayerTable, selected: Sequence[int], config: Config) -> tuple[int, int]:
    """Bytes kept for the backward pass of one example, and those of one layer's input."""
    table.set_trainable(list(selected))
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, int] = {}
    boundary: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            holders.append(storage)  # alive, so that its number is not given to another
        return tensor

    def see(_module: nn.Module, arguments: tuple, keywords: dict) -> None:
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        boundary.append(hidden.numel() * hidden.element_size())

    holders: list[Any] = []
    handle = table.modules[0].register_forward_pre_hook(see, with_kwargs=True)
    length = config.data.max_length
    tokens = torch.ones(1, length, dtype=torch.long, device="meta")
    # A mask that is ready: making one would look at values, which the meta device does not have.
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = network.train()(input_ids=tokens, attention_mask=mask)
    finally:
        handle.remove()
    del output
    return sum(kept.values()), boundary[0]


def state_bytes(groups: Sequence[Sequence[int]], stage: int, world: int, trained_bytes: int) -> int:
    """Bytes of optimizer state per rank for parameter groups given by the elements of their parameters. Exact.

    8 bytes of moments for each element; 4 more for the fp32 copy that ZeRO 1 and 2 always keep, and the other stages
    where parameters have a lower precision. Shards are padded as DeepSpeed does it: a group to 2 elements per rank
    under ZeRO 1 and 2, each parameter to equal shares under ZeRO 3.
    """
    each = 12 if trained_bytes < 4 or stage in (1, 2) else 8
    if stage == 0:
        elements = sum(map(sum, groups))
    elif stage == 3:
        elements = sum(-(-numel // world) for group in groups for numel in group)
    else:
        elements = sum(-(-sum(group) // (2 * world)) * 2 for group in groups)
    return each * elements


def estimate(
    parts: Parts,
    config: Config,
    *,
    stage: int,
    quantization: str,
    world: int,
    selected: Sequence[int],
    memory: float | None,
) -> Estimate:
    """Bytes per rank of a run on `world` ranks whose `selected` layers train; `memory` is that of one GPU in bytes."""
    linear = {"none": parts.linear * parts.weight_bytes, "nf4": parts.linear * NF4_BITS / 8, "int8": parts.linear}
    whole_base = int(linear[quantization]) + parts.rest * parts.weight_bytes
    share = world if stage == 3 else 1
    groups = [parts.layers[layer] for layer in selected if parts.layers[layer]] + [parts.head]
    every = [layer for layer in parts.layers if layer] + [parts.head]
    trained = sum(map(sum, groups))
    gradients = trained * parts.trained_bytes // (world if stage >= 2 else 1)
    optimizer = state_bytes(groups, stage, world, parts.trained_bytes)
    full = state_bytes(every, stage, world, parts.trained_bytes)
    base, adapters = whole_base // share, sum(map(sum, every)) * parts.trained_bytes // share
    gathered = 2 * whole_base // max(1, len(parts.layers)) if stage == 3 else 0  # a layer in use, and the next one
    per_example = parts.activations
    if config.model.gradient_checkpointing:
        per_example = parts.boundary * (len(parts.layers) - min(selected, default=0)) + parts.transient
    fixed = base + adapters + gradients + optimizer + gathered
    per_example += parts.transient  # what the backward pass of one layer makes
    micro = config.optim.micro_batch_size
    total = fixed + micro * per_example
    room = None if memory is None else memory - RESERVE - fixed
    ring = (world - 1) / world
    sent = (2 if stage == 0 else 1) * ring * trained * parts.trained_bytes + (
        stage in (1, 2)
    ) * ring * trained * parts.trained_bytes
    if stage == 3:
        passes = 2 * config.optim.gradient_accumulation_steps
        sent += passes * ring * (whole_base + sum(map(sum, every)) * parts.trained_bytes)
    park = config.tuning.deselected_state == "offload"
    return Estimate(
        stage=stage,
        quantization=quantization,
        base=base,
        adapters=adapters,
        gradients=gradients,
        optimizer=optimizer,
        optimizer_full=full,
        activations=micro * per_example,
        host=(full - optimizer if park else 0) + whole_base,
        sent_per_step=int(sent) + 8 * len(parts.layers),
        total=total,
        fits=None if memory is None else total + RESERVE <= memory,
        largest_micro_batch=None if room is None else max(0, int(room // per_example)),
    )
