"""The plan of one run, in words: before it starts, and against what was measured when it ends."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from irtune.config import Config
from irtune.errors import IrtuneError
from irtune.memory.count import Parts, count
from irtune.memory.estimate import Estimate, estimate
from irtune.memory.measure import host_memory_bytes

log = logging.getLogger(__name__)
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """What one run will need: `parts` as counted, `estimate` per rank.

    longest: data.max_length where micro-batches are filled by tokens, else 0.
    """

    parts: Parts
    estimate: Estimate
    longest: int = 0


def estimate_memory(
    config: Config,
    settings: dict[str, Any],
    world_size: int,
    device_memory: int | None = None,
    *,
    device: str = "cuda",
    labels: Sequence[str] = (),
) -> MemoryEstimate | None:
    """Count what a run will need on each rank, before its model is loaded. Never fails a run.

    Args:
        config: of the run.
        settings: the completed DeepSpeed JSON.
        world_size: number of ranks.
        device_memory: bytes of this rank's device; None where it is not known.
        device: cuda or cpu. On a CPU the process's memory so far is counted in: call this before the model is loaded.
        labels: of the corpus.

    Returns:
        None, and a logged line with the reason, for a model whose forward pass cannot be made without its weights.
    """
    zero = settings.get("zero_optimization", {})

    def planned(slope: bool) -> MemoryEstimate:
        parts = count(config, device=device, labels=labels, slope=slope)
        return MemoryEstimate(
            parts,
            estimate(
                parts,
                config,
                stage=int(zero.get("stage", 0)),
                quantization=config.model.quantization,
                world=world_size,
                memory=device_memory,
                zero=zero,
                process=host_memory_bytes() if device == "cpu" else 0,  # with what counting took
            ),
            config.data.max_length if config.optim.micro_batch_tokens else 0,
        )

    try:
        plan = planned(slope=False)
        # What a larger micro-batch would need costs as much time again, and matters only where memory is short.
        return planned(slope=True) if plan.estimate.fits is False else plan
    except IrtuneError as error:
        log.warning("no memory plan: %s", error)
    return None


def describe(plan: MemoryEstimate) -> str:
    """The plan as a table with units, some 12 lines, for a console or a fenced block of TensorBoard's text tab."""
    parts, row = plan.parts, plan.estimate
    on_cpu = parts.device == "cpu"
    lowest = f", layer {min(parts.selected)} the lowest" if parts.selected else ""
    rows = [
        ("process before the model", row.process, "Python and its libraries") if on_cpu else None,
        ("base weights", row.base, f"{parts.constant:,} constant weights, quantization {row.quantization}"),
        ("adapters and head", row.adapters, f"of all {len(parts.layers)} layers"),
        ("gradients", row.gradients, f"of {len(parts.selected)} layers at most"),
        ("optimizer state", row.optimizer, f"{row.optimizer_full / MIB:,.1f} MiB if all layers trained"),
        ("buffers", row.buffers, "buckets, gathered and dequantised weights, workspaces"),
        ("activations", row.activations, f"{parts.rows} examples{lowest}"),
        ("parked state", row.parked, "of deselected layers" + ("" if on_cpu else ", in host memory")),
        (
            "total",
            row.total,
            "resident" if on_cpu else f"on the device, and {row.host / GIB:.2f} GiB of host memory",
        ),
    ]
    lines = [f"  {name:<25}{value / MIB:>12,.1f} MiB  {what}" for name, value, what in filter(None, rows)]
    title = f"memory planned per rank under ZeRO {row.stage}, at its peak:"
    return "\n".join([title, *lines, *(f"  assumed: {sentence}" for sentence in parts.assumed)])


def shortage(plan: MemoryEstimate) -> str | None:
    """A warning for a plan that does not fit into the device; None where it fits or nobody knows."""
    row = plan.estimate
    if row.fits is not False or row.memory is None:
        return None
    advice = []
    if row.largest_micro_batch:
        rows = row.largest_micro_batch
        smaller = f"tokens {rows * plan.longest}" if plan.longest else f"size {rows}"
        advice.append(f"optim.micro_batch_{smaller} with more optim.gradient_accumulation_steps fits")
    advice.append("model.gradient_checkpointing true, model.quantization nf4 and a smaller data.max_length need less")
    return (
        f"this run is planned to need {row.total / GIB:.2f} GiB of a device with {row.memory / GIB:.2f} GiB, so it may "
        f"run out of memory; {'; '.join(advice)} (python -m irtune plan shows more)"
    )


def compare(plan: MemoryEstimate, measured: int) -> str:
    """One line about the measured peak, `memory.peak_memory_bytes`: planned 1.23 GiB, measured 1.10 GiB (-11%)."""
    total = plan.estimate.total
    kept = ", with freed memory that the C library keeps" if plan.parts.device == "cpu" else ""
    return (
        f"memory per rank: planned {total / GIB:.2f} GiB, measured {measured / GIB:.2f} GiB "
        f"({(measured - total) / total:+.0%}){kept}"
    )
