"""One training step and one evaluation batch on the meta device: tensors are counted, and nothing is computed."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from irtune.adapters import LayerTable
from irtune.engine.recompute import Recompute
from irtune.memory.measure import LiveTensors


@dataclass(frozen=True)
class Step:
    """Bytes of a forward and backward pass of one micro-batch, besides weights, their gradients and optimizer state.

    kept: alive after the forward pass, for the backward pass. peak: the most alive at a time in both.
    """

    kept: int
    peak: int


def training_step(
    network: nn.Module,
    table: LayerTable,
    selected: Sequence[int],
    recompute: Recompute,
    *,
    rows: int,
    length: int,
    scoring: bool = False,
) -> Step:
    """Forward and backward of `rows` examples of `length` tokens when `selected` layers train.

    With `scoring`, gradients flow into the adapters of all layers, as in a step that scores them.
    """
    table.set_trainable(list(range(table.num_layers)) if scoring else list(selected))
    recompute.set_trained(selected)
    handles = [
        parameter.register_post_accumulate_grad_hook(_forget) for _, parameter in table.all() if parameter.requires_grad
    ]
    try:
        with recompute.scoring() if scoring else contextlib.nullcontext(), _counted(network) as live:
            network.train()
            logits = network(**_batch(rows, length)).logits
            loss = nn.functional.cross_entropy(logits, torch.zeros(rows, dtype=torch.long, device="meta"))
            del logits
            kept = live.now
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return Step(kept, live.peak)


@torch.no_grad()
def evaluation_bytes(network: nn.Module, *, rows: int, length: int) -> int:
    """The most alive in a forward pass of `rows` examples of `length` tokens without gradients."""
    with _counted(network) as live:
        network.eval()(**_batch(rows, length))
    return live.peak


def _counted(network: nn.Module) -> LiveTensors:
    return LiveTensors([*network.parameters(), *network.buffers()])


def _batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    return {name: torch.ones(rows, length, dtype=torch.long, device="meta") for name in ("input_ids", "attention_mask")}


def _forget(parameter: torch.Tensor) -> None:
    """Gradients of parameters are counted by themselves: how long they live depends on the ZeRO stage."""
    parameter.grad = None
