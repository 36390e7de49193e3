"""From a configuration to a finished run: build, train, write the results."""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from irtune import __version__, logs, nodes, runtime
from irtune.checkpoint import find_damage, fingerprint, versions, writing
from irtune.config import Config
from irtune.config.batch import for_ranks
from irtune.config.safety import redact
from irtune.engine import Engine
from irtune.errors import IrtuneError, StoppedError
from irtune.faults import as_user_error, stop_within, tell_the_others
from irtune.kernels import add_fused_kernels, compile_layers
from irtune.losses import build_loss
from irtune.memory import peak_host_memory_bytes, peak_memory_bytes
from irtune.planner import compare, describe
from irtune.prepare import Plans, engine_settings, prepare, pretrained_weights
from irtune.progress import Progress
from irtune.runtime import World
from irtune.tracking import Tracker, write_json
from irtune.trainer import Trainer

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
        told = as_user_error(error, for_ranks(config, world.size), settings["zero_optimization"]["stage"])
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
        results = _results(trainer, trainer.finish(folder), world)
        if plans.memory is not None:
            results["planned_memory_bytes"] = plans.memory.estimate.total
            trainer.tracker.say(compare(plans.memory, results["peak_memory_bytes"]))
        trainer.tracker.outcome(plans.config, results)
    finally:
        trainer.tracker.close()
    if world.is_main:
        # irtune.inference compares them: a flipped bit in an adapter would go unnoticed otherwise.
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
    _announce(trainer, world)
    if plans.memory is not None:
        trainer.tracker.text("plan", describe(plans.memory))
    return trainer


def _announce(trainer: Trainer, world: World) -> None:
    """Say what is about to happen, with the batch arithmetic."""
    config, table = trainer.config, trainer.engine.table
    optim = config.optim
    layer = sum(int(getattr(p, "ds_numel", p.numel())) for _, p in table.layers[0])
    size = f"{optim.micro_batch_tokens} tokens" if optim.micro_batch_tokens else f"{optim.micro_batch_size} examples"
    sizes = ", ".join(f"{split} {len(examples)}" for split, examples in trainer.corpus.splits.items())
    trainer.tracker.say(
        f"irtune {__version__}: {config.tuning.method} on {config.model.name_or_path} ({table.num_layers} layers, "
        f"{layer:,} adapter parameters each), {world.size} rank(s) on {world.device.type}, "
        f"ZeRO {trainer.engine.stage}\n"
        f"corpus: {sizes} examples, {len(trainer.corpus.labels)} labels ({', '.join(trainer.corpus.labels)})\n"
        f"batch: {size} x {optim.gradient_accumulation_steps} accumulation x {world.size} ranks = "
        f"{trainer.plan.examples_per_step:,} examples per step, "
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
        "examples_per_second": trainer.plan.examples(progress.step) / max(progress.seconds, 1e-9),
        "examples_per_step": trainer.plan.examples_per_step,
        "world_size": world.size,
        "zero_stage": engine.stage,
        "num_layers": trainer.num_layers,
        "skipped_steps": progress.skipped,
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
        "versions": versions(),
    }  # fmt: skip
