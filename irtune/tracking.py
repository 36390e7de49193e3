"""What a run tells: JSON lines and TensorBoard files, console lines and a progress bar. Rank 0 only.

Record kinds: train (per log interval), eval (per evaluation) and memory in metrics.jsonl; one object per selection in
selection.jsonl. Units stand in the names.
"""

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

log = logging.getLogger("irtune")


class Tracker:
    """Writes the records of a run; on other ranks than 0 it does nothing."""

    def __init__(self, folder: Path, *, active: bool, start_step: int, max_steps: int):
        """Open the files; on resume, records after `start_step` are taken out, so that none stands twice."""
        self.active = active
        if not active:
            return
        self.metrics = folder / "metrics.jsonl"
        self.selections = folder / "selection.jsonl"
        for file in (self.metrics, self.selections):
            keep_until(file, start_step)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1 if start_step else None)
        # Quiet when nobody watches: a bar in a log file is noise.
        self.bar = tqdm(
            total=max_steps, initial=start_step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`."""
        if self.active:
            self.bar.update(step - self.bar.n)

    def say(self, line: str) -> None:
        """One line on the console that does not break the progress bar."""
        if self.active:
            with tqdm.external_write_mode(sys.stdout):
                log.info(line)

    def train(self, record: dict[str, Any]) -> None:
        """Record a log interval."""
        if not self.active:
            return
        step = record["step"]
        _append(self.metrics, {"kind": "train"} | record)
        for name, tag in (
            ("loss", "train/loss"),
            ("lr", "train/learning_rate"),
            ("grad_norm", "train/gradient_norm"),
            ("tokens_per_second", "speed/tokens_per_second"),
            ("examples_per_second", "speed/examples_per_second"),
        ):
            self.board.add_scalar(tag, record[name], step)
        self.say(
            f"step {step}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  |g| {record['grad_norm']:.2f}  "
            f"layers {record['layers_selected']}  {record['tokens_per_second']:.0f} tokens/s"
        )

    def memory(self, record: dict[str, Any]) -> None:
        """Record memory, all values in bytes."""
        if not self.active:
            return
        _append(self.metrics, {"kind": "memory"} | record)
        for name in ("peak_memory_bytes", "optimizer_state_bytes", "parked_state_bytes"):
            self.board.add_scalar(f"memory/{name.removesuffix('_bytes')}(MiB)", record[name] / 2**20, record["step"])

    def selection(self, record: dict[str, Any]) -> None:
        """Record a selection: scores per layer (null where unknown), selected ids, whether they changed, seconds."""
        if not self.active:
            return
        step = record["step"]
        _append(self.selections, record)
        for layer, score in enumerate(record["scores"] or []):
            if score is not None:
                self.board.add_scalar(f"layer_score/{layer:02d}", score, step)
        for layer in range(record["num_layers"]):
            self.board.add_scalar(f"layer_trained/{layer:02d}", float(layer in record["selected"]), step)
        self.board.add_scalar("selection/layers", len(record["selected"]), step)
        self.board.add_scalar("selection/seconds", record["seconds"], step)

    def evaluation(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Record the metrics of a split."""
        if not self.active:
            return
        _append(self.metrics, {"kind": "eval", "step": step, "split": split} | values)
        for name in ("loss", "accuracy", "macro_precision", "macro_recall", "macro_f1", "auprc"):
            self.board.add_scalar(f"{split}/{name}", values[name], step)
        for name, row in values["per_class"].items():
            self.board.add_scalar(f"{split}_f1/{name}", row["f1"], step)
        self.say(
            f"step {step}  {split}: accuracy {values['accuracy']:.3f}  macro-F1 {values['macro_f1']:.3f}  "
            f"AUPRC {values['auprc']:.3f}  loss {values['loss']:.4f}"
        )

    def close(self) -> None:
        """Flush and close."""
        if self.active:
            self.bar.close()
            self.board.close()


def keep_until(file: Path, step: int) -> None:
    """Leave out the records of `file` after `step`; a last line cut short by a kill goes too."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    scratch = file.with_suffix(".part")
    scratch.write_text("".join(kept) if step else "", encoding="utf-8")
    os.replace(scratch, file)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path`, complete or not at all."""
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def write_predictions(
    path: Path, ids: Sequence[str], labels: Sequence[int], probabilities: Any, names: Sequence[str]
) -> None:
    """Write predictions.jsonl: id, label, predicted and the probability of each label, one object per example."""
    scratch = path.with_name(f".{path.name}")
    with scratch.open("w", encoding="utf-8") as out:
        for example, label, row in zip(ids, labels, probabilities.tolist()):
            predicted = names[max(range(len(row)), key=row.__getitem__)]
            record = {
                "id": example,
                "label": names[label],
                "predicted": predicted,
                "probabilities": dict(zip(names, (round(value, 6) for value in row))),
            }
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(scratch, path)


def _append(file: Path, record: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(record, ensure_ascii=False) + "\n")
