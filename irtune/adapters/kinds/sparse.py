"""Sparse fine-tuning, SpIEL (Ansell et al. 2024): a few entries of every weight train, and which ones changes.

The official definition (F, the authors' fork of peft): y = (W + scatter(values)) x; a module has k = int(N * its share
of the weights) values, zero at first, at places drawn uniformly; N is `adapter.density` of all parameters. In steps
t = 1 to 5 of every 20, gradients are gathered at k candidates, the largest of the first step's dense gradient. Then
int(p k) of the smallest values are dropped, p = 1 after step 5 and 0.2 (1 - t / T) later, and as many candidates with
the largest sums grow, from zero, with moments as if Adam had seen their mean gradient and mean square. The paper's
abstract drops by change, the code by size; so does this.

`adapter.regrow: sm3` is SpIEL-MA: r_i and c_j are SM3's accumulators, and the largest r_i c_j grow. The source trains
with SM3 itself; here they stand beside AdamW, and what grows has zero moments.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from irtune.adapters.schedule import Deciding, Editor, Schedule
from irtune.adapters.table import LayerTable
from irtune.adapters.targets import wanted_modules
from irtune.adapters.trainable import freeze, layer_list, train_with_head
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig, Config
from irtune.distributed import runtime
from irtune.errors import ConfigError
from irtune.models import Classifier
from irtune.models.anatomy import linear_names

EVERY, WINDOW = 20, 5  # optimizer steps between the beginnings of windows, and of a window


class _Product(torch.autograd.Function):
    """x (W + scatter(values)), of which the dense gradient of the weight lives in the backward pass only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, values: torch.Tensor, update: "SparseUpdate", module: Any) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        ctx.save_for_backward(x)
        ctx.update, ctx.module, ctx.values = update, module, values.detach()
        weight = update.changed(module.weight, values)
        return nn.functional.linear(x, weight if isinstance(module, nn.Linear) else weight.T, module.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Of x and values; shows the dense one to whoever watches."""
        (x,), update, module, gradient = ctx.saved_tensors, ctx.update, ctx.module, gradients[0]
        plain = isinstance(module, nn.Linear)
        of_x = of_values = None
        if ctx.needs_input_grad[0]:
            weight = update.changed(module.weight, ctx.values)
            of_x = gradient @ (weight if plain else weight.T)
        if ctx.needs_input_grad[1]:
            flat, given = gradient.flatten(0, -2), x.flatten(0, -2)
            dense = (flat.T @ given if plain else given.T @ flat).flatten()
            of_values = dense[update.indices.long()].to(ctx.values.dtype)
            if update.watch is not None:
                update.watch(dense)
        return of_x, of_values, None, None


class SparseUpdate(Deciding):
    """The values of one weight. indices: where they are in the flat weight, int32 [k], ascending.

    candidates [k], sums [k], squares [k]: of a window; window: its steps so far. rows, columns: SM3's accumulators.
    """

    indices: torch.Tensor
    candidates: torch.Tensor
    sums: torch.Tensor
    squares: torch.Tensor
    window: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    def __init__(self, shape: torch.Size, count: int, seed: int, *, sm3: bool):
        super().__init__()
        self.decisions = (
            ("indices", "rows", "columns") if sm3 else ("indices", "candidates", "sums", "squares", "window")
        )
        drawn = np.random.default_rng(seed).choice(shape.numel(), count, replace=False, shuffle=False)
        self.values = nn.Parameter(torch.zeros(count))
        self.shape = shape
        self.indices = torch.empty(count, dtype=torch.int32).copy_(torch.from_numpy(np.sort(drawn)))
        names = self.decisions[1:]
        sizes = {"rows": shape[0], "columns": shape[1], "window": 1}
        for name in names:
            kind = torch.int32 if name in ("candidates", "window") else torch.float32
            setattr(self, name, torch.zeros(sizes.get(name, count), dtype=kind))
        self.watch: Callable[[torch.Tensor], None] | None = None
        self.pending: torch.Tensor | None = None  # gradients of the step so far

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Tensors of decisions follow the module to a device, and keep their number format."""
        super()._apply(fn, recurse)
        for name in self.decisions:
            setattr(self, name, getattr(self, name).to(self.values.device))
        return self

    def changed(self, weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The weight with the values added."""
        flat = weight.detach().flatten().clone()
        return flat.index_add_(0, self.indices, values.detach().to(flat.dtype)).view_as(weight)


def share_dropped(step: int, max_steps: int) -> float:
    """p after optimizer step `step`."""
    return 1.0 if step == WINDOW else 0.2 * (1 - step / max_steps)


def regrown(
    indices: torch.Tensor, values: torch.Tensor, candidates: torch.Tensor, strength: torch.Tensor, count: int
) -> torch.Tensor:
    """Ascending indices after the `count` smallest values gave way to the strongest candidates, of equals the lower.

    A candidate whose value is dropped may grow again at once, and so stays.
    """
    kept = indices[values.abs().argsort(stable=True)[count:]]
    free = ~torch.isin(candidates, kept)
    order = strength[free].argsort(descending=True, stable=True)
    return torch.cat([kept, candidates[free][order[:count]]]).sort().values


def looked_up(keys: torch.Tensor, values: torch.Tensor, wanted: torch.Tensor, default: torch.Tensor) -> torch.Tensor:
    """The values of `wanted` among ascending `keys`, or those of `default` where it is not among them."""
    place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return torch.where(keys[place] == wanted, values[place], default)


def accumulate(rows: torch.Tensor, columns: torch.Tensor, places: torch.Tensor, gradient: torch.Tensor) -> None:
    """SM3: v = min(r_i, c_j) + g^2 at flat `places`; r and c become the largest v of a row and a column, in place."""
    i, j = places // len(columns), places % len(columns)
    v = torch.minimum(rows[i], columns[j]) + gradient**2
    for accumulator, at in ((rows, i), (columns, j)):
        accumulator.scatter_reduce_(0, at, v, "amax", include_self=False)


class Regrowing(Schedule):
    """Lets the values of layers that train move to other entries."""

    def __init__(self, table: LayerTable, config: Config, max_steps: int):
        self.table, self.max_steps, self.betas = table, max_steps, config.optim.betas
        self.sm3 = config.adapter.regrow == "sm3"
        self.updates = [[part for part in layer.modules() if isinstance(part, SparseUpdate)] for layer in table.modules]
        self._micro_batches = 0

    def _watches(self, step: int) -> bool:
        return self.sm3 or 1 <= step % EVERY <= WINDOW

    def is_due(self, step: int) -> bool:
        """In every step of a window; with sm3 in every step."""
        return self._watches(step)

    @contextlib.contextmanager
    def watching(self, step: int, engine: Editor) -> Iterator[None]:
        """Gathers gradients of this rank's micro-batches in the layers that train."""
        if not self._watches(step):
            yield
            return
        self._micro_batches += 1
        last = self._micro_batches == engine.accumulation_steps
        share = engine.gradient_factor / engine.accumulation_steps / runtime.launched_world_size()
        chosen = [update for layer in engine.selected for update in self.updates[layer]]
        for update in chosen:
            update.watch = functools.partial(self._gather, update, step, share, last)
        try:
            yield
        finally:
            for update in chosen:
                update.watch = None
            if last:
                self._micro_batches = 0

    def _gather(self, update: SparseUpdate, step: int, share: float, last: bool, dense: torch.Tensor) -> None:
        """Take from a micro-batch's dense gradient what is needed of it; of a window's first step the whole.

        Without accumulation the dense sum is gone again when the next module's gradient comes.
        """
        first = not self.sm3 and step % EVERY == 1
        if not first:
            dense = dense[(update.indices if self.sm3 else update.candidates).long()]
        mine = dense.float() * share
        update.pending = mine if update.pending is None else update.pending.add_(mine)
        if first and last:
            whole = runtime.all_reduce(update.pending)
            best = whole.abs().argsort(descending=True, stable=True)[: len(update.values)].sort().values
            update.candidates.copy_(best)
            update.pending = whole[best] / runtime.launched_world_size()  # each rank's part of what `decide` adds up
            update.sums.zero_()
            update.squares.zero_()
            update.window.zero_()

    @torch.no_grad()
    def decide(self, step: int, engine: Editor) -> None:
        """Add the step's gradients up, and at a window's end let values move."""
        for layer in engine.selected:
            for update in self.updates[layer]:
                self._add_up(update)
        if step % EVERY != WINDOW:
            return
        for layer in engine.selected:
            moving = [update for update in self.updates[layer] if self.sm3 or int(update.window) == WINDOW]
            if moving:
                names = {id(parameter): name for name, parameter in self.table.layers[layer]}
                engine.edit(layer, functools.partial(self._move, [(names[id(u.values)], u) for u in moving], step))
        for update in (update for updates in self.updates for update in updates if not self.sm3):
            update.window.zero_()

    def _add_up(self, update: SparseUpdate) -> None:
        if update.pending is None:
            return
        gradient, update.pending = runtime.all_reduce(update.pending), None
        if not bool(gradient.isfinite().all()):  # the step was left out; the window is not complete
            return
        if self.sm3:
            accumulate(update.rows, update.columns, update.indices.long(), gradient)
            return
        update.sums += gradient
        update.squares += gradient**2
        update.window += 1

    def _move(
        self, moving: list[tuple[str, SparseUpdate]], step: int, tensors: dict[str, torch.Tensor], adam_steps: float
    ) -> float:
        for name, update in moving:
            old, values = update.indices.long(), tensors[name]
            count = int(share_dropped(step, self.max_steps) * len(values))
            nothing = torch.zeros_like(values)
            if self.sm3:
                strength = torch.outer(update.rows, update.columns).flatten()
                candidates, first = torch.arange(len(strength), device=strength.device), (nothing, nothing)
            else:
                candidates, strength = update.candidates.long(), update.sums.abs()
                first = tuple(
                    total / WINDOW * (1 - beta**adam_steps)
                    for total, beta in zip((update.sums, update.squares), self.betas)
                )
            new = regrown(old, values, candidates, strength, count)
            moments = [
                nothing if self.sm3 else looked_up(candidates, values_there, new, nothing) for values_there in first
            ]
            for kind, default in zip(("", "/exp_avg", "/exp_avg_sq"), (nothing, *moments)):
                tensors[name + kind].copy_(looked_up(old, tensors[name + kind].clone(), new, default))
            update.indices.copy_(new)
        return adam_steps


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """Give the linear modules that `adapter.target_modules` names their values.

    Raises:
        ConfigError: for a density that gives a module no value, or more than it has weights.
    """
    model = classifier.model
    freeze(model)
    names = wanted_modules(linear_names(model, classifier.anatomy), adapter)
    layers = layer_list(classifier)
    found: list[tuple[Any, str, Any]] = [
        (layer, name, module) for layer in layers for name, module in layer.named_modules() if name in names
    ]
    values = adapter.density * sum(parameter.numel() for parameter in model.parameters())
    share = values / sum(module.weight.numel() for _, _, module in found)
    if share > 1 or any(share * module.weight.numel() < 1 for _, _, module in found):
        raise ConfigError(
            f"adapter.density is {adapter.density}, which gives the linear modules of {type(model).__name__} "
            f"{share:.3g} values per weight; accepted: at most 1, and at least one value in each module"
        )
    added: list[nn.Parameter] = []
    for number, (layer, name, module) in enumerate(found):
        seed = runtime.derived_seed("sparse", classifier.run.seed, number)
        count = int(share * module.weight.numel())
        update = SparseUpdate(module.weight.shape, count, seed, sm3=adapter.regrow == "sm3")
        if not hasattr(layer, "sparse"):
            layer.sparse = nn.ModuleDict()
        layer.sparse[name.replace(".", "_")] = update
        module.forward = functools.partial(_forward, update, module)
        added.append(update.values)
    train_with_head(classifier, adapter, added)
    return model


def _forward(update: SparseUpdate, module: Any, input: torch.Tensor) -> torch.Tensor:
    return _Product.apply(input, update.values, update, module)


def merge(classifier: Classifier) -> None:
    """Add the values to the weights."""
    for layer in layer_list(classifier):
        for module in layer.modules():
            forward = module.__dict__.pop("forward", None)
            if forward is not None:
                update = forward.args[0]
                module.weight.copy_(update.changed(module.weight, update.values))  # type: ignore[operator, union-attr]
        del layer.sparse


KIND = AdapterKind(
    name="sparse",
    family="own weights",
    summary="a few entries of every weight, which move",
    source="Ansell et al. 2024",
    licence="irtune's own code",
    build=build,
    silent=True,
    whole_weights=True,
    unquantised=True,
    schedule=Regrowing,
    merge=merge,
    keys=("adapter.density", "adapter.regrow"),
    refuses=(
        (
            {"run.average": ...},
            "run.average does not go with adapter.type sparse, whose values may be elsewhere in each checkpoint; "
            "set it to 0",
        ),
        (
            {"model.compile": True},
            "adapter.type sparse does not go with model.compile, which does not see its gradients; set one of the two "
            "back",
        ),
    ),
)
