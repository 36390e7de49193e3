"""Where a side's time goes: the cost of a selection, waits for the device, operations with most time of their own."""

import statistics
import time
from typing import Any

import torch

from benchmarks.speed.sides import Irtune
from benchmarks.speed.turns import Turn
from irtune.distributed import runtime
from irtune.distributed.runtime import World

PAIRS, PROFILED_STEPS, TOP = 6, 4, 12


def selection_cost(side: Irtune, turns: list[Turn], world: World) -> dict[str, Any]:
    """Extra seconds of a step that scores all layers, of the selection itself, and their share of all time.

    A middling batch is trained on with and without scoring, in turn; weights stay, since the learning rate is 0.
    """
    trainer, layers, sampler = side.trainer, side.trainer.layers, side.setup.data.sampler
    steps = range(trainer.progress.step + 1, trainer.progress.step + 10_000)
    due = next((step for step in steps if layers.is_due(step)), None)
    made = sampler.taken or sampler.whole_epoch  # with --one-at-a-time the side may be a new one that has made no steps
    batches = sorted((batches[world.rank] for batches in made), key=lambda b: max(sampler.lengths[i] for i in b))
    batch = side.setup.data.batch(batches[len(batches) // 2])
    took: dict[bool, list[float]] = {False: [], True: []}
    for number in range(2 + 2 * PAIRS if due else 0):
        scored = number % 2 == 1
        runtime.barrier()
        started = time.perf_counter()
        with layers.scoring(batch, due if scored else 0):
            trainer.engine.forward_backward(batch)
        trainer.engine.step(0.0)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        runtime.barrier()
        took[scored].append(time.perf_counter() - started)
    layers.scores.reset()
    plain, scoring = (statistics.median(took[scored][1:] or [0.0]) for scored in (False, True))
    selecting = statistics.median([record["seconds"] for record in side.selections[1:]] or [0.0])
    interval = side.setup.config.tuning.interval
    step_seconds = statistics.median(sum(turn.seconds) / len(turn.seconds) for turn in turns)
    return {
        "interval": interval,
        "selections": len(side.selections),
        "selected": [record["selected"] for record in side.selections],
        "seconds_per_selection": selecting,
        "seconds_plain_step": plain,
        "seconds_scoring_step": scoring,
        "share_of_step_time": (scoring - plain + selecting) / (interval * step_seconds),
    }


def host_waits(side: Irtune) -> str:
    """ "none" when no step between log lines and selections makes the host wait for the GPU, else torch's words.

    torch.cuda.set_sync_debug_mode raises at the first such wait; the side cannot go on after that.
    """
    trainer, clock = side.trainer, side.clock
    tick, trainer.config.run.log_every = clock.tick, 1_000_000
    trainer.layers.is_due = lambda step: False  # type: ignore[method-assign]  # the side does not go on after this

    def checked() -> None:
        torch.cuda.set_sync_debug_mode("default")
        tick()
        torch.cuda.set_sync_debug_mode("error" if 1 <= clock.count < 4 else "default")

    clock.tick = checked  # type: ignore[method-assign]
    try:
        side.turn(1, 4)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def profile_of(side: Any, world: World) -> list[dict[str, Any]]:
    """The operations with most time of their own in a short turn, in milliseconds per step."""
    with torch.profiler.profile() as profiler:
        side.turn(0, PROFILED_STEPS)
    own = "self_device_time_total" if world.device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, own))
    total = sum(getattr(event, own) for event in events)
    return [
        {
            "operation": event.key,
            "milliseconds_per_step": getattr(event, own) / 1e3 / PROFILED_STEPS,
            "share": getattr(event, own) / max(total, 1e-9),
            "calls_per_step": event.count / PROFILED_STEPS,
        }
        for event in events[:TOP]
    ]
