"""Checkpoints that any number of ranks and any ZeRO stage can read: safetensors and JSON, complete or not there.

checkpoints/step_N/trainable.safetensors   adapters and head
                   optimizer.safetensors   moments (and masters) of every layer that has them, parked ones too
                   state.json              step, selection, chooser, step counts, metrics so far
                   manifest.json           size and SHA-256 of each of them
checkpoints/latest, checkpoints/best       the name of a step folder
"""

import json
import logging
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from irtune.distributed.partitioned import whole_shape, write_whole
from irtune.distributed.versions import versions as versions
from irtune.errors import CheckpointError, OutputError
from irtune.files import fingerprint, flush, write_text, writing

TRAINABLE, OPTIMIZER, STATE = "trainable.safetensors", "optimizer.safetensors", "state.json"
MANIFEST = "manifest.json"
STEP = re.compile("step_[0-9]{1,18}")
log = logging.getLogger("irtune")


class Checkpoints:
    """The folder of a run's checkpoints. Only rank 0 writes.

    identity: what a run must have in common with a checkpoint to go on from it, see `resume.run_identity`.
    """

    def __init__(self, folder: Path, keep_last: int):
        self.folder, self.keep_last = folder, keep_last
        self.identity: dict[str, Any] = {}

    def pointer(self, name: str) -> Path | None:
        """The step folder that `latest` or `best` names, or None."""
        file = self.folder / name
        if not file.is_file():
            return None
        target = file.read_bytes()[:100].decode("utf-8", "replace").strip()
        if not STEP.fullmatch(target):
            raise CheckpointError(f"{file} names {target!r}, which is not a step folder")
        return self.folder / target

    def newest_whole(self) -> Path | None:
        """The newest checkpoint that is not damaged, or None where there is none at all.

        Raises:
            CheckpointError: when there are checkpoints, and all of them are damaged; names each with the reason.
        """
        try:
            latest = self.pointer("latest")
        except CheckpointError as error:
            log.warning("%s", error)
            latest = None
        # Later steps than the latest belong to a run that was gone back from.
        until = int(latest.name[5:]) if latest is not None else None
        found = {int(path.name[5:]): path for path in self.folder.glob("step_*") if STEP.fullmatch(path.name)}
        steps = sorted((step for step in found if until is None or step <= until), reverse=True)
        if latest is not None and until not in found:
            log.warning("checkpoint %s is missing", latest)
        damages = []
        for step in steps:
            damage = find_damage(found[step])
            if damage is None:
                return found[step]
            log.warning("checkpoint %s is damaged and not used: %s", found[step], damage)
            damages.append(f"{found[step].name}: {damage}")
        if damages or latest is not None:
            raise CheckpointError(
                f"{self.folder} holds no undamaged checkpoint ({'; '.join(damages) or 'the latest is missing'}); "
                "remove the folder to start again"
            )
        return None

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
                files = {file.name: fingerprint(file) for file in sorted(scratch.iterdir())}
                (scratch / MANIFEST).write_text(json.dumps(files, indent=2), encoding="utf-8")
                for file in scratch.iterdir():
                    flush(file)
                shutil.rmtree(target, ignore_errors=True)
                scratch.rename(target)
                flush(self.folder)
                if best:
                    self._point("best", target)
                self._point("latest", target)
                self._prune(target)
        except OutputError:
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _point(self, name: str, target: Path) -> None:
        write_text(self.folder / name, target.name)

    def _prune(self, newest: Path) -> None:
        """Keep the newest `keep_last` and the best. Later steps belong to a run that was gone back from."""
        number = {path: int(path.name[5:]) for path in self.folder.glob("step_*") if STEP.fullmatch(path.name)}
        until = sorted((path for path in number if number[path] <= number[newest]), key=number.__getitem__)
        kept = {*until[-self.keep_last :], self.pointer("best"), newest}
        for path in number.keys() - kept:
            shutil.rmtree(path)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, in a few words, or None: every byte is as it was written."""
    for path in (folder, *(folder / name for name in (MANIFEST, TRAINABLE, OPTIMIZER, STATE))):
        if path.is_symlink():
            return f"{path.name} is a link, and checkpoints have none"
    try:
        wanted = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in wanted.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    if not {TRAINABLE, OPTIMIZER, STATE} <= set(files):
        return f"{MANIFEST} is incomplete"
    for name, (size, digest) in files.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
        if fingerprint(file)["sha256"] != digest:
            return f"{name} has a different checksum than when it was written"
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        CheckpointError: when it is missing or damaged.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder} is not a readable checkpoint: {str(error)[:200]}") from error
    for key in ("run", "progress"):
        if not isinstance(state, dict) or not isinstance(state.get(key), dict):
            raise CheckpointError(f"{folder} is not a readable checkpoint: {STATE} has no {key!r}")
    return state


def read_tensors(folder: Path, file: str) -> dict[str, torch.Tensor]:
    """Tensors of `TRAINABLE` or `OPTIMIZER`, on the CPU.

    Raises:
        CheckpointError: when the file is missing or damaged.
    """
    try:
        return load_file(folder / file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / file} cannot be read: {error}") from error


def mean_weights(folders: list[Path], first: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mean of the trainable tensors of several checkpoints, computed in fp64, in the tensors' own formats.

    Args:
        folders: the checkpoints.
        first: values of tensors that some of the checkpoints lack: layers that had not trained by then.

    Raises:
        CheckpointError: as `read_tensors`.
    """
    if len(folders) == 1:
        return first | read_tensors(folders[0], TRAINABLE)
    total: dict[str, torch.Tensor] = {}
    for folder in folders:
        tensors = first | read_tensors(folder, TRAINABLE)
        for name, tensor in tensors.items():
            total[name] = total.get(name, 0) + tensor.double() / len(folders)
    return {name: total[name].to(tensor.dtype) for name, tensor in tensors.items()}


def load_into(
    parameters: Sequence[tuple[str, torch.Tensor]],
    tensors: dict[str, torch.Tensor],
    folder: Path,
    optional: Collection[str] = (),
) -> None:
    """Copy saved adapters, decisions and head into a model that is under no engine yet; `optional` ones may be missing.

    Collective where parameters are partitioned.

    Raises:
        CheckpointError: naming the first parameter that is missing or has another shape.
    """
    present = [(name, parameter) for name, parameter in parameters if name in tensors or name not in optional]
    for name, parameter in present:
        saved, shape = tensors.get(name), whole_shape(parameter)
        if saved is None or saved.shape != shape:
            found = None if saved is None else tuple(saved.shape)
            raise CheckpointError(
                f"{folder}: {name} has shape {found} there and {tuple(shape)} here; the checkpoint belongs "
                "to another model, adapter or list of labels; set run.resume to never and another run.output_dir"
            )
    for name, parameter in present:  # one by one: a rank need not have room for the whole model
        write_whole(parameter, tensors[name])
