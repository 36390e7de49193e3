"""What a run says at its start, and what results.json holds at its end."""

from typing import Any

import torch

from irtune import __version__
from irtune.adapters.table import Named
from irtune.data import corpus_digest
from irtune.distributed import runtime
from irtune.distributed.runtime import World
from irtune.memory.measure import peak_host_memory_bytes, peak_memory_bytes
from irtune.train.checkpoint import versions
from irtune.train.trainer import Trainer


def announce(trainer: Trainer, world: World) -> None:
    """Say what is about to happen, with the batch arithmetic."""
    config, table, data = trainer.config, trainer.engine.table, trainer.data
    optim = config.optim
    layer = _size(table.layers[0])
    size = f"{optim.micro_batch_tokens} tokens" if optim.micro_batch_tokens else f"{optim.micro_batch_size} examples"
    sizes = ", ".join(f"{split} {len(examples)}" for split, examples in data.corpus.splits.items())
    trainer.tracker.say(
        f"irtune {__version__}: {config.tuning.method} on {config.model.name_or_path} ({table.num_layers} layers, "
        f"{layer:,} adapter parameters each), {world.size} rank(s) on {world.device.type}, "
        f"ZeRO {trainer.engine.stage}\n"
        f"corpus: {sizes} examples, {len(data.corpus.labels)} labels ({', '.join(data.corpus.labels)})\n"
        f"batch: {size} x {optim.gradient_accumulation_steps} accumulation x {world.size} ranks = "
        f"{data.sampler.examples_per_step:,} examples per step, "
        f"{data.max_steps} steps ({data.sampler.steps_per_epoch} per epoch)"
        + (", without padding, in random batches" if data.packed else "")
    )


def _size(named: Named) -> int:
    """Elements of parameters, of partitioned ones too."""
    return sum(int(getattr(parameter, "ds_numel", parameter.numel())) for _, parameter in named)


def _trained_parameters(trainer: Trainer) -> float:
    """Parameters that an optimizer step trains, head included; the mean over the steps where layers change."""
    progress, table = trainer.progress, trainer.engine.table
    layers = sum(count * _size(layer) for count, layer in zip(progress.trained_steps, table.layers))
    return _size(table.head) + layers / max(1, progress.step)


def collect_results(trainer: Trainer, metrics: dict[str, Any], world: World) -> dict[str, Any]:
    """The content of results.json. Collective."""
    progress, engine, sampler = trainer.progress, trainer.engine, trainer.data.sampler
    mine = torch.tensor([peak_memory_bytes(world.device), peak_host_memory_bytes()], dtype=torch.float64)
    peaks = torch.stack(runtime.all_gather(mine.to(world.device))).amax(0).tolist()
    bytes_seen = progress.state_bytes
    return metrics | {
        "method": trainer.config.tuning.method,
        "steps": progress.step,
        "best_step": progress.best_step,
        "averaged_steps": trainer.averaged,
        "wall_seconds": progress.seconds,
        "training_seconds": progress.training_seconds,
        "examples_per_second": sampler.examples(progress.step) / max(progress.training_seconds, 1e-9),
        "examples_per_step": sampler.examples_per_step,
        "corpus_sha256": corpus_digest(trainer.data.corpus),
        "world_size": world.size,
        "zero_stage": engine.stage,
        "num_layers": engine.table.num_layers,
        "skipped_steps": progress.skipped,
        "layers_trained_per_step": sum(progress.trained_steps) / max(1, progress.step),
        "layers_ever_trained": sum(count > 0 for count in progress.trained_steps),
        "steps_per_layer": progress.trained_steps,
        "trained_parameters_per_step": _trained_parameters(trainer),
        "peak_memory_bytes": int(peaks[0]),
        "peak_host_memory_bytes": int(peaks[1]),
        "optimizer_state_bytes": engine.optimizer_state_bytes(),
        "optimizer_state_bytes_at_selections": {
            "min": min(bytes_seen),
            "mean": sum(bytes_seen) / len(bytes_seen),
            "max": max(bytes_seen),
        },
        "parked_state_bytes": engine.parked_peak(),
        "versions": versions(),
    }  # fmt: skip
