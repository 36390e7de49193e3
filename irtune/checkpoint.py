"""Checkpoints that any number of ranks and any ZeRO stage can read: safetensors and JSON, complete or not there.

checkpoints/step_N/trainable.safetensors   adapters and head
                   optimizer.safetensors   moments (and masters) of every layer that has them, parked ones too
                   state.json              step, selection, chooser, step counts, metrics so far
checkpoints/latest, checkpoints/best       the name of a step folder
"""

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from irtune.errors import CheckpointError, OutputError

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
        """Write step_N under another name, flush it, rename it, and only then point (`best` and) `latest` to it."""
        target = self.folder / f"step_{step}"
        scratch = self.folder / f".writing_step_{step}"
        try:
            with writing(target):
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir(parents=True)
                save_file({name: tensor.contiguous() for name, tensor in trainable.items()}, scratch / TRAINABLE)
                save_file({name: tensor.contiguous() for name, tensor in optimizer.items()}, scratch / OPTIMIZER)
                (scratch / STATE).write_text(json.dumps(state | {"step": step}), encoding="utf-8")
                for file in scratch.iterdir():
                    _flush(file)
                shutil.rmtree(target, ignore_errors=True)
                scratch.rename(target)
                if best:
                    self._point("best", target)
                self._point("latest", target)
                self._prune(target)
        except OutputError:
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _point(self, name: str, target: Path) -> None:
        scratch = self.folder / f".{name}"
        scratch.write_text(target.name, encoding="utf-8")
        _flush(scratch)
        scratch.replace(self.folder / name)

    def _prune(self, newest: Path) -> None:
        """Keep the newest `keep_last` and the best. Later steps belong to a run that was gone back from."""
        number = {path: int(path.name[5:]) for path in self.folder.glob("step_*") if path.name[5:].isdigit()}
        until = sorted((path for path in number if number[path] <= number[newest]), key=number.__getitem__)
        kept = {*until[-self.keep_last :], self.pointer("best"), newest}
        for path in number.keys() - kept:
            shutil.rmtree(path)


@contextlib.contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turn the errors of a full disk or a read-only folder into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {what}: {getattr(error, 'strerror', None) or error}") from error


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


def load_into(
    parameters: list[tuple[str, torch.nn.Parameter]],
    tensors: dict[str, torch.Tensor],
    folder: Path,
    optional: Collection[str] = (),
) -> None:
    """Copy saved adapters and head into a model that is under no engine yet; `optional` ones may be missing.

    Raises:
        CheckpointError: naming the first parameter that is missing or has another shape.
    """
    for name, parameter in parameters:
        saved = tensors.get(name)
        if saved is None and name in optional:
            continue
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
