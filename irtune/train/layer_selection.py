"""Which layers train: scores them in the steps that need it, asks the chooser, and lets the engine change over."""

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from irtune.adapters import Suppression
from irtune.adapters.schedule import Schedule
from irtune.config import TuningConfig
from irtune.distributed import runtime
from irtune.engine import Engine
from irtune.errors import DistributedError, TrainingError
from irtune.selection import Chooser, Observation
from irtune.selection.scores import LayerScores
from irtune.tracking.tracker import Tracker
from irtune.train.progress import Progress

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class SelectionMethod:
    """What chooses layers, and what it looks at.

    suppression: turns layers down for choosers that try that out; None for others.
    schedule: what the adapter type decides meanwhile. among: builds a chooser of some layers, for when it narrows them.
    """

    chooser: Chooser
    scores: LayerScores
    suppression: Suppression | None = None
    schedule: Schedule = field(default_factory=Schedule)
    among: Callable[[Collection[int]], Chooser] | None = None


class LayerSelection:
    """The selections of a run."""

    def __init__(
        self,
        tuning: TuningConfig,
        method: SelectionMethod,
        *,
        engine: Engine,
        progress: Progress,
        tracker: Tracker,
        max_steps: int,
    ):
        """`max_steps`: of the run; nothing is chosen after the last."""
        self.tuning, self.engine = tuning, engine
        self.chooser, self.scores, self.suppression = method.chooser, method.scores, method.suppression
        self.schedule, self.among = method.schedule, method.among
        self._narrow()
        self.progress, self.tracker, self.max_steps = progress, tracker, max_steps

    def is_due(self, step: int) -> bool:
        """Whether layers are chosen after optimizer step `step`; not after the last, when nothing would train them."""
        return not self.schedule.trains_all and self.chooser.is_due(step) and step < self.max_steps

    def _narrow(self) -> None:
        """Choose among those layers only that the schedule has left."""
        layers = None if self.schedule.trains_all else self.schedule.layers()
        if layers is not None:
            assert self.among is not None, "the schedule leaves some layers only, and nothing builds their chooser"
            self.chooser = self.among(layers)

    def decide(self, batches: list[Batch]) -> bool:
        """Let the schedule decide after a step, of which this rank has the micro-batches; chooses layers where that
        ends the time in which all of them train. Collective.

        Returns:
            Whether layers were chosen.

        Raises:
            DistributedError: when ranks decided differently.
        """
        step, trained_all = self.progress.step, self.schedule.trains_all
        if not self.schedule.is_due(step) or step >= self.max_steps:
            return False
        runtime.doing(f"decisions of the adapters after step {step}")
        self.schedule.decide(step, self.engine)
        verify_decisions(self.engine.table.decided(), step, self.engine.device)
        if not trained_all or self.schedule.trains_all:
            return False
        self._narrow()
        self._choose_first(batches)
        return True

    @contextlib.contextmanager
    def scoring(self, batch: Batch, step: int, weight: float = 1.0) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch of `step`: gathers scores where the step needs them.

        Scores are of gradients of the micro-batch's mean loss, whatever its `weight` in the step's. The schedule of the
        adapter type watches too.
        """
        scored: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.chooser.needs_scores and self.is_due(step):
            factor = self.engine.gradient_factor / weight
            scored = self._scored(batch, factor, all_layers=self.tuning.scores == "fresh")
        with scored, self.schedule.watching(step, self.engine):
            yield

    @contextlib.contextmanager
    def _scored(self, batch: Batch, factor: float, *, all_layers: bool):
        reaches_below = all_layers and self.scores.needs_gradients
        with (
            self.engine.reaching_all_layers() if reaches_below else contextlib.nullcontext(),
            self.scores.micro_batch(batch["attention_mask"], all_layers=all_layers, factor=factor),
        ):
            yield

    def first(self, batches: Iterable[Batch]) -> None:
        """Choose before any update, from the first step's micro-batches: no step trains all layers. Collective."""
        layers = self.engine.table.num_layers
        self.progress.trained_steps = [0] * layers
        if self.schedule.trains_all:
            self._train_layers(list(range(layers)), None, time.perf_counter())
        else:
            self._choose_first(batches)

    def _choose_first(self, batches: Iterable[Batch]) -> None:
        chosen = self.chooser.first()
        if chosen is not None:
            self._train_layers(chosen, None, time.perf_counter())
            return
        self.engine.module.train()
        for batch in batches:
            runtime.moving()
            with self._scored(batch, 1 / self.engine.probe_scale, all_layers=True):
                self.engine.probe(batch, backward=self.scores.needs_gradients)
        self.select([])

    def select(self, batches: list[Batch]) -> None:
        """Choose layers from what the step showed, and train them from the next step on. Collective.

        Args:
            batches: this rank's micro-batches of the step, for choosers that try layers out.

        Raises:
            TrainingError: when scores were not finite for too long.
        """
        started = time.perf_counter()
        raw = self.scores.reduce() if self.chooser.needs_scores else None
        sign = 1.0 if self.scores.higher_is_important else -1.0
        signed = None if raw is None else [None if score is None else sign * score for score in raw]
        seen = Observation(self.progress.step, signed, self.engine.selected, self._trials(batches))
        chosen = self.chooser.choose(seen)
        self._check_scores()
        self._train_layers(chosen, raw, started)

    def _trials(self, batches: list[Batch]) -> list[tuple[list[int], float]]:
        """Mean loss of the step's micro-batches on all ranks, under each set of layers that the chooser suppresses."""
        sets = self.chooser.trials(self.progress.step) if batches else []
        if not sets:
            return []
        self.engine.module.eval()  # the same answer for any split over ranks: no dropout
        losses = [torch.stack([self._trial(batch, layers) for batch in batches]).mean() for layers in sets]
        self.engine.module.train()
        mean = runtime.all_reduce(torch.stack(losses)) / runtime.launched_world_size()
        return list(zip(sets, mean.tolist()))

    @torch.no_grad()
    def _trial(self, batch: Batch, layers: list[int]) -> torch.Tensor:
        """Mean loss of `batch` on this rank with the adapters of `layers` suppressed. Collective."""
        assert self.suppression is not None, "the chooser asks for trials, but first values were not remembered"
        with self.suppression.suppressed(layers):
            return self.engine.mean_loss(batch).detach().float()

    def _train_layers(self, chosen: list[int], raw: list[float | None] | None, started: float) -> None:
        num_layers = self.engine.table.num_layers
        verify_selection(chosen, num_layers, self.engine.device)
        changed = chosen != self.engine.selected
        self.engine.reselect(chosen)
        self.progress.state_bytes.append(self.engine.optimizer_state_bytes())
        self.tracker.selection(
            {
                "step": self.progress.step,
                "scores": raw and [score if score is not None and math.isfinite(score) else None for score in raw],
                "selected": chosen,
                "changed": changed,
                "seconds": time.perf_counter() - started,
                "num_layers": num_layers,
            }
        )

    def _check_scores(self) -> None:
        bad, limit = self.chooser.bad_in_a_row, self.tuning.max_bad_scores
        if bad:
            self.tracker.say(
                f"step {self.progress.step}: a layer score is not finite ({bad} in a row); layers are kept"
            )
        if bad >= limit:
            raise TrainingError(
                f"step {self.progress.step}: {bad} selections in a row had scores that are not finite "
                f"(tuning.max_bad_scores {limit}); lower optim.lr, or use model.dtype float32"
            )


def verify_selection(selected: list[int], num_layers: int, device: torch.device) -> None:
    """Compare a selection across ranks.

    Raises:
        DistributedError: naming the ranks and the layers, when they differ.
    """
    mask = torch.zeros(num_layers, dtype=torch.uint8, device=device)
    mask[selected] = 1
    all_masks = [other.nonzero().flatten().tolist() for other in runtime.all_gather(mask)]
    if any(other != all_masks[0] for other in all_masks):
        chosen = "; ".join(f"rank {rank}: {layers}" for rank, layers in enumerate(all_masks))
        raise DistributedError(f"ranks chose different layers: {chosen}")


def verify_decisions(decided: Sequence[tuple[str, torch.Tensor]], step: int, device: torch.device) -> None:
    """Compare what an adapter type decided across ranks.

    Raises:
        DistributedError: naming the first tensor that differs.
    """
    values = (tensor.detach().cpu().flatten().view(torch.uint8) for _, tensor in decided)
    digests = [runtime.derived_seed(bytes(value.numpy()).hex()) for value in values]
    every = runtime.all_gather(torch.tensor(digests, device=device))
    differing = torch.stack(every).ne(every[0]).any(0).nonzero().flatten().tolist()
    if differing:
        raise DistributedError(f"step {step}: ranks decided differently about {decided[differing[0]][0]}")
