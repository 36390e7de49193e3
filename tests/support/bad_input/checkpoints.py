"""Checkpoints of a run that is to go on: damaged, hostile, or of another run."""

# ruff: noqa: E501 - tables

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from irtune.train.checkpoint import MANIFEST, OPTIMIZER, STATE, TRAINABLE, Checkpoints
from tests.support.bad_input.case import Box, Case

DEEP = "[" * 100_000


def checkpoint(change: Callable[[Path], object], *, resume: str | None = None):
    """One checkpoint, spoilt, in the output folder."""

    def build(box: Box) -> list[str]:
        folder = box.folder / "run/checkpoints"
        tensors = {"weight": torch.zeros(64)}
        Checkpoints(folder, keep_last=2).save(1, tensors, tensors, {"run": {}, "progress": {}}, best=True)
        change(folder / "step_1")
        return box.train(*([] if resume is None else ["--run.resume", str(folder / resume)]))

    return build


def cut(name: str):
    return lambda step: (step / name).write_bytes((step / name).read_bytes()[:-3])


def flipped(name: str):
    def change(step: Path) -> None:
        content = bytearray((step / name).read_bytes())
        content[-2] ^= 1
        (step / name).write_bytes(bytes(content))

    return change


def manifest(text: str | bytes):
    return lambda step: (step / MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())


def adds(name: str):
    def change(step: Path) -> None:
        files = json.loads((step / MANIFEST).read_text())
        (step / MANIFEST).write_text(json.dumps(files | {name: {"bytes": 4, "sha256": "0"}}))

    return change


def signed(name: str, content: str | bytes):
    """Another content for a file, with the manifest that belongs to it: what an attacker can make."""

    def change(step: Path) -> None:
        data = content if isinstance(content, bytes) else content.encode()
        (step / name).write_bytes(data)
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (step / MANIFEST).write_text(json.dumps(json.loads((step / MANIFEST).read_text()) | {name: entry}))

    return change


def linked(step: Path) -> None:
    """The whole step is elsewhere, and a link leads there."""
    outside = step.parents[2] / "elsewhere"
    shutil.move(step, outside)
    step.symlink_to(outside)


def linked_file(step: Path) -> None:
    outside = step.parents[2] / "elsewhere.safetensors"
    shutil.move(step / TRAINABLE, outside)
    (step / TRAINABLE).symlink_to(outside)


def odd_number(step: Path) -> None:
    """Digits that Python calls digits and cannot read."""
    step.rename(step.with_name("step_\u00b2"))


def pointer(content: bytes, *, keep: bool = False):
    """Another content for `latest`, and a step that is damaged or gone."""

    def change(step: Path) -> None:
        (step.parent / "latest").write_bytes(content)
        flipped(STATE)(step) if keep else shutil.rmtree(step)

    return change


NONE_WHOLE = "holds no undamaged checkpoint (...); remove the folder to start again"
CASES = [
    Case("a flipped bit in the adapters", checkpoint(flipped(TRAINABLE)), "step_1: ... has a different checksum than when it was written"),
    Case("a flipped bit in the optimizer's state", checkpoint(flipped(OPTIMIZER)), "has a different checksum than when it was written"),
    Case("a flipped bit in state.json", checkpoint(flipped(STATE)), "has a different checksum than when it was written"),
    Case("a file that is cut", checkpoint(cut(TRAINABLE)), "trainable.safetensors has ... bytes, not ..."),
    Case("a file that is missing", checkpoint(lambda step: (step / OPTIMIZER).unlink()), "optimizer.safetensors is missing"),
    Case("a checkpoint without manifest", checkpoint(lambda step: (step / MANIFEST).unlink()), "manifest.json cannot be read (...)"),
    Case("a manifest that is cut", checkpoint(cut(MANIFEST)), "manifest.json cannot be read (...)"),
    Case("a manifest that is a list", checkpoint(manifest("[]")), "manifest.json cannot be read (...)"),
    Case("a manifest that is not UTF-8", checkpoint(manifest(b"\xff{}")), "manifest.json cannot be read (...)"),
    Case("a manifest of 100,000 brackets", checkpoint(manifest(DEEP)), "manifest.json cannot be read (...)"),
    Case("a manifest that names too few files", checkpoint(manifest("{}")), "manifest.json is incomplete"),
    Case("a manifest with sizes that are no numbers", checkpoint(manifest(json.dumps(
        {name: {"bytes": float("nan"), "sha256": None} for name in (TRAINABLE, OPTIMIZER, STATE)}))), "has ... bytes, not nan"),
    Case("a manifest that leads out of its folder", checkpoint(adds("../../../secret")), "../../../secret is missing"),
    Case("a pointer that leads out of its folder", checkpoint(pointer(b"../../step_1", keep=True)), NONE_WHOLE),
    Case("a pointer that is not UTF-8", checkpoint(pointer(b"step_\xff", keep=True)), NONE_WHOLE),
    Case("a pointer to a step that is missing", checkpoint(pointer(b"step_7")), NONE_WHOLE),
    Case("a step that is a link to another folder", checkpoint(linked), "is a link"),
    Case("a file of a checkpoint that is a link", checkpoint(linked_file), "is a link"),
    Case("a step whose number is no number", checkpoint(odd_number), NONE_WHOLE),
    Case("a state.json that is a list", checkpoint(signed(STATE, "[]")), "is not a readable checkpoint: ..."),
    Case("a state.json of 100,000 brackets", checkpoint(signed(STATE, DEEP)), "is not a readable checkpoint: ..."),
    Case("a state.json without the run's settings", checkpoint(signed(STATE, "{}")), "is not a readable checkpoint: ..."),
    Case("a checkpoint of another run", checkpoint(lambda step: None), "cannot be continued: ..."),
    Case("a folder to resume that is not there", checkpoint(lambda step: None, resume="step_9"), "run.resume is ...; accepted: auto, never, or a checkpoint folder"),
    Case("a folder to resume that is damaged", checkpoint(flipped(STATE), resume="step_1"), "is damaged: ..."),
]  # fmt: skip
