"""From a configuration to a finished run: build, train, write the results."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from irtune import console
from irtune.config import Config
from irtune.config.batch_size import with_accumulation
from irtune.distributed import logs, runtime
from irtune.distributed import node_checks as nodes
from irtune.distributed.runtime import World
from irtune.engine import Engine
from irtune.engine.contrastive import Contrast
from irtune.engine.losses import build_loss
from irtune.errors import IrtuneError, StoppedError
from irtune.files import fingerprint, write_json, writing
from irtune.memory import compare, describe
from irtune.models.kernels import add_fused_kernels, compile_layers
from irtune.redaction import redact
from irtune.tracking.tracker import Tracker
from irtune.tracking.writers import check_installed
from irtune.train.checkpoint import find_damage
from irtune.train.failures import as_user_error, stop_within, tell_the_others
from irtune.train.layer_selection import LayerSelection
from irtune.train.progress import Progress
from irtune.train.results import announce, collect_results
from irtune.train.setup import RunSetup, engine_settings, prepare, pretrained_weights
from irtune.train.trainer import Trainer

log = logging.getLogger("irtune")
SECONDS_TO_LEAVE = 20.0


def run(config: Config) -> dict[str, Any] | None:
    """Train, evaluate and write the run folder. All ranks call it; rank 0 gets the content of results.json.

    A run that is finished already is not touched: its results are returned.

    Raises:
        IrtuneError: for everything a user can fix. The process group is left in any case.
        StoppedError: after SIGTERM or SIGINT, when the last step is saved.
    """
    world = runtime.read_world()
    console.let_speak(sys.stdout, is_main=world.is_main)
    console.quiet_libraries()
    console.quiet_transformers()
    check_installed(config.run.trackers)
    settings = engine_settings(config, world)
    runtime.start(world, config.run.timeout_seconds)
    failure: BaseException | None = None
    try:
        nodes.check(config, settings, world)
        runtime.doing("reading model and corpus")
        runtime.seed_everything(config.run.seed, deterministic=config.run.deterministic)
        folder = Path(config.run.output_dir).expanduser()
        setup = prepare(config, settings, world, folder)
        if setup.finished:
            log.info("%s is finished; these are its results", folder)
            return json.loads((folder / "results.json").read_text(encoding="utf-8")) if world.is_main else None
        with writing(folder):
            logs.open_log(folder / "logs", world.rank, str(world.device), clean=redact)
            results = _train(setup, world, folder)
    except IrtuneError as error:
        failure = error
        tell_the_others(error)
        raise
    except Exception as error:
        told = as_user_error(error, with_accumulation(config, world.size), settings["zero_optimization"]["stage"])
        failure = told or error
        tell_the_others(failure)
        if told is None:
            raise
        raise told from error
    finally:
        logs.close_log(failure or sys.exc_info()[1], failed=not isinstance(failure, StoppedError))
        stop_within(SECONDS_TO_LEAVE, failure)
    return results if world.is_main else None


def _train(setup: RunSetup, world: World, folder: Path) -> dict[str, Any]:
    trainer = build(setup, world, folder)
    if world.is_main:
        (folder / "results.json").unlink(missing_ok=True)  # of a finished run that now goes on
    try:
        trainer.run()
        results = collect_results(trainer, trainer.finish(folder), world)
        if setup.memory is not None:
            results["planned_memory_bytes"] = setup.memory.estimate.total
            trainer.tracker.say(compare(setup.memory, results["peak_memory_bytes"]))
        trainer.tracker.outcome(setup.config, results)
    finally:
        trainer.tracker.close()
    if world.is_main:
        # irtune.evaluation.saved_run compares them: a flipped bit in an adapter would go unnoticed otherwise.
        written = sorted((folder / "adapter").glob("adapter_*"))
        results["adapter_sha256"] = {file.name: fingerprint(file)["sha256"] for file in written}
        write_json(folder / "results.json", results)
    runtime.barrier()
    trainer.engine.close()
    return results


def build(setup: RunSetup, world: World, folder: Path) -> Trainer:
    """The engine and the trainer, at the step that the run has reached."""
    config, data, resumed = setup.config, setup.data, setup.resumed
    engine = _build_engine(setup)
    runtime.limit_waiting(config.run.timeout_seconds)
    progress = Progress()
    if resumed is not None:  # checkpoints of older versions do not tell training's time apart
        saved = resumed.state["progress"]
        progress = Progress(**{"training_seconds": saved["seconds"]} | saved)
    if resumed is not None and find_damage(setup.checkpoints.folder / f"step_{progress.best_step}") is not None:
        progress.best = None  # the best weights so far are not in this folder: look for new ones
    tracker = Tracker(
        folder,
        active=world.is_main,
        start_step=progress.step,
        max_steps=data.max_steps,
        score=config.tuning.score,
        task=data.corpus.task,
        trackers=config.run.trackers,
        metric=config.run.best_metric,
    )
    layers = LayerSelection(
        config.tuning, setup.method, engine=engine, progress=progress, tracker=tracker, max_steps=data.max_steps
    )
    trainer = Trainer(
        config,
        engine=engine,
        data=data,
        layers=layers,
        checkpoints=setup.checkpoints,
        tracker=tracker,
        progress=progress,
        pretrained=lambda: pretrained_weights(setup),
    )
    if resumed is not None:
        trainer.restore(resumed)
        tracker.say(f"resumed from {resumed.folder} at step {progress.step}")
    announce(trainer, world)
    if setup.memory is not None:
        tracker.text("plan", describe(setup.memory))
    return trainer


def _build_engine(setup: RunSetup) -> Engine:
    config, model = setup.config, setup.model
    loss = build_loss(config.optim, setup.data.label_counts(), setup.data.device, setup.data.corpus.labels)
    contrast = Contrast(model.module, model.table, config.optim.contrastive) if config.optim.contrastive else None
    if config.model.fused_kernels:
        add_fused_kernels(model.module)
    if config.model.compile:
        compile_layers(model.table.modules)
    return Engine(
        model.module,
        model.table,
        config.optim,
        setup.settings,
        traits=model.traits,
        park=config.tuning.deselected_state == "offload",
        loss=loss,
        contrast=contrast,
        recompute=config.model.gradient_checkpointing,
    )
