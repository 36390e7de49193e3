"""What a run tells: JSON lines, TensorBoard or other trackers, console lines and a progress bar. Rank 0 only.

Record kinds: train (per log interval), eval (per evaluation) and memory in metrics.jsonl; one object per selection in
selection.jsonl. Names contain units. Trackers also get pictures, the configuration and the choices with final metrics.
"""

import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from irtune.config import Config
from irtune.tasks import SINGLE_LABEL, Predictions, Task
from irtune.tracking import pictures
from irtune.tracking.records import append_record, keep_until
from irtune.tracking.writers import open_writers

log = logging.getLogger("irtune")
# Pictures of the layers are drawn at log lines after a selection, at most every 30 s and, later, every 2 % of the time
# so far: a tenth of a second then never matters, and the event file does not fill with pictures.
PICTURE_SECONDS, PICTURE_SHARE = 30.0, 0.02


TAGS = {
    "loss": "train/loss",
    "lr": "train/learning_rate",
    "grad_norm": "train/gradient_norm",
    "clipped": "train/clipped",
    "skipped_steps": "train/skipped_steps",
    "tokens_per_second": "speed/tokens_per_second",
    "examples_per_second": "speed/examples_per_second",
    "padding_share": "speed/padding_share",
}


class Tracker:
    """Writes the records of a run; on other ranks than 0 it does nothing."""

    def __init__(
        self,
        folder: Path,
        *,
        active: bool,
        start_step: int,
        max_steps: int,
        score: str = "score",
        task: Task = SINGLE_LABEL,
        trackers: Sequence[str] = ("tensorboard",),
        metric: str = "macro_f1",
    ):
        """Open the files; on resume, records after `start_step` are removed, so that none appears twice.

        `score` is the kind of layer scores, for the legend of their picture; `metric` is the dev metric that progress
        lines show. Trackers get `folder`'s config.yaml.

        Raises:
            ConfigError: for one of `trackers` that cannot start.
        """
        self.active, self.headline = active, task.headline
        if not active:
            return
        self.step, self.start_step, self.max_steps, self.score = start_step, start_step, max_steps, score
        self._metric, self._dev = metric, ""
        self.metrics = folder / "metrics.jsonl"
        self.selections = folder / "selection.jsonl"
        for file in (self.metrics, self.selections):
            keep_until(file, start_step)
        self.writers = open_writers(trackers, folder, start_step)
        past = self.selections.read_text(encoding="utf-8").split("\n")[:-1] if self.selections.exists() else []
        self._history = [pictures.row(json.loads(line)) for line in past]
        self._opened = self._drawn = time.monotonic()
        self._pictured = (-1, -1)  # selections and step of the last pictures
        if (folder / "config.yaml").is_file():
            text = (folder / "config.yaml").read_text(encoding="utf-8")
            self._text("configuration", f"```yaml\n{text}```", start_step)
        # Quiet when nobody watches: a bar in a log file is noise.
        self.bar = tqdm(
            total=max_steps, initial=start_step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`."""
        if self.active:
            self.step = step
            self.bar.update(step - self.bar.n)

    def say(self, line: str) -> None:
        """One line on the console that does not break the progress bar."""
        if self.active:
            with tqdm.external_write_mode(sys.stdout):
                log.info(line)

    def text(self, tag: str, text: str) -> None:
        """Lines for the console and for trackers, where they stay as they are."""
        if self.active:
            self.say(text)
            self._text(tag, f"```\n{text}\n```", self.step)

    def train(self, record: dict[str, Any]) -> None:
        """Record a log interval."""
        if not self.active:
            return
        step = record["step"]
        append_record(self.metrics, {"kind": "train"} | record)
        self._scalars({tag: record[name] for name, tag in TAGS.items() if record[name] is not None}, step)
        now, new = time.monotonic(), len(self._history) > self._pictured[0]
        if new and now - self._drawn >= max(PICTURE_SECONDS, PICTURE_SHARE * (now - self._opened)):
            self._draw_layers()
        loss = f"loss {_number(record['loss'], '.4f')}"
        self.bar.set_postfix_str("  ".join(filter(None, (loss, self._dev))), refresh=False)
        left = (now - self._opened) / max(1, step - self.start_step) * max(0, self.max_steps - step)
        self.say(
            f"step {step}  {loss}  lr {record['lr']:.2e}  |g| {_number(record['grad_norm'], '.2f')}  "
            f"layers {record['layers_selected']}  {record['tokens_per_second']:.0f} tokens/s  "
            f"{tqdm.format_interval(left)} left{self._dev and '  '}{self._dev}"
        )

    def memory(self, record: dict[str, Any]) -> None:
        """Record memory, all values in bytes."""
        if not self.active:
            return
        append_record(self.metrics, {"kind": "memory"} | record)
        names = ("peak_memory_bytes", "optimizer_state_bytes", "parked_state_bytes")
        values = {f"memory/{name.removesuffix('_bytes')}(MiB)": record[name] / 2**20 for name in names}
        self._scalars(values, record["step"])

    def selection(self, record: dict[str, Any]) -> None:
        """Record a selection: scores per layer (null where unknown), selected ids, whether they changed, seconds."""
        if not self.active:
            return
        step = record["step"]
        append_record(self.selections, record)
        self._history.append(pictures.row(record))
        scores = enumerate(record["scores"] or [])
        values = {f"layer_score/{layer:02d}": score for layer, score in scores if score is not None}
        for layer in range(record["num_layers"]):
            values[f"layer_trained/{layer:02d}"] = float(layer in record["selected"])
        values |= {"selection/layers": len(record["selected"]), "selection/seconds": record["seconds"]}
        self._scalars(values, step)

    def evaluation(
        self,
        step: int,
        split: str,
        values: dict[str, Any],
        predictions: Predictions | None = None,
    ) -> None:
        """Record the metrics of a split; with `predictions` of labels, precision-recall curves too."""
        if not self.active:
            return
        append_record(self.metrics, {"kind": "eval", "step": step, "split": split} | values)
        if split == "dev":
            self._dev = f"dev {self._metric} {values[self._metric]:.3f}"
        scalars = {f"{split}/{name}": value for name, value in values.items()
                   if isinstance(value, float) and name != "macro_f1_present"}  # fmt: skip
        names, rows = list(values["per_class"]), values["per_class"].values()
        if "macro_f1" in values:
            scalars |= {f"{split}_f1/{name}": row["f1"] for name, row in values["per_class"].items()}
        self._scalars(scalars, step)
        if "confusion_matrix" in values:
            self._picture(f"{split}/confusion_matrix", pictures.confusion_map(values["confusion_matrix"], names), step)
        if "macro_f1" in values:
            bars = pictures.f1_bars([row["f1"] for row in rows], names, [row["examples"] for row in rows])
            self._picture(f"{split}/f1_per_class", bars, step)
        if predictions is not None:
            positives, scores = predictions.positives, predictions.probabilities
            for number, name in enumerate(names if positives is not None else ()):
                for writer in self.writers:
                    writer.curve(f"{split}_pr/{name}", positives[:, number], scores[:, number], step)
        shown = "  ".join(f"{words} {values[name]:.3f}" for name, words in self.headline.items())
        self.say(f"step {step}  {split}: {shown}  loss {values['loss']:.4f}")

    def outcome(self, config: Config, results: dict[str, Any]) -> None:
        """What was chosen, and the metrics of the best weights as results.json has them."""
        if not self.active:
            return
        final = {
            f"final/{split}_{name}": results[split][name]
            for split in ("dev", "test")
            for name in self.headline
            if split in results
        }
        for writer in self.writers:
            writer.outcome(_choices(config, results), final, results["steps"])

    def close(self) -> None:
        """Draw the last pictures, flush and close."""
        if self.active:
            self.bar.close()
            self._draw_layers()
            for writer in self.writers:
                writer.close()

    def _draw_layers(self) -> None:
        """Pictures of scores and trained layers, unless nothing happened since the last ones."""
        state = (len(self._history), self.step)
        if state == self._pictured or not self._history or not len(self._history[0][1]):
            return
        steps, scores, trained = pictures.arrays(self._history)
        if np.isfinite(scores).any():
            self._picture("layers/scores", pictures.score_map(steps, scores, self.step, self.score), self.step)
        self._picture("layers/trained", pictures.trained_map(steps, trained, self.step), self.step)
        self._picture("layers/trained_share(%)", pictures.share_bars(steps, trained, self.step), self.step)
        self._drawn, self._pictured = time.monotonic(), state

    def _picture(self, tag: str, figure: Any, step: int) -> None:
        image = pictures.rgb(figure)
        for writer in self.writers:
            writer.picture(tag, image, step)

    def _scalars(self, values: dict[str, float], step: int) -> None:
        for writer in self.writers:
            writer.scalars(values, step)

    def _text(self, tag: str, text: str, step: int) -> None:
        for writer in self.writers:
            writer.text(tag, text, step)


def _choices(config: Config, results: dict[str, Any]) -> dict[str, str | float]:
    """The columns of TensorBoard's hparams tab, by the names of the options where there is one."""
    optim, tuning = config.optim, config.tuning
    return {
        "model": Path(config.model.name_or_path).name,
        "method": tuning.method,
        "score": tuning.score,
        "interval": tuning.interval,
        "adapter": config.adapter.type,
        "r": config.adapter.r,
        "lr": optim.lr,
        "loss": optim.loss,
        "batch": results["examples_per_step"],
        "steps": results["steps"],
        "seed": config.run.seed,
        "zero_stage": results["zero_stage"],
        "world_size": results["world_size"],
    }


def _number(value: float | None, form: str) -> str:
    return "none (steps skipped)" if value is None else format(value, form)
