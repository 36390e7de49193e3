"""Checkpoints that any number of ranks and any ZeRO stage can read: safetensors and JSON, complete or not there.

checkpoints/step_N/trainable.safetensors   adapters and head
                   optimizer.safetensors   moments (and masters) of every layer that has them, parked ones too
                   state.json              step, selection, chooser, step counts, metrics so far
checkpoints/latest, checkpoints/best       the name of a step folder
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from irtune.errors import CheckpointError

TRAINABLE, OPTIMIZER, STATE = "trainable.safetensors", "optimizer.safetensors", "state.json"


class Checkpoints:
    """The folder of a run's checkpoints. Only rank 0 writes."""

    def __init__(self, folder: Path, keep_last: int):
        self.folder, self.keep_last = folder, keep_last

    def pointer(self, name: str) -> Path | None:
        """The step folder that `latest` or `best` names, or None."""
        file = self.folder / name
        if not file.is_file():
            return None
        target = file.read_text(encoding="utf-8").strip()
        if not target.startswith("step_") or Path(target).name != target:
            raise CheckpointError(f"{file} names {target!r}, which is no step folder")
        return self.folder / target

    def save(
        self,
        step: int,
        trainable: dict[str, torch.Tensor],
        optimizer: dict[str, torch.Tensor],
        state: dict[str, Any],
        *,
        best: bool,
    ) -> None:
        """Write step_N under another name, flush it, rename it, and only then point `latest` (and `best`) to it."""
        target = self.folder / f"step_{step}"
        scratch = self.folder / f".writing_step_{step}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            save_file({name: tensor.contiguous() for name, tensor in trainable.items()}, scratch / TRAINABLE)
            save_file({name: tensor.contiguous() for name, tensor in optimizer.items()}, scratch / OPTIMIZER)
            (scratch / STATE).write_text(json.dumps(state | {"step": step}), encoding="utf-8")
            for file in scratch.iterdir():
                _flush(file)
            shutil.rmtree(target, ignore_errors=True)
            scratch.rename(target)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise CheckpointError(f"cannot write checkpoint {target}: {error.strerror}") from error
        self._point("latest", target)
        if best:
            self._point("best", target)
        self._prune()

    def _point(self, name: str, target: Path) -> None:
        scratch = self.folder / f".{name}"
        scratch.write_text(target.name, encoding="utf-8")
        _flush(scratch)
        scratch.replace(self.folder / name)

    def _prune(self) -> None:
        best = self.pointer("best")
        steps = sorted(self.folder.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
        for path in steps[: -self.keep_last]:
            if path != best:
                shutil.rmtree(path)


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        CheckpointError: when it is missing or damaged.
    """
    try:
        return json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no readable checkpoint: {error}") from error


def read_tensors(folder: Path, file: str) -> dict[str, torch.Tensor]:
    """Tensors of `TRAINABLE` or `OPTIMIZER`, on the CPU.

    Raises:
        CheckpointError: when the file is missing or damaged.
    """
    try:
        return load_file(folder / file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / file} cannot be read: {error}") from error


def load_into(parameters: list[tuple[str, torch.nn.Parameter]], tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Copy saved adapters and head into a model that is under no engine yet.

    Raises:
        CheckpointError: naming the first parameter that is missing or has another shape.
    """
    for name, parameter in parameters:
        saved = tensors.get(name)
        if saved is None or saved.shape != parameter.shape:
            shape = None if saved is None else tuple(saved.shape)
            raise CheckpointError(
                f"{folder}: {name} has shape {shape} there and {tuple(parameter.shape)} here; the checkpoint belongs "
                "to another model, adapter or list of labels; set run.resume to never and another run.output_dir"
            )
        parameter.data.copy_(saved)


def _flush(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
