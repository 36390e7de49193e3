"""Side f of benchmarks/speed: the matrix products of a step and nothing else, as a limit for every trainer."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from irtune.adapters import LayerTable
from irtune.distributed import runtime
from irtune.models.classifier import is_linear


class Step(NamedTuple):
    """Shape of a rank's micro-batch, rows x length tokens, and layers: those that trained in it, and those that had
    trained before or did then, whose updates are not zero."""

    rows: int
    length: int
    selected: tuple[int, ...]
    adapted: tuple[int, ...]


@dataclass(frozen=True)
class LinearShape:
    """A linear module of a layer.

    rank: that of its LoRA update, 0 without one.
    leads: whether the layer's input reaches it without passing another linear module: the lowest trained layer then
        needs no gradient of its input.
    """

    inputs: int
    outputs: int
    rank: int
    leads: bool


@dataclass(frozen=True)
class ModelShape:
    """What the products of a layer are made of; all layers are alike."""

    layers: int
    linears: tuple[LinearShape, ...]
    heads: int
    head_size: int


class Product(NamedTuple):
    """`batch` products [m, k] x [k, n]; what: base, lora or attention."""

    what: str
    batch: int
    m: int
    k: int
    n: int
    backward: bool

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.batch * self.m * self.k * self.n


def shape_of(model: nn.Module, table: LayerTable) -> ModelShape:
    """Read the shapes off a model with LoRA; one tiny forward pass tells which modules lead their layer.

    Afterwards only layer 0 and the head require gradients.
    """
    first = dict(table.modules[0].named_modules())
    bases = {name: part for name, part in first.items() if is_linear(part) and ".lora_" not in name}
    reached: dict[str, bool] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            reached[name] = args[0].requires_grad

        return hook

    owners = {name: first[name.removesuffix(".base_layer")] for name in bases}
    handles = [owner.register_forward_pre_hook(note(name)) for name, owner in owners.items()]
    table.set_trainable([0])
    model(input_ids=torch.ones(1, 2, dtype=torch.long, device=next(model.parameters()).device))
    for handle in handles:
        handle.remove()
    linears = []
    for name, part in bases.items():
        sizes = (part.in_features, part.out_features) if isinstance(part, nn.Linear) else (part.nx, part.nf)
        factors = getattr(owners[name], "lora_A", {})
        rank = factors["default"].out_features if "default" in factors else 0
        linears.append(LinearShape(*sizes, rank, leads=not reached[name]))
    settings = model.config
    head_size = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    return ModelShape(table.num_layers, tuple(linears), settings.num_attention_heads, head_size)


def products(shape: ModelShape, step: Step) -> Iterator[Product]:
    """Every matrix product of a step: forward through all layers, backward down to the lowest selected one.

    Input gradients are needed at and above that layer, weight gradients in selected layers and only of adapters. LoRA
    products count where the update is not zero.
    """
    tokens, attentions = step.rows * step.length, step.rows * shape.heads
    lowest = min(step.selected, default=shape.layers)
    for layer in range(shape.layers):
        adapted = layer in step.adapted
        yield from _forward(shape, tokens, attentions, step.length, adapted)
        if layer >= lowest:
            yield from _backward(shape, tokens, layer in step.selected, adapted, layer == lowest)
            for _ in range(4):  # of queries, keys, values and probabilities
                yield Product("attention", attentions, step.length, shape.head_size, step.length, True)


def _forward(shape: ModelShape, tokens: int, attentions: int, length: int, adapted: bool) -> Iterator[Product]:
    for linear in shape.linears:
        yield Product("base", 1, tokens, linear.inputs, linear.outputs, False)
        if linear.rank and adapted:
            yield Product("lora", 1, tokens, linear.inputs, linear.rank, False)
            yield Product("lora", 1, tokens, linear.rank, linear.outputs, False)
    yield Product("attention", attentions, length, shape.head_size, length, False)
    yield Product("attention", attentions, length, length, shape.head_size, False)


def _backward(shape: ModelShape, tokens: int, selected: bool, adapted: bool, lowest: bool) -> Iterator[Product]:
    for linear in shape.linears:
        passes = not (lowest and linear.leads)  # whether somebody below wants the gradient of the input
        if passes:
            yield Product("base", 1, tokens, linear.outputs, linear.inputs, True)
        if not (linear.rank and adapted):
            continue
        if selected or passes:
            yield Product("lora", 1, tokens, linear.outputs, linear.rank, True)
        if passes:
            yield Product("lora", 1, tokens, linear.rank, linear.inputs, True)
        if selected:
            yield Product("lora", 1, linear.outputs, tokens, linear.rank, True)
            yield Product("lora", 1, linear.rank, tokens, linear.inputs, True)


def flops(shape: ModelShape, step: Step) -> int:
    """Of all products of a step."""
    return sum(product.flops for product in products(shape, step))


class Matrices:
    """Runs the products of steps on random numbers; every layer has its own weights, as in a model."""

    def __init__(self, shape: ModelShape, dtype: torch.dtype, device: torch.device, own: bool):
        """`own`: weights for each layer (False: one set, to save memory)."""
        self.shape, self.dtype, self.device = shape, dtype, device
        self.copies = shape.layers if own else 1
        self.buffers: dict[Any, torch.Tensor] = {}

    def _random(self, *size: int, copy: int = 0) -> torch.Tensor:
        """A matrix that is made once; weights by layer and size, activations by size."""
        key = (copy, *size)
        if key not in self.buffers:
            self.buffers[key] = torch.randn(*size, device=self.device, dtype=torch.float32).to(self.dtype)
        return self.buffers[key]

    def prepared(self, step: Step) -> list[Callable[[], torch.Tensor]]:
        """One call for each product of a step, in order, with operands that are there already."""
        calls, seen = [], 0
        for product in products(self.shape, step):
            if product.what == "attention":
                seen += not product.backward and product.k == self.shape.head_size
                left = self._random(product.batch, product.m, product.k)
                right = self._random(product.batch, product.k, product.n)
                calls.append(lambda a=left, b=right: torch.bmm(a, b))
                continue
            left = self._random(product.m, product.k)
            if product.backward:
                right = self._random(product.k, product.n, copy=1 + seen % self.copies)
                calls.append(lambda a=left, b=right: torch.mm(a, b))
            else:  # weights lie as [outputs, inputs]
                right = self._random(product.n, product.k, copy=1 + seen % self.copies)
                calls.append(lambda a=left, b=right: nn.functional.linear(a, b))
        return calls

    def turn(self, steps: list[Step], warm_up: int) -> list[float]:
        """Seconds of each of `steps`, after the first `warm_up` of them ran untimed too."""
        prepared = [self.prepared(step) for step in steps]
        seconds = []
        for number in [*range(min(warm_up, len(steps))), *range(-len(steps), 0)]:
            self._together()
            started = time.perf_counter()
            for call in prepared[number]:
                call()
            self._together()
            if number < 0:
                seconds.append(time.perf_counter() - started)
        for key in [key for key in self.buffers if key[0] == 0]:  # activations of these shapes
            del self.buffers[key]
        return seconds

    def _together(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        runtime.barrier()

    def close(self) -> None:
        """Free all numbers."""
        self.buffers.clear()

    def rate(self) -> float:
        """FLOP/s of one large square product, the best of five."""
        size = 8192 if self.device.type == "cuda" else 1024
        left, right = (torch.randn(size, size, device=self.device).to(self.dtype) for _ in range(2))
        best = float("inf")
        for _ in range(6):
            self._together()
            started = time.perf_counter()
            torch.mm(left, right)
            self._together()
            best = min(best, time.perf_counter() - started)
        return 2 * size**3 / best
