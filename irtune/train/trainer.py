"""The loop: accumulate, update, select, evaluate, save."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from irtune.config import Config
from irtune.config.warmup import warmup_length
from irtune.distributed import runtime
from irtune.engine import Engine
from irtune.engine.losses import logit_adjustment
from irtune.errors import StoppedError, TrainingError
from irtune.evaluation.metrics import Predictions, metrics
from irtune.files import writing
from irtune.memory.measure import peak_memory_bytes
from irtune.models import RunFacts
from irtune.tracking.records import write_predictions
from irtune.tracking.tracker import Tracker
from irtune.train.checkpoint import OPTIMIZER, Checkpoints, mean_weights, read_tensors, versions
from irtune.train.collapse import collapse
from irtune.train.first_adapter import check_what_is_written
from irtune.train.frozen_outputs import keep_frozen_outputs
from irtune.train.layer_selection import LayerSelection
from irtune.train.learning_rate import learning_rate
from irtune.train.nonfinite import find_origin
from irtune.train.progress import CompletedStep, Progress, Window
from irtune.train.resume import ResumePoint
from irtune.train.training_data import TrainingData


class Trainer:
    """Trains an engine on a corpus; `run` is the whole story."""

    def __init__(
        self,
        config: Config,
        *,
        engine: Engine,
        data: TrainingData,
        layers: LayerSelection,
        checkpoints: Checkpoints,
        tracker: Tracker,
        progress: Progress,
        pretrained: Callable[[], dict[str, torch.Tensor]],
    ):
        """`pretrained`: reads pretrained weights that training overwrote, see `setup.pretrained_weights`."""
        self.config, self.engine, self.data, self.layers = config, engine, data, layers
        self.checkpoints, self.tracker, self.progress, self.pretrained = checkpoints, tracker, progress, pretrained
        self.eval_every = config.run.eval_every or data.sampler.steps_per_epoch
        self.window = Window(progress)
        self._last: tuple[int, Predictions] | None = None
        self._end_of_step: torch.cuda.Event | None = None
        self._began = time.perf_counter()
        self._saved_step = -1
        self._since: float | None = None  # when training went on after something else
        self._shift = logit_adjustment(config.run.logit_adjust, data.label_counts()).to(data.device)
        self.averaged: list[int] = []  # steps whose mean weights are the run's result, if they are

    # ----- the story -----

    def run(self) -> None:
        """Train from the step that `progress` has reached to `max_steps`.

        Raises:
            StoppedError: after a signal, when the step is done and saved.
            TrainingError: when losses, gradients or scores are not finite for too long.
        """
        with runtime.watch().signals.handled():
            self._run()

    def _run(self) -> None:
        self._mark = time.perf_counter()
        self._began = self._mark - self.progress.seconds  # as if earlier sessions had been just before
        # Once, and after each evaluation: there are some thousand modules to tell.
        self.engine.module.train()
        if self.progress.step == 0:
            runtime.doing("first selection")
            self.layers.first(self.data.batches(0))
            self._mark = time.perf_counter()
        elif self.progress.best is None and self.progress.best_step:  # resumed where the best weights are elsewhere
            self._evaluate_and_save()
        keep_frozen_outputs(self.config, self.engine, self.data, self.tracker)
        self._since = time.perf_counter()
        while self.progress.step < self.data.max_steps and not self.progress.stopped:
            batches = self._train_step()
            step = self.progress.step
            if self.layers.decide(batches):
                keep_frozen_outputs(self.config, self.engine, self.data, self.tracker)
            elif self.layers.is_due(step):
                self._count_applied_steps()
                runtime.doing(f"selection after step {step}")
                self.layers.select(batches)
            if step % self.config.run.log_every == 0 or step == self.data.max_steps:
                self._log()
            if step % self.eval_every == 0 or step == self.data.max_steps:
                self._evaluate_and_save()
            elif self.config.run.save_every and step % self.config.run.save_every == 0:
                self._save(best=False)
            self._heed_signals()
        if self.progress.stopped:
            self._stopped_early()

    def _heed_signals(self) -> None:
        """Save and end here if a rank got a signal; nothing to do when training is over anyway."""
        number = runtime.watch().signals.stops_after(self.progress.step, self._await_step_before())
        if number is None or self._is_over():
            return
        if self._saved_step != self.progress.step:
            self._save(best=False)
        raise StoppedError(number, self.progress.step)

    def _await_step_before(self) -> int:
        """Let the device end all steps but the last; how many it may then be behind.

        On a GPU the host may run ahead of what other ranks have begun, and signals need a bound for that. The last
        step is being computed meanwhile.
        """
        if self.data.device.type != "cuda":
            return 0
        before, self._end_of_step = self._end_of_step, torch.cuda.Event()
        self._end_of_step.record()
        if before is not None:
            before.synchronize()
        return 1

    def _stopped_early(self) -> None:
        if self.progress.losses:
            self._log()
        self.tracker.say(
            f"stopped at step {self.progress.step}: {self.config.run.patience} evaluations without a better "
            f"{self.config.run.best_metric} than that of step {self.progress.best_step}"
        )

    def _train_step(self) -> list[dict[str, torch.Tensor]]:
        """One global batch: this rank's micro-batches, then the update. Returns the micro-batches."""
        step = self.progress.step
        rate = self._learning_rate(step)
        total = torch.zeros((), device=self.data.device)
        batches = []
        lengths = self.data.lengths(step)
        per_batch = sum(map(len, lengths)) / len(lengths)  # examples of all ranks, on average
        runtime.doing(f"batch of step {step + 1}")
        self.window.count(lengths, packed=self.data.packed)
        for batch in self.data.batches(step):
            examples, tokens = batch["input_ids"].shape
            runtime.doing(f"gradients of step {step + 1}, a micro-batch of {examples} x {tokens} tokens")
            weight = examples / per_batch
            with self.layers.scoring(batch, step + 1, weight):
                total += self.engine.forward_backward(batch, weight)
            batches.append(batch)
            runtime.doing(f"update of step {step + 1}")
            self.engine.step(rate)
        self.progress.step = step + 1
        mean = total / self.engine.accumulation_steps
        self.window.add(CompletedStep(self.progress.step, self.engine.selected, self.engine.applied, mean))
        self.tracker.advance(self.progress.step)
        return batches

    def _learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0."""
        optim = self.config.optim
        return learning_rate(
            step,
            peak=optim.lr,
            warmup_steps=warmup_length(optim, self.data.max_steps),
            max_steps=self.data.max_steps,
            schedule=optim.schedule,
        )

    def _count_applied_steps(self) -> None:
        """Count the steps since the last call, before anything about them is written, chosen or reported.

        Not after each step: the host would wait for the device, which meanwhile could have begun the next.

        Raises:
            TrainingError: after too many skipped steps in a row.
        """
        for step in self.window.count_applied_steps():
            in_a_row = self.progress.skipped_in_a_row
            self.tracker.say(
                f"step {step} is skipped: its loss or gradients are not finite "
                f"({in_a_row} in a row, {self.progress.skipped} in all)"
            )
            if in_a_row >= self.config.run.max_skipped_steps:
                self._give_up(step, in_a_row)
        self.progress.seconds = time.perf_counter() - self._began

    def _give_up(self, step: int, in_a_row: int) -> None:
        """End training on steps whose loss or gradients were not finite; `step` is the last of them. Collective.

        Steps after it may have been applied before anybody looked, so that it need not fail again.

        Raises:
            TrainingError: names step, examples, and where the first such number arose.
        """
        runtime.doing(f"search for what is not finite in step {step}")
        origins = [find_origin(self.engine, batch) for batch in self.data.batches(step - 1)]
        mine = [(origin, names) for origin, names in zip(origins, self.data.ids(step - 1)) if origin is not None]
        found = [entry for entries in runtime.all_gather_object(mine) for entry in entries]
        where = "; ".join(f"{origin}, in a batch of the examples {', '.join(names)}" for origin, names in found)
        raise TrainingError(
            f"step {step}: {in_a_row} steps in a row had a loss or gradients that are not "
            f"finite (run.max_skipped_steps {self.config.run.max_skipped_steps}). The first such number is in "
            f"{where or 'gradients of parameters only: the loss and all layers are finite'}. Lower optim.lr, or use "
            "model.dtype float32"
        )

    # ----- records -----

    def _log(self) -> None:
        """Reduce and record the losses since the last line. Collective."""
        runtime.doing(f"log line of step {self.progress.step}")
        self._count_applied_steps()
        self.window.drain()
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        step, norm, limit = self.progress.step, self.engine.grad_norm(), self.config.optim.max_grad_norm
        tokens, examples, positions = self.window.tokens, self.window.examples, self.window.positions
        self.tracker.train(
            {
                "step": step,
                "loss": self.window.mean(),
                "lr": self._learning_rate(step - 1),
                "grad_norm": norm if math.isfinite(norm) else None,
                "clipped": int(math.isfinite(norm) and 0 < limit < norm),
                "skipped_steps": self.progress.skipped,
                "layers_selected": len(self.engine.selected),
                "tokens_per_second": tokens / seconds,
                "examples_per_second": examples / seconds,
                "padding_share": 1 - tokens / positions if positions else None,
                "seconds": seconds,
            }
        )
        self.tracker.memory(
            {
                "step": step,
                "peak_memory_bytes": peak_memory_bytes(self.data.device),
                "optimizer_state_bytes": self.engine.optimizer_state_bytes(),
                "parked_state_bytes": self.engine.parked_bytes(),
            }
        )

    # ----- evaluation and checkpoints -----

    def predict(self, split: str) -> Predictions:
        """Logits of a split with the weights as they are; dev tunes thresholds if asked. Collective."""
        self.engine.module.eval()
        predictions = self.data.evaluation(split, lambda batch: self.engine.module(**batch).logits + self._shift)
        self.engine.module.train()
        return predictions.tuned() if split == "dev" and self.config.run.thresholds == "tuned" else predictions

    def _stop_clock(self) -> None:
        """Count the time since training went on as training's; what follows is something else."""
        if self._since is not None:
            self.progress.training_seconds += time.perf_counter() - self._since
            self._since = None

    def _evaluate_and_save(self) -> None:
        self._count_applied_steps()
        self._stop_clock()
        tokens, step = self.data.evaluation_tokens, self.progress.step
        size = f"{self.data.evaluation_batch} examples" if tokens is None else f"{tokens} tokens"
        runtime.doing(f"evaluation after step {step}, in batches of {size}")
        predictions = self.predict("dev")
        values = metrics(predictions, self.data.corpus.labels)
        first, self._last = self._last is None, (self.progress.step, predictions)
        collapsed = collapse(predictions, self.data.corpus.labels, self.config)
        if collapsed is not None:
            self.tracker.say(f"step {step}: {collapsed}")
        self.tracker.evaluation(self.progress.step, "dev", values, predictions)
        value = self._value(values)
        best = self.progress.best is None or value > self.progress.best
        if best:
            self.progress.best, self.progress.best_step = value, self.progress.step
        self.progress.worse_in_a_row = 0 if best else self.progress.worse_in_a_row + 1
        patience = self.config.run.patience
        self.progress.stopped = bool(patience) and self.progress.worse_in_a_row >= patience
        every = self.config.run.save_every
        if best or not every or self.progress.step % every == 0 or self._is_over():
            self._save(best=best)
        if first:
            check_what_is_written(self.config, self.engine, self.data, self._saved_layers())
        self._mark = self._since = time.perf_counter()  # speed is that of training

    def _value(self, values: dict[str, Any]) -> float:
        """What the best checkpoint has most of."""
        metric = self.config.run.best_metric
        return values[metric] * (-1 if metric == "loss" else 1)

    def _is_over(self) -> bool:
        return self.progress.stopped or self.progress.step == self.data.max_steps

    def _save(self, *, best: bool) -> None:
        """Write a checkpoint. Collective."""
        runtime.doing(f"checkpoint of step {self.progress.step}")
        self._count_applied_steps()
        self._stop_clock()
        self.window.drain()  # the losses since the last log line are kept
        trainable = self.engine.trainable(self._saved_layers())
        tensors, steps = self.engine.full_state()
        with runtime.shared_errors():
            if runtime.rank() == 0:
                state = {
                    "progress": vars(self.progress),
                    "selected": self.engine.selected,
                    "chooser": self.layers.chooser.state_dict(),
                    "adam_steps": steps,
                    "run": self.checkpoints.identity,
                    "versions": versions(),
                }
                self.checkpoints.save(self.progress.step, trainable, tensors, state, best=best)
        self._saved_step = self.progress.step
        self._since = time.perf_counter()

    def _saved_layers(self) -> list[int] | None:
        """Layers whose weights a checkpoint needs: of a model's own weights, only those that ever trained."""
        if not self.engine.traits.pretrained:
            return None
        return [layer for layer, steps in enumerate(self.progress.trained_steps) if steps]

    def restore(self, resumed: ResumePoint) -> None:
        """Take over selection, chooser and optimizer state; adapters are already in the model."""
        folder, state = resumed.folder, resumed.state
        self.layers.chooser.load_state_dict(state["chooser"])
        self.engine.idle.has_trained([n for n, steps in enumerate(self.progress.trained_steps) if steps])
        self.engine.reselect(state["selected"])
        self.engine.load_full_state(read_tensors(folder, OPTIMIZER), state["adam_steps"])

    def _load(self, steps: list[int]) -> None:
        """Put the mean of the weights after `steps` into the model, for evaluation. Collective."""
        with runtime.shared_errors():
            first = self.pretrained()  # of layers that a checkpoint lacks
            folders = [self.checkpoints.folder / f"step_{step}" for step in steps]
        if self.engine.traits.pretrained and len(folders) > 1:
            first = self.engine.trainable(self._saved_layers()) | first
        with runtime.shared_errors():
            weights = mean_weights(folders, first)
        self.engine.load_trainable(weights)

    def _average(self, best: Predictions) -> Predictions:
        """Dev predictions with the mean weights of `run.average` evaluations, if they are better than `best`."""
        last, every, folder = self.progress.step, self.eval_every, self.checkpoints.folder
        evaluated = sorted({*range(every, last + 1, every), last})[-self.config.run.average :]
        steps = [step for step in evaluated if (folder / f"step_{step}").is_dir()]
        if not self.config.run.average or len(steps) < 2:
            return best
        runtime.doing("evaluation of the averaged weights")
        self._load(steps)
        averaged = self.predict("dev")
        labels, metric = self.data.corpus.labels, self.config.run.best_metric
        new, old = metrics(averaged, labels), metrics(best, labels)
        self.tracker.say(
            f"mean weights of steps {', '.join(map(str, steps))}: dev {metric} {new[metric]:.3f}; "
            f"step {self.progress.best_step} alone: {old[metric]:.3f}"
        )
        if self._value(new) > self._value(old):
            self.averaged = steps
            return averaged
        self._load([self.progress.best_step])
        return best

    def finish(self, folder: Path) -> dict[str, Any]:
        """Evaluate with the best weights: dev, and test once; write predictions and adapter. Returns the metrics."""
        runtime.doing("evaluation of the best weights")
        self.engine.end_training()
        if self._last is None or self._last[0] != self.progress.best_step:
            self._load([self.progress.best_step])
            self._last = (self.progress.best_step, self.predict("dev"))
        predictions = {"dev": self._average(self._last[1])}
        if "test" in self.data.corpus.splits and self.config.run.evaluate_test:
            predictions["test"] = replace(self.predict("test"), task=predictions["dev"].task)
        results = {split: metrics(values, self.data.corpus.labels) for split, values in predictions.items()}
        if "test" in results:
            self.tracker.evaluation(self.progress.best_step, "test", results["test"], predictions["test"])
        with runtime.shared_errors(), writing(folder):
            for split, values in predictions.items() if runtime.rank() == 0 else ():
                name = "predictions.jsonl" if split == "dev" else f"predictions_{split}.jsonl"
                examples = self.data.corpus.splits[split]
                labels = self.data.corpus.labels
                write_predictions(
                    folder / name,
                    [example.id for example in examples],
                    [values.task.shown(example.label, labels) for example in examples],
                    [values.task.written(row, labels) for row in values.probabilities],
                )
            if self.config.run.logit_adjust:
                self.engine.shift_logits(self._shift)
            self.engine.save_adapter(
                folder / "adapter",
                self.config.adapter,
                list(self.data.corpus.labels),
                self._saved_layers(),
                RunFacts.of(self.config),
            )
        return results | predictions["dev"].task.recorded(self.data.corpus.labels)
