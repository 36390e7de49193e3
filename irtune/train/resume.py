"""What a run resumes from, and whether it may."""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irtune.adapters import LayerTable
from irtune.config import Config
from irtune.data import BatchSampler, Corpus
from irtune.distributed import runtime
from irtune.errors import CheckpointError, ConfigError
from irtune.train.checkpoint import TRAINABLE, Checkpoints, find_damage, load_into, read_state, read_tensors, versions

log = logging.getLogger("irtune")
DERIVED = ("gradient_accumulation_steps", "global_batch_size")  # of optim: their product with the ranks decides


# What may differ where a finished run is asked for more.
LENGTH = ("optim.max_steps", "optim.epochs")
# Of model, what a resumed run may change.
HARMLESS = (
    "gradient_checkpointing",
    "attn_implementation",
    "compile",
    "fused_kernels",
    "trust_remote_code",
    "allow_pickle",
    "start_from",
    "head_init",
)


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint that a run goes on from: its folder, and the JSON part of it."""

    folder: Path
    state: dict[str, Any]

    def ends(self, max_steps: int) -> bool:
        """Whether training was over there."""
        progress = self.state["progress"]
        return progress["step"] >= max_steps or progress.get("stopped", False)


def resume_from(folder: Path, identity: dict[str, Any], table: LayerTable, *, pretrained: bool) -> ResumePoint:
    """Read a checkpoint of a run like this one, and put its adapters and head into the model.

    Args:
        folder: of the checkpoint.
        identity: of this run.
        table: the model's parameters, under no engine yet. Collective where they are partitioned.
        pretrained: the layers' parameters are the model's own: those that never trained are not in a checkpoint.

    Raises:
        CheckpointError: when the checkpoint cannot be read, or is that of another run.
    """
    state = read_state(folder)
    goes_on = _lengthened(state, identity)
    check_same_run(state["run"], identity, folder, ignored=LENGTH if goes_on else ())
    if goes_on:
        progress, steps = state["progress"], identity["optim"]["max_steps"]
        log.info(
            "the run that ended at step %d goes on to step %d; from here its learning rate follows the schedule of "
            "%d steps",
            progress["step"], steps, steps,
        )  # fmt: skip
        progress.update(stopped=False, worse_in_a_row=0)
    note_versions(state.get("versions"), folder)
    untrained = {name for layer in table.layers for name, _ in layer} if pretrained else set()
    load_into([*table.all(), *table.decided()], read_tensors(folder, TRAINABLE), folder, untrained)
    return ResumePoint(folder, state)


def _lengthened(state: dict[str, Any], identity: dict[str, Any]) -> bool:
    """Whether the run was over there, and is now asked for more steps."""
    progress, optim, wanted = state["progress"], state["run"].get("optim"), identity["optim"]["max_steps"]
    before = optim.get("max_steps") if isinstance(optim, dict) else None
    step = progress.get("step")
    if not isinstance(before, int) or not isinstance(step, int):  # that of another run, which is refused
        return False
    return (step >= before or bool(progress.get("stopped"))) and wanted > max(before, step)


def run_identity(
    config: Config, corpus: Corpus, sampler: BatchSampler, max_steps: int, synonyms: str = ""
) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued: not where the corpus lies, but what it holds."""
    optim = {key: value for key, value in vars(config.optim).items() if key not in DERIVED}
    places = ("path", "config", "train", "dev", "test", "synonyms", "pseudo", "padding_free")
    return {
        "model": {key: value for key, value in vars(config.model).items() if key not in HARMLESS},
        "adapter": vars(config.adapter),
        "tuning": vars(config.tuning),
        "optim": optim | {"micro_batches_per_step": sampler.micro_batches, "max_steps": max_steps},
        "data": {key: value for key, value in vars(config.data).items() if key not in places},
        "labels": corpus.labels,
        "examples": {split: len(examples) for split, examples in corpus.splits.items()},
        "training_lengths": runtime.derived_seed(*sampler.lengths),
        "seed": config.run.seed,
        "synonyms": synonyms or None,
        "padding_free": sampler.packed or None,  # what the run does, whatever it was asked for
    }


def began_without_padding(folder: Path | None) -> bool | None:
    """Whether the run of a checkpoint did without padding, as older ones never did; None without a checkpoint."""
    return None if folder is None else bool(read_state(folder)["run"].get("padding_free"))


def find_checkpoint(config: Config, checkpoints: Checkpoints) -> Path | None:
    """The checkpoint to go on from, as `run.resume` says."""
    if config.run.resume == "auto":
        return checkpoints.newest_whole()
    if config.run.resume == "never":
        if checkpoints.pointer("latest") is not None:
            raise ConfigError(
                f"run.output_dir {config.run.output_dir!r} holds a run already and run.resume is never; choose another "
                "folder, or set run.resume to auto"
            )
        return None
    path = Path(config.run.resume).expanduser()
    if not path.is_dir():
        raise ConfigError(f"run.resume is {config.run.resume!r}; accepted: auto, never, or a checkpoint folder")
    damage = find_damage(path)
    if damage is not None:
        raise CheckpointError(f"run.resume: {path} is damaged: {damage}")
    return path


def check_same_run(saved: dict[str, Any], now: dict[str, Any], folder: Path, *, ignored: Collection[str] = ()) -> None:
    """Refuse to continue with another model, data, method or optimizer; names every difference.

    A key that did not exist when the checkpoint was written had the value that is now its default. Those `ignored` may
    differ.
    """
    changes, usual = [], Config()
    free = {*ignored, *(f"model.{name}" for name in HARMLESS)}  # of older checkpoints, which name some of them
    for section, value in now.items():
        old = saved.get(section)
        if isinstance(value, dict) and isinstance(old, dict):
            names = sorted(set(value) | set(old))
            defaults = vars(getattr(usual, section, usual)) | old
            pairs = [(f"{section}.{name}", defaults.get(name), value.get(name)) for name in names]
        else:
            pairs = [(section, old, value)]
        changes += [f"{name} was {a!r} and is {b!r}" for name, a, b in pairs if a != b and name not in free]
    if changes:
        raise CheckpointError(f"{folder} cannot be continued: {'; '.join(changes)}")


def note_versions(saved: Any, folder: Path) -> None:
    """Other packages may compute other numbers; that is for the user to know, not for irtune to forbid."""
    saved, now = saved if isinstance(saved, dict) else {}, versions()
    changes = [f"{name} {saved[name]} -> {now[name]}" for name in now if saved.get(name, now[name]) != now[name]]
    if changes:
        log.info("%s was written with other versions: %s", folder, ", ".join(changes))
