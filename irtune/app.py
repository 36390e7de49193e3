"""From a configuration to a finished run: build every part, train, write the results."""

import logging
import platform
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from irtune import __version__, runtime
from irtune.adapters import add_adapters
from irtune.checkpoint import TRAINABLE, Checkpoints, load_into, read_state, read_tensors
from irtune.config import Config, write_config
from irtune.config.engine_json import read_engine_json
from irtune.data import BatchPlan, Encoder, read_corpus
from irtune.engine import Engine
from irtune.errors import CheckpointError, ConfigError
from irtune.importance import LayerScores
from irtune.memory import peak_host_memory_bytes, peak_memory_bytes
from irtune.models import load_classifier, output_projections
from irtune.runtime import World
from irtune.selection import build_chooser
from irtune.tracking import Tracker, write_json
from irtune.trainer import Progress, Trainer

log = logging.getLogger("irtune")
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "numpy", "safetensors", "tensorboard")


def run(config: Config) -> dict[str, Any] | None:
    """Train, evaluate and write the run folder. All ranks call it; rank 0 gets the content of results.json.

    Raises:
        IrtuneError: for everything a user can mend. The process group is left in any case.
    """
    world = runtime.read_world()
    _quiet(world)
    settings, problems = read_engine_json(config, world.size)
    problems += _check_device(config, world)
    if problems:
        raise ConfigError(problems)
    runtime.start(world, config.run.timeout_seconds)
    try:
        runtime.seed_everything(config.run.seed, deterministic=config.run.deterministic)
        trainer, folder = _build(config, settings, world)
        try:
            trainer.run()
            results = _results(trainer, trainer.finish(folder), world)
        finally:
            trainer.tracker.close()
        if world.is_main:
            write_json(folder / "results.json", results)
        runtime.barrier()
        trainer.engine.close()
    finally:
        runtime.stop()
    return results if world.is_main else None


def _quiet(world: World) -> None:
    """One voice: rank 0 reports, libraries only warn."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    log.setLevel(logging.INFO if world.is_main else logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries' notes to each other, not to our users
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _check_device(config: Config, world: World) -> list[str]:
    if world.device.type == "cuda":
        return []
    problems = []
    if config.model.dtype == "float16":
        problems.append("model.dtype float16 needs a GPU; on a CPU use bfloat16 or float32")
    if config.model.attn_implementation == "flash_attention_2":
        problems.append("model.attn_implementation flash_attention_2 needs a GPU; on a CPU use sdpa")
    return problems


def _build(config: Config, settings: dict[str, Any], world: World) -> tuple[Trainer, Path]:
    """Everything that can fail by the user's doing comes before the first byte is written."""
    folder = Path(config.run.output_dir).expanduser()
    micro_batches = world.size * config.optim.gradient_accumulation_steps
    with runtime.shared_errors():
        checkpoints = Checkpoints(folder / "checkpoints", config.run.keep_last)
        resumed = _find_checkpoint(config, checkpoints)
        corpus = read_corpus(config.data)
        classifier = load_classifier(config.model, corpus.labels)
        encoder = Encoder(classifier.tokenizer, config.data, corpus.labels)
        encoded = {split: [encoder.encode(e) for e in examples] for split, examples in corpus.splits.items()}
        lengths = [len(item["input_ids"]) for item in encoded["train"]]
        plan = BatchPlan(lengths, config.optim.micro_batch_size, micro_batches, config.run.seed)
        max_steps = config.optim.max_steps or max(1, round(config.optim.epochs * plan.steps_per_epoch))
        score = config.tuning.score
        projections = output_projections(classifier.model, classifier.anatomy) if score == "weight" else None
        model, table = add_adapters(classifier, config.adapter)
        _checkpointing(config, model, settings)
        scores = LayerScores(table, score, world.device, projections)
        chooser = build_chooser(config.tuning, table.num_layers, config.run.seed)
        state = None
        if resumed is not None:
            state = read_state(resumed)
            load_into(table.all(), read_tensors(resumed, TRAINABLE), resumed)
        if world.is_main:
            _open_folder(folder, config)
    engine = Engine(model, table, config.optim, settings, park=config.tuning.deselected_state == "offload")
    progress = Progress(**state["progress"]) if state is not None else Progress()
    trainer = Trainer(
        config,
        engine=engine,
        chooser=chooser,
        scores=scores,
        plan=plan,
        corpus=corpus,
        encoded=encoded,
        pad_token_id=classifier.tokenizer.pad_token_id,
        max_steps=max_steps,
        checkpoints=checkpoints,
        tracker=Tracker(folder, active=world.is_main, start_step=progress.step, max_steps=max_steps),
        device=world.device,
        progress=progress,
    )
    if state is not None and resumed is not None:
        with runtime.shared_errors():
            _check_same_run(state["run"], trainer.identity(), resumed)
        trainer.restore(resumed, state)
        trainer.tracker.say(f"resumed from {resumed} at step {progress.step}")
    _announce(trainer, settings, world)
    return trainer, folder


def _find_checkpoint(config: Config, checkpoints: Checkpoints) -> Path | None:
    """The checkpoint to go on from, as `run.resume` says."""
    latest = checkpoints.pointer("latest")
    if config.run.resume == "auto":
        return latest
    if config.run.resume == "never":
        if latest is not None:
            raise ConfigError(
                f"run.output_dir {config.run.output_dir!r} holds a run already and run.resume is never; choose another "
                "folder, or set run.resume to auto"
            )
        return None
    path = Path(config.run.resume).expanduser()
    if not path.is_dir():
        raise ConfigError(f"run.resume is {config.run.resume!r}; accepted: auto, never, or a checkpoint folder")
    return path


def _check_same_run(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with another model, data, method or optimizer; names every difference."""
    changes = []
    for section, value in now.items():
        old = saved.get(section)
        if isinstance(value, dict) and isinstance(old, dict):
            names = sorted(set(value) | set(old))
            pairs = [(f"{section}.{name}", old.get(name), value.get(name)) for name in names]
        else:
            pairs = [(section, old, value)]
        changes += [f"{name} was {a!r} and is {b!r}" for name, a, b in pairs if a != b]
    if changes:
        raise CheckpointError(f"{folder} cannot be continued: {'; '.join(changes)}")


def _open_folder(folder: Path, config: Config) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_config(config, folder / "config.yaml")
    except OSError as error:
        raise ConfigError(f"run.output_dir: cannot write to {str(folder)!r}: {error.strerror}") from error


def _checkpointing(config: Config, model: Any, settings: dict[str, Any]) -> None:
    """Recompute activations: reentrant under ZeRO 3 only, where the other kind sees partitioned parameters."""
    if not config.model.gradient_checkpointing:
        return
    reentrant = settings["zero_optimization"]["stage"] == 3
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()  # else no gradient reaches the adapters


def _announce(trainer: Trainer, settings: dict[str, Any], world: World) -> None:
    """Say what is about to happen, with the batch arithmetic."""
    config, table = trainer.config, trainer.engine.table
    optim = config.optim
    layer = sum(int(getattr(p, "ds_numel", p.numel())) for _, p in table.layers[0])
    sizes = ", ".join(f"{split} {len(examples)}" for split, examples in trainer.corpus.splits.items())
    trainer.tracker.say(
        f"irtune {__version__}: {config.tuning.method} on {config.model.name_or_path} ({table.num_layers} layers, "
        f"{layer:,} adapter parameters each), {world.size} rank(s) on {world.device.type}, "
        f"ZeRO {trainer.engine.stage}\n"
        f"corpus: {sizes} examples, {len(trainer.corpus.labels)} labels ({', '.join(trainer.corpus.labels)})\n"
        f"batch: {optim.micro_batch_size} examples x {optim.gradient_accumulation_steps} accumulation x {world.size} "
        f"ranks = {trainer.plan.micro_batch_size * trainer.plan.micro_batches} per step, "
        f"{trainer.max_steps} steps ({trainer.plan.steps_per_epoch} per epoch)"
    )


def _results(trainer: Trainer, metrics: dict[str, Any], world: World) -> dict[str, Any]:
    """The content of results.json. Collective."""
    progress, engine = trainer.progress, trainer.engine
    mine = torch.tensor([peak_memory_bytes(world.device), peak_host_memory_bytes()], dtype=torch.float64)
    peaks = torch.stack(runtime.all_gather(mine.to(world.device))).amax(0).tolist()
    bytes_seen = progress.state_bytes
    return metrics | {
        "method": trainer.config.tuning.method,
        "steps": progress.step,
        "best_step": progress.best_step,
        "wall_seconds": progress.seconds,
        "examples_per_second": progress.step * trainer.plan.micro_batch_size * trainer.plan.micro_batches
        / max(progress.seconds, 1e-9),
        "world_size": world.size,
        "zero_stage": engine.stage,
        "num_layers": trainer.num_layers,
        "layers_trained_per_step": sum(progress.trained_steps) / max(1, progress.step),
        "layers_ever_trained": sum(count > 0 for count in progress.trained_steps),
        "steps_per_layer": progress.trained_steps,
        "peak_memory_bytes": int(peaks[0]),
        "peak_host_memory_bytes": int(peaks[1]),
        "optimizer_state_bytes": engine.optimizer_state_bytes(),
        "optimizer_state_bytes_at_selections": {
            "min": min(bytes_seen),
            "mean": sum(bytes_seen) / len(bytes_seen),
            "max": max(bytes_seen),
        },
        "versions": {"irtune": __version__, "python": platform.python_version()}
        | {name: metadata.version(name) for name in PACKAGES},
    }  # fmt: skip
