"""What a run tells: JSON lines and TensorBoard files, console lines and a progress bar. Rank 0 only.

Record kinds: train (per log interval), eval (per evaluation) and memory in metrics.jsonl; one object per selection in
selection.jsonl. Names contain units. TensorBoard also gets pictures, the configuration and the hparams table.
"""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from irtune.config import Config
from irtune.tasks import SINGLE_LABEL, Predictions, Task
from irtune.tracking import pictures
from irtune.tracking.records import append_record, keep_until

log = logging.getLogger("irtune")
# Pictures of the layers are drawn at log lines after a selection, at most every 30 s and, later, every 2 % of the time
# so far: a tenth of a second then never matters, and the event file does not fill with pictures.
PICTURE_SECONDS, PICTURE_SHARE = 30.0, 0.02


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
    ):
        """Open the files; on resume, records after `start_step` are removed, so that none appears twice.

        `score` is the kind of layer scores, for the legend of their picture. The text tab gets `folder`'s config.yaml.
        """
        self.active, self.headline = active, task.headline
        if not active:
            return
        self.step, self.score = start_step, score
        self.metrics = folder / "metrics.jsonl"
        self.selections = folder / "selection.jsonl"
        for file in (self.metrics, self.selections):
            keep_until(file, start_step)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1 if start_step else None)
        past = self.selections.read_text(encoding="utf-8").split("\n")[:-1] if self.selections.exists() else []
        self._history = [pictures.row(json.loads(line)) for line in past]
        self._opened = self._drawn = time.monotonic()
        self._pictured = (-1, -1)  # selections and step of the last pictures
        if (folder / "config.yaml").is_file():
            text = (folder / "config.yaml").read_text(encoding="utf-8")
            self.board.add_text("configuration", f"```yaml\n{text}```", start_step)
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
        """Lines for the console, and for TensorBoard's text tab, where they stay as they are."""
        if self.active:
            self.say(text)
            self.board.add_text(tag, f"```\n{text}\n```", self.step)

    def train(self, record: dict[str, Any]) -> None:
        """Record a log interval."""
        if not self.active:
            return
        step = record["step"]
        append_record(self.metrics, {"kind": "train"} | record)
        for name, tag in (
            ("loss", "train/loss"),
            ("lr", "train/learning_rate"),
            ("grad_norm", "train/gradient_norm"),
            ("clipped", "train/clipped"),
            ("skipped_steps", "train/skipped_steps"),
            ("tokens_per_second", "speed/tokens_per_second"),
            ("examples_per_second", "speed/examples_per_second"),
            ("padding_share", "speed/padding_share"),
        ):
            if record[name] is not None:
                self.board.add_scalar(tag, record[name], step)
        now, new = time.monotonic(), len(self._history) > self._pictured[0]
        if new and now - self._drawn >= max(PICTURE_SECONDS, PICTURE_SHARE * (now - self._opened)):
            self._draw_layers()
        self.say(
            f"step {step}  loss {_number(record['loss'], '.4f')}  lr {record['lr']:.2e}  "
            f"|g| {_number(record['grad_norm'], '.2f')}  "
            f"layers {record['layers_selected']}  {record['tokens_per_second']:.0f} tokens/s"
        )

    def memory(self, record: dict[str, Any]) -> None:
        """Record memory, all values in bytes."""
        if not self.active:
            return
        append_record(self.metrics, {"kind": "memory"} | record)
        for name in ("peak_memory_bytes", "optimizer_state_bytes", "parked_state_bytes"):
            self.board.add_scalar(f"memory/{name.removesuffix('_bytes')}(MiB)", record[name] / 2**20, record["step"])

    def selection(self, record: dict[str, Any]) -> None:
        """Record a selection: scores per layer (null where unknown), selected ids, whether they changed, seconds."""
        if not self.active:
            return
        step = record["step"]
        append_record(self.selections, record)
        self._history.append(pictures.row(record))
        for layer, score in enumerate(record["scores"] or []):
            if score is not None:
                self.board.add_scalar(f"layer_score/{layer:02d}", score, step)
        for layer in range(record["num_layers"]):
            self.board.add_scalar(f"layer_trained/{layer:02d}", float(layer in record["selected"]), step)
        self.board.add_scalar("selection/layers", len(record["selected"]), step)
        self.board.add_scalar("selection/seconds", record["seconds"], step)

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
        for name, value in values.items():
            if isinstance(value, float) and name != "macro_f1_present":
                self.board.add_scalar(f"{split}/{name}", value, step)
        names, rows = list(values["per_class"]), values["per_class"].values()
        if "confusion_matrix" in values:
            self._picture(f"{split}/confusion_matrix", pictures.confusion_map(values["confusion_matrix"], names), step)
        if "macro_f1" in values:
            for name, row in values["per_class"].items():
                self.board.add_scalar(f"{split}_f1/{name}", row["f1"], step)
            bars = pictures.f1_bars([row["f1"] for row in rows], names, [row["examples"] for row in rows])
            self._picture(f"{split}/f1_per_class", bars, step)
        if predictions is not None:
            positives, scores = predictions.positives, predictions.probabilities
            for number, name in enumerate(names if positives is not None else ()):
                self.board.add_pr_curve(f"{split}_pr/{name}", positives[:, number], scores[:, number], step)
        shown = "  ".join(f"{words} {values[name]:.3f}" for name, words in self.headline.items())
        self.say(f"step {step}  {split}: {shown}  loss {values['loss']:.4f}")

    def outcome(self, config: Config, results: dict[str, Any]) -> None:
        """Fill the hparams tab: what was chosen, and the metrics of the best weights as results.json has them."""
        if not self.active:
            return
        final = {
            f"final/{split}_{name}": results[split][name]
            for split in ("dev", "test")
            for name in self.headline
            if split in results
        }
        # Not add_hparams: it opens a run of its own, beside this one's curves.
        writer: Any = self.board.file_writer
        for summary in hparams(_choices(config, results), final):
            writer.add_summary(summary, results["steps"])
        for tag, value in final.items():
            self.board.add_scalar(tag, value, results["steps"])

    def close(self) -> None:
        """Draw the last pictures, flush and close."""
        if self.active:
            self.bar.close()
            self._draw_layers()
            self.board.close()

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
        self.board.add_image(tag, pictures.rgb(figure), step, dataformats="HWC")


def _choices(config: Config, results: dict[str, Any]) -> dict[str, str | float]:
    """The columns of the hparams tab, by the names of the options where there is one."""
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
