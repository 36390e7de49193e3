"""From a configuration to a finished run: build, train, write the results."""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from irtune.config import Config
from irtune.config.batch_size import with_accumulation
from irtune.distributed import logs, runtime
from irtune.distributed import node_checks as nodes
from irtune.distributed.runtime import World
from irtune.engine import Engine
from irtune.engine.losses import build_loss
from irtune.errors import IrtuneError, StoppedError
from irtune.files import fingerprint, write_json, writing
from irtune.memory import compare, describe
from irtune.models.kernels import add_fused_kernels, compile_layers
from irtune.redaction import redact
from irtune.tracking.tracker import Tracker
from irtune.train.checkpoint import find_damage
from irtune.train.failures import as_user_error, stop_within, tell_the_others
from irtune.train.progress import Progress
from irtune.train.results import announce, collect_results
from irtune.train.setup import Plans, engine_settings, prepare, pretrained_weights
from irtune.train.trainer import Trainer

log = logging.getLogger("irtune")
SECONDS_TO_LEAVE = 20.0


def run(config: Config) -> dict[str, Any] | None:
    """Train, evaluate and write the run folder. All ranks call it; rank 0 gets the content of results.json.

    A run that is finished already is not touched: its results are returned.

    Raises:
        IrtuneError: for everything a user can mend. The process group is left in any case.
        StoppedError: after SIGTERM or SIGINT, when the last step is saved.
    """
    world = runtime.read_world()
    _quiet(world)
    settings = engine_settings(config, world)
    runtime.start(world, config.run.timeout_seconds)
    failure: BaseException | None = None
    try:
        nodes.check(config, settings, world)
        runtime.doing("reading model and corpus")
        runtime.seed_everything(config.run.seed, deterministic=config.run.deterministic)
        folder = Path(config.run.output_dir).expanduser()
        plans = prepare(config, settings, world, folder)
        if plans.finished:
            log.info("%s is finished; these are its results", folder)
            return json.loads((folder / "results.json").read_text(encoding="utf-8")) if world.is_main else None
        with writing(folder):
            logs.open_log(folder / "logs", world.rank, str(world.device), clean=redact)
            results = _train(plans, world, folder)
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


def _train(plans: Plans, world: World, folder: Path) -> dict[str, Any]:
    trainer = build(plans, world, folder)
    try:
        trainer.run()
        results = collect_results(trainer, trainer.finish(folder), world)
        if plans.memory is not None:
            results["planned_memory_bytes"] = plans.memory.estimate.total
            trainer.tracker.say(compare(plans.memory, results["peak_memory_bytes"]))
        trainer.tracker.outcome(plans.config, results)
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


def _quiet(world: World) -> None:
    """One voice: rank 0 reports, libraries only warn."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    log.setLevel(logging.INFO)  # for the logs of all ranks
    if not world.is_main:
        for console in logging.getLogger().handlers:
            console.addFilter(lambda record: not record.name.startswith("irtune") or record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries' notes to each other, not to our users
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def build(plans: Plans, world: World, folder: Path) -> Trainer:
    """The engine and the trainer, where the run stands."""
    config, state = plans.config, plans.state
    park = config.tuning.deselected_state == "offload"
    labels = [example.label for example in plans.corpus.splits["train"]]
    loss = build_loss(config.optim, [labels.count(c) for c in range(len(plans.corpus.labels))], world.device)
    if config.model.fused_kernels:
        add_fused_kernels(plans.model)
    if config.model.compile:
        compile_layers(plans.table.modules)
    engine = Engine(
        plans.model,
        plans.table,
        config.optim,
        plans.settings,
        park=park,
        loss=loss,
        recompute=config.model.gradient_checkpointing,
    )
    runtime.limit_waiting(config.run.timeout_seconds)
    progress = Progress(**state["progress"]) if state is not None else Progress()
    if state is not None and find_damage(plans.checkpoints.folder / f"step_{progress.best_step}") is not None:
        progress.best = None  # the best weights so far are not in this folder: look for new ones
    trainer = Trainer(
        config,
        engine=engine,
        chooser=plans.chooser,
        scores=plans.scores,
        plan=plans.plan,
        corpus=plans.corpus,
        encoded=plans.encoded,
        pad_token_id=plans.pad_token_id,
        max_steps=plans.max_steps,
        checkpoints=plans.checkpoints,
        tracker=Tracker(
            folder,
            active=world.is_main,
            start_step=progress.step,
            max_steps=plans.max_steps,
            score=plans.config.tuning.score,
        ),
        device=world.device,
        progress=progress,
        identity=plans.identity,
        pretrained=lambda: pretrained_weights(plans),
    )
    if state is not None and plans.resumed is not None:
        trainer.restore(plans.resumed, state)
        trainer.tracker.say(f"resumed from {plans.resumed} at step {progress.step}")
    announce(trainer, world)
    if plans.memory is not None:
        trainer.tracker.text("plan", describe(plans.memory))
    return trainer
