"""The loop: accumulate, update, select, evaluate, save."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from irtune import runtime
from irtune.checkpoint import OPTIMIZER, TRAINABLE, Checkpoints, read_tensors, writing
from irtune.config import Config
from irtune.data import BatchPlan, Corpus, collate
from irtune.engine import Engine, verify_selection
from irtune.errors import TrainingError
from irtune.evaluation import Predictions, metrics, predict
from irtune.importance import LayerScores
from irtune.memory import peak_memory_bytes
from irtune.schedule import learning_rate
from irtune.selection import Chooser, Observation
from irtune.tracking import Tracker, write_predictions

EVALUATION_BATCH = 2  # in micro-batches: no gradients, so more examples fit


@dataclass
class Progress:
    """What a run remembers between checkpoints, in plain JSON types.

    step: optimizer steps done. best: value of the best dev metric so far, at best_step.
    worse_in_a_row: evaluations since the best one. stopped: whether run.patience ended training.
    losses: mean losses of the steps since the last log line. seconds: wall time of training, earlier sessions included.
    """

    step: int = 0
    best: float | None = None
    best_step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    worse_in_a_row: int = 0
    stopped: bool = False
    state_bytes: list[int] = field(default_factory=list)
    trained_steps: list[int] = field(default_factory=list)


class Trainer:
    """Trains an engine on a corpus; `run` is the whole story."""

    def __init__(
        self,
        config: Config,
        *,
        engine: Engine,
        chooser: Chooser,
        scores: LayerScores,
        plan: BatchPlan,
        corpus: Corpus,
        encoded: dict[str, list[dict[str, list[int]]]],
        pad_token_id: int,
        max_steps: int,
        checkpoints: Checkpoints,
        tracker: Tracker,
        device: torch.device,
        progress: Progress,
        identity: dict[str, Any],
        pretrained: Callable[[], dict[str, torch.Tensor]],
    ):
        self.config, self.engine, self.chooser, self.scores = config, engine, chooser, scores
        self.plan, self.corpus, self.encoded, self.pad_token_id = plan, corpus, encoded, pad_token_id
        self.max_steps, self.checkpoints, self.tracker, self.device = max_steps, checkpoints, tracker, device
        self.progress, self.identity, self.pretrained = progress, identity, pretrained
        self.eval_every = config.run.eval_every or plan.steps_per_epoch
        self.num_layers = engine.table.num_layers
        self._window: list[torch.Tensor] = []
        self._tokens = self._examples = 0
        self._batches: list[dict[str, torch.Tensor]] = []  # this rank's micro-batches of the last step
        self._last: tuple[int, Predictions] | None = None

    # ----- the story -----

    def run(self) -> None:
        """Train from where `progress` stands to `max_steps`."""
        started = self._mark = time.perf_counter()
        before = self.progress.seconds
        if self.progress.step == 0:
            self._first_selection()
        elif self.progress.best is None:  # resumed at a step whose best weights are elsewhere
            self._evaluate_and_save()
        while self.progress.step < self.max_steps and not self.progress.stopped:
            self._train_step()
            step = self.progress.step
            self.progress.seconds = before + time.perf_counter() - started
            if self._selects_after(step):
                self._select()
            if step % self.config.run.log_every == 0 or step == self.max_steps:
                self._log()
            if step % self.eval_every == 0 or step == self.max_steps:
                self._evaluate_and_save()
            elif self.config.run.save_every and step % self.config.run.save_every == 0:
                self._save(best=False)
        if self.progress.stopped:
            self._stopped_early()

    def _stopped_early(self) -> None:
        if self.progress.losses:
            self._log()
        self.tracker.say(
            f"stopped at step {self.progress.step}: {self.config.run.patience} evaluations without a better "
            f"{self.config.run.best_metric} than that of step {self.progress.best_step}"
        )

    def _selects_after(self, step: int) -> bool:
        """Whether layers are chosen after `step`; not after the last, when nothing would train them."""
        return self.chooser.is_due(step) and step < self.max_steps

    def _train_step(self) -> None:
        """One global batch: this rank's micro-batches, then the update."""
        step, optim = self.progress.step, self.config.optim
        scoring = self.chooser.needs_scores and self._selects_after(step + 1)
        fresh = self.config.tuning.scores == "fresh"
        rate = learning_rate(
            step,
            peak=optim.lr,
            warmup_steps=optim.warmup_steps,
            max_steps=self.max_steps,
            schedule=optim.schedule,
        )
        self.engine.module.train()
        total = torch.zeros((), device=self.device)
        self._batches = []
        for batch in self._micro_batches(step):
            with self._scored(batch, self.engine.gradient_factor, fresh) if scoring else contextlib.nullcontext():
                total += self.engine.forward_backward(batch)
            self._batches.append(batch)
            self.engine.step(rate)
        self._window.append(total / self.engine.accumulation_steps)
        self.progress.step = step + 1
        for layer in self.engine.selected:
            self.progress.trained_steps[layer] += 1
        self.tracker.advance(self.progress.step)

    def _micro_batches(self, step: int):
        """This rank's micro-batches of a step as tensors on the device, each with its own dropout seed."""
        rank, world = runtime.rank(), runtime.launched_world_size()
        examples = self.corpus.splits["train"]
        plan = self.plan.step(step)
        for positions in plan:
            self._tokens += sum(self.plan.lengths[i] for i in positions)
            self._examples += len(positions)
        for number in range(rank, len(plan), world):
            # Seeded by place in the plan, not by rank: any split over ranks draws the same dropout.
            torch.manual_seed(runtime.derived_seed(self.config.run.seed, "micro-batch", step, number))
            yield collate(
                [self.encoded["train"][i] for i in plan[number]],
                self.pad_token_id,
                [examples[i].label for i in plan[number]],
                self.device,
            )

    # ----- selection -----

    def _scored(self, batch: dict[str, torch.Tensor], factor: float, all_layers: bool):
        return self.scores.micro_batch(batch["attention_mask"], all_layers=all_layers, factor=factor)

    def _first_selection(self) -> None:
        """Choose before any update, so that no step trains all layers."""
        self.progress.trained_steps = [0] * self.num_layers
        chosen = self.chooser.first()
        if chosen is not None:
            self._train_layers(chosen, None, time.perf_counter())
            return
        self.engine.module.train()
        for batch in self._micro_batches(0):
            with self._scored(batch, 1.0, all_layers=True):
                self.engine.probe(batch, backward=self.scores.needs_gradients)
        self._tokens = self._examples = 0
        self._select()

    def _select(self) -> None:
        """Choose layers from what this step showed, and train them from the next step on."""
        started = time.perf_counter()
        raw = self.scores.reduce() if self.chooser.needs_scores else None
        sign = 1.0 if self.scores.higher_is_important else -1.0
        signed = None if raw is None else [None if score is None else sign * score for score in raw]
        seen = Observation(self.progress.step, signed, self.engine.selected, self._trials())
        chosen = self.chooser.choose(seen)
        self._check_scores()
        self._train_layers(chosen, raw, started)

    def _trials(self) -> list[tuple[list[int], float]]:
        """Mean loss of the step's micro-batches on all ranks, under each set of layers that the chooser suppresses."""
        sets = self.chooser.trials(self.progress.step) if self._batches else []
        if not sets:
            return []
        self.engine.module.eval()  # the same answer for any split over ranks: no dropout
        losses = [torch.stack([self.engine.trial(batch, layers) for batch in self._batches]).mean() for layers in sets]
        self.engine.module.train()
        mean = runtime.all_reduce(torch.stack(losses)) / runtime.launched_world_size()
        return list(zip(sets, mean.tolist()))

    def _train_layers(self, chosen: list[int], raw: list[float | None] | None, started: float) -> None:
        verify_selection(chosen, self.num_layers, self.device)
        changed = chosen != self.engine.selected
        self.engine.reselect(chosen)
        self.progress.state_bytes.append(self.engine.optimizer_state_bytes())
        self.tracker.selection(
            {
                "step": self.progress.step,
                "scores": raw,
                "selected": chosen,
                "changed": changed,
                "seconds": time.perf_counter() - started,
                "num_layers": self.num_layers,
            }
        )

    def _check_scores(self) -> None:
        """Stop when scores have not been finite for too long."""
        bad, limit = getattr(self.chooser, "bad_in_a_row", 0), self.config.tuning.max_bad_scores
        if bad:
            self.tracker.say(
                f"step {self.progress.step}: a layer score is not finite ({bad} in a row); layers are kept"
            )
        if bad >= limit:
            raise TrainingError(
                f"step {self.progress.step}: {bad} selections in a row had scores that are not finite "
                f"(tuning.max_bad_scores {limit}); lower optim.lr, or use model.dtype float32"
            )

    # ----- records -----

    def _drain(self) -> list[float]:
        """Mean losses over ranks of the steps since the last log line, oldest first. Collective.

        Raises:
            TrainingError: when one is not finite; nothing is saved after such a step.
        """
        if self._window:
            window = runtime.all_reduce(torch.stack(self._window)) / runtime.launched_world_size()
            self.progress.losses += window.tolist()
            self._window = []
        losses, step = self.progress.losses, self.progress.step
        bad = [step - len(losses) + 1 + i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            raise TrainingError(f"the loss is not finite at steps {bad}; lower optim.lr, or use model.dtype float32")
        return losses

    def _log(self) -> None:
        """Reduce and record the losses since the last line."""
        losses = self._drain()
        self.progress.losses = []
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        step, norm, limit = self.progress.step, self.engine.grad_norm(), self.config.optim.max_grad_norm
        self.tracker.train(
            {
                "step": step,
                "loss": sum(losses) / len(losses),
                "lr": learning_rate(
                    step - 1,
                    peak=self.config.optim.lr,
                    warmup_steps=self.config.optim.warmup_steps,
                    max_steps=self.max_steps,
                    schedule=self.config.optim.schedule,
                ),
                "grad_norm": norm,
                "clipped": int(0 < limit < norm),
                "layers_selected": len(self.engine.selected),
                "tokens_per_second": self._tokens / seconds,
                "examples_per_second": self._examples / seconds,
                "seconds": seconds,
            }
        )
        self._tokens = self._examples = 0
        self.tracker.memory(
            {
                "step": step,
                "peak_memory_bytes": peak_memory_bytes(self.device),
                "optimizer_state_bytes": self.engine.optimizer_state_bytes(),
                "parked_state_bytes": self.engine.parked_bytes(),
            }
        )

    # ----- evaluation and checkpoints -----

    def predict(self, split: str) -> Predictions:
        """Logits of a split with the weights as they are. Collective."""
        self.engine.module.eval()
        predictions = predict(
            lambda batch: self.engine.module(**batch).logits,
            self.encoded[split],
            [example.label for example in self.corpus.splits[split]],
            len(self.corpus.labels),
            batch_size=EVALUATION_BATCH * self.config.optim.micro_batch_size,
            pad_token_id=self.pad_token_id,
            device=self.device,
        )
        self.engine.module.train()
        return predictions

    def _evaluate_and_save(self) -> None:
        predictions = self.predict("dev")
        values = metrics(predictions, self.corpus.labels)
        self._last = (self.progress.step, predictions)
        self.tracker.evaluation(self.progress.step, "dev", values, predictions.labels, predictions.probabilities)
        value = values[self.config.run.best_metric] * (-1 if self.config.run.best_metric == "loss" else 1)
        best = self.progress.best is None or value > self.progress.best
        if best:
            self.progress.best, self.progress.best_step = value, self.progress.step
        self.progress.worse_in_a_row = 0 if best else self.progress.worse_in_a_row + 1
        patience = self.config.run.patience
        self.progress.stopped = bool(patience) and self.progress.worse_in_a_row >= patience
        every = self.config.run.save_every
        if best or not every or self.progress.step % every == 0 or self._is_over():
            self._save(best=best)
        self._mark = time.perf_counter()  # speed is that of training

    def _is_over(self) -> bool:
        return self.progress.stopped or self.progress.step == self.max_steps

    def _save(self, *, best: bool) -> None:
        """Write a checkpoint. Collective."""
        self._drain()  # the losses since the last log line are kept
        trainable = self.engine.trainable(self._saved_layers())
        tensors, steps = self.engine.full_state()
        with runtime.shared_errors():
            if runtime.rank() == 0:
                state = {
                    "progress": vars(self.progress),
                    "selected": self.engine.selected,
                    "chooser": self.chooser.state_dict(),
                    "adam_steps": steps,
                    "run": self.identity,
                }
                self.checkpoints.save(self.progress.step, trainable, tensors, state, best=best)

    def _saved_layers(self) -> list[int] | None:
        """Layers whose weights a checkpoint needs: of a model's own weights, only those that ever trained."""
        if not self.engine.table.pretrained:
            return None
        return [layer for layer, steps in enumerate(self.progress.trained_steps) if steps]

    def restore(self, folder: Path, state: dict[str, Any]) -> None:
        """Take over selection, chooser and optimizer state; adapters are already in the model."""
        self.chooser.load_state_dict(state["chooser"])
        self.engine.reselect(state["selected"])
        self.engine.load_full_state(read_tensors(folder, OPTIMIZER), state["adam_steps"])

    def finish(self, folder: Path) -> dict[str, Any]:
        """Evaluate with the best weights: dev, and test once; write predictions and adapter. Returns the metrics."""
        if self._last is None or self._last[0] != self.progress.best_step:
            best = self.checkpoints.folder / f"step_{self.progress.best_step}"
            with runtime.shared_errors():
                weights = self.pretrained() | read_tensors(best, TRAINABLE)
            self.engine.load_trainable(weights)
            self._last = (self.progress.best_step, self.predict("dev"))
        predictions = {"dev": self._last[1]}
        if "test" in self.corpus.splits:
            predictions["test"] = self.predict("test")
        results = {split: metrics(values, self.corpus.labels) for split, values in predictions.items()}
        if "test" in results:
            seen = predictions["test"]
            self.tracker.evaluation(self.progress.best_step, "test", results["test"], seen.labels, seen.probabilities)
        with runtime.shared_errors(), writing(folder):
            for split, values in predictions.items() if runtime.rank() == 0 else ():
                name = "predictions.jsonl" if split == "dev" else f"predictions_{split}.jsonl"
                examples = self.corpus.splits[split]
                write_predictions(
                    folder / name,
                    [example.id for example in examples],
                    [example.label for example in examples],
                    values.probabilities,
                    self.corpus.labels,
                )
            self.engine.save_adapter(
                folder / "adapter", self.config.adapter, list(self.corpus.labels), self._saved_layers()
            )
        return results
