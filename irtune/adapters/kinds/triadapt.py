"""TriAdaptLoRA (Liang et al. 2025): LoRA with triangular factors between B and A, whose ranks grow while it trains.

The official definition (F, its tuner in a fork of peft): dW = alpha / (r + 1e-5) B (L + U) A, r the module's rank at
the time. Rows of L in block i reach to the end of that block, U is the transpose of that pattern, and both hold the
diagonal blocks. Ranks start at 1 and grow by g = r_ref / 2, every `tuning.interval` steps after the warm-up t_w, as
long as their sum R is below R* = r_ref times the modules: those grow whose norm of L + U over the number of blocks has
risen most, K of them, K = (R* - R) (t - t_w) / (T - t_w).

The stored revision cannot train: B, L and U are zero, and so is every gradient. Our reading (R): A and B ~ N(0, 0.02),
as AdaLoRA's factors, L = U = 0. Also our own: a rank is at most 2 r_ref, and the penalty
.5 mean(norm(A A^T - 1) + norm(B^T B - 1)) is added if `adapter.orthogonal` says so.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from irtune.adapters.schedule import AddGradient, Deciding, Editor, Schedule
from irtune.adapters.suppress import Scaled
from irtune.adapters.table import LayerTable
from irtune.adapters.targets import wanted_modules
from irtune.adapters.trainable import freeze, layer_list, train_with_head
from irtune.config.declarations import AdapterKind
from irtune.config.schema import AdapterConfig, Config
from irtune.config.warmup import warmup_length
from irtune.models import Classifier
from irtune.models.anatomy import linear_names

DEVIATION = 0.02


class TriangularUpdate(Deciding, Scaled):
    """[..., in] -> [..., out]. rank: int32 [1]; score: fp32 [1], of the last decision."""

    decisions = ("rank", "score")
    rank: torch.Tensor
    score: torch.Tensor
    block: torch.Tensor

    def __init__(self, width_in: int, width_out: int, reference: int, alpha: float):
        super().__init__()
        most, self.growth, self.alpha = 2 * reference, max(1, reference // 2), alpha
        self.a = nn.Parameter(torch.randn(most, width_in) * DEVIATION)
        self.b = nn.Parameter(torch.randn(width_out, most) * DEVIATION)
        self.lower = nn.Parameter(torch.zeros(most, most))
        self.upper = nn.Parameter(torch.zeros(most, most))
        self.register_buffer("rank", torch.ones(1, dtype=torch.int32))
        self.score = torch.zeros(1)
        # The number of the block of each row: one row in the first, `growth` in each of the others.
        block = (torch.arange(most) + self.growth - 1) // self.growth
        self.register_buffer("block", block, persistent=False)
        self.penalty = 0.0

    def core(self, lower: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
        """L + U at the present rank; zero beyond it."""
        pattern = self.block.unsqueeze(0) <= self.block.unsqueeze(1)  # columns up to the end of the row's block
        within = torch.arange(len(self.block), device=lower.device) < self.rank
        return (lower * pattern + upper * pattern.T) * (within.unsqueeze(0) & within.unsqueeze(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """In the format of x while training, in its own otherwise, as `AdapterLinear`."""
        a, b = self.a, self.b
        if self.penalty:
            a = AddGradient.apply(a, self.penalty * self._off_orthogonal(a.detach()))
            b = AddGradient.apply(b, self.penalty * self._off_orthogonal(b.detach().T).T)
        core = self.core(self.lower, self.upper) * (self.alpha / (self.rank + 1e-5))
        inner = x if self.training else x.to(a.dtype)
        factors = (a.T, core.T, b.T)
        for factor in factors:
            inner = inner @ factor.to(inner.dtype)
        return inner * self.scaling

    def _off_orthogonal(self, rows: torch.Tensor) -> torch.Tensor:
        """The gradient of norm(rows rows^T - 1), of the rows up to the rank."""
        within = (torch.arange(len(rows), device=rows.device) < self.rank).to(rows.dtype)
        rows = rows * within.unsqueeze(1)
        off = rows @ rows.T - torch.diag(within)
        return 2 * off @ rows / off.norm().clamp_min(1e-12)

    def importance(self, lower: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
        """norm(L + U) over the number of blocks, fp32 [1]."""
        blocks = self.block[self.rank.long() - 1] + 1
        return self.core(lower, upper).norm() / blocks

    def weight(self) -> torch.Tensor:
        """dW [out, in]."""
        return self.b @ (self.core(self.lower, self.upper) * (self.alpha / (self.rank + 1e-5))) @ self.a


def growing(missing: int, rho: float, law: str) -> int:
    """K, where ranks may grow by `missing` in all and `rho` of the steps after the warm-up are done."""
    return max(1, int(missing * rho if law == "linear" else math.exp(rho * math.log(missing))))


class Growing(Schedule):
    """Lets ranks of layers that train grow."""

    def __init__(self, table: LayerTable, config: Config, max_steps: int):
        self.table, self.max_steps, self.interval = table, max_steps, config.tuning.interval
        self.begin, self.adapter = warmup_length(config.optim, max_steps), config.adapter
        self.updates = [[m for m in layer.modules() if isinstance(m, TriangularUpdate)] for layer in table.modules]
        self.every = [update for updates in self.updates for update in updates]

    def is_due(self, step: int) -> bool:
        """Every `tuning.interval` steps after the warm-up."""
        return step > self.begin and step % self.interval == 0

    @contextlib.contextmanager
    def watching(self, step: int, engine: Editor) -> Iterator[None]:
        """Adds the penalty to the loss, where it is asked for."""
        for update in self.every if self.adapter.orthogonal else ():
            update.penalty = 0.5 / len(self.every) / engine.gradient_factor
        try:
            yield
        finally:
            for update in self.every:
                update.penalty = 0.0

    def decide(self, step: int, engine: Editor) -> None:
        """Grow the modules whose scores rose most."""
        missing = self.adapter.r * len(self.every) - sum(int(update.rank) for update in self.every)
        if missing <= 0:
            return
        rises: list[tuple[float, TriangularUpdate]] = []
        for layer in engine.selected:
            engine.edit(layer, functools.partial(self._score, layer, rises))
        count = growing(missing, (step - self.begin) / (self.max_steps - self.begin), self.adapter.growth)
        least = sorted((rise for rise, _ in rises), reverse=True)[:count][-1]
        for rise, update in rises:
            if rise >= least:
                update.rank.copy_((update.rank + update.growth).clamp(max=len(update.block)))

    def _score(
        self,
        layer: int,
        rises: list[tuple[float, TriangularUpdate]],
        tensors: dict[str, torch.Tensor],
        adam_steps: float,
    ) -> float:
        names = {id(parameter): name for name, parameter in self.table.layers[layer]}
        for update in self.updates[layer]:
            now = update.importance(tensors[names[id(update.lower)]], tensors[names[id(update.upper)]])
            rises.append((float(now - update.score.to(now.device)), update))
            update.score.copy_(now)
        return adam_steps


def build(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """Put triangular updates beside the linear modules that `adapter.target_modules` names."""
    freeze(classifier.model)
    names = wanted_modules(linear_names(classifier.model, classifier.anatomy), adapter)
    added: list[nn.Parameter] = []
    for layer in layer_list(classifier):
        layer.triangular = nn.ModuleDict()
        for name, module in [(name, module) for name, module in layer.named_modules() if name in names]:
            plain: Any = module
            widths = (plain.in_features, plain.out_features) if isinstance(plain, nn.Linear) else (plain.nx, plain.nf)
            update: Any = TriangularUpdate(widths[0], widths[1], adapter.r, adapter.alpha)
            layer.triangular[name.replace(".", "_")] = update
            update.target = [plain]  # in a list, so that it is not a part of the update
            update.handle = plain.register_forward_hook(
                lambda _module, inputs, output, update=update: (output + update(inputs[0])).to(output.dtype)
            )
            added += update.parameters()
    train_with_head(classifier, adapter, added)
    return classifier.model


def merge(classifier: Classifier) -> None:
    """Add dW to the weights."""
    for layer in layer_list(classifier):
        updates: Any = layer.triangular
        for update in updates.values():
            update.handle.remove()
            module, change = update.target[0], update.weight()
            module.weight += change if isinstance(module, nn.Linear) else change.T
        del layer.triangular


KIND = AdapterKind(
    name="triadapt",
    family="low-rank",
    summary="low-rank updates with triangular factors and growing ranks",
    source="Liang et al. 2025 (start and cap ours)",
    licence="irtune's own code",
    build=build,
    silent=True,
    schedule=Growing,
    merge=merge,
    keys=("adapter.growth", "adapter.orthogonal"),
    refuses=(
        (
            {"run.average": ...},
            "run.average does not go with adapter.type triadapt, whose ranks differ between checkpoints; set it to 0",
        ),
    ),
)
