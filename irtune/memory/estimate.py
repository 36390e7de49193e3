"""Bytes per rank of a run under a ZeRO stage and a format of the base, from a model's counts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from irtune.config import Config
from irtune.engine.parking import FLOAT, pinned_bytes
from irtune.memory.count import Parts

RESERVE = 1.5 * 2**30  # bytes of a GPU that are never ours: CUDA context, communication, what the allocator cannot use
# Two workspaces of cuBLAS, one for the thread of the forward pass and one for that of the backward pass: 32 MiB each on
# Hopper, 8 MiB before it (torch, CUDABlas.cpp, getChosenWorkspaceSize).
WORKSPACES = 2 * 32 * 2**20
# nf4 with double quantisation, per tensor: 4 bits an element, an 8-bit scale per 64, an fp32 one per 256 of those, the
# offset of the scales, and the two tables of 16 and 256 fp32 numbers.
NF4_TABLES = 4 * (1 + 16 + 256)
# DeepSpeed's defaults where its file says nothing (zero/config.py), in elements.
BUCKET, LIVE, PREFETCHED = 500_000_000, 1_000_000_000, 50_000_000


@dataclass(frozen=True)
class Estimate:
    """Bytes per rank under one ZeRO stage and format of the base.

    process: of the process itself, before the model is loaded; 0 on a GPU, whose memory starts empty.
    base, adapters, gradients, optimizer: weights and their training state; optimizer_full if all layers trained.
    buffers: DeepSpeed's buckets, gathered or dequantised weights, workspaces.
    activations: of the largest step; or what evaluation, or fp32 gradients in the update, need more than that.
    parked: state of deselected layers in host memory; a GPU's with torch's rounding of pinned memory.
    host: host memory beside the process itself.
    sent_per_step: to other ranks. total: the peak of the device's memory, or on a CPU of the process's.
    memory: of the device; fits and largest_micro_batch are None where it is not known.
    """

    stage: int
    quantization: str
    process: int
    base: int
    adapters: int
    gradients: int
    optimizer: int
    optimizer_full: int
    buffers: int
    activations: int
    parked: int
    host: int
    sent_per_step: int
    total: int
    memory: int | None
    fits: bool | None
    largest_micro_batch: int | None


def state_bytes(groups: Sequence[Sequence[int]], stage: int, world: int, trained_bytes: int) -> int:
    """Bytes of optimizer state per rank for parameter groups given by the elements of their parameters. Exact.

    8 bytes of moments for each element; 4 more for the fp32 copy that ZeRO 1 and 2 always keep, and the other stages
    where parameters have a lower precision. Shards are padded as DeepSpeed does it: a group to 2 elements per rank
    under ZeRO 1 and 2, each parameter to equal shares under ZeRO 3.
    """
    each = 12 if trained_bytes < 4 or stage in (1, 2) else 8
    if stage == 0:
        elements = sum(map(sum, groups))
    elif stage == 3:
        elements = sum(-(-numel // world) for group in groups for numel in group)
    else:
        elements = sum(-(-sum(group) // (2 * world)) * 2 for group in groups)
    return each * elements


def base_bytes(parts: Parts, quantization: str, shards: int = 1) -> int:
    """Bytes of the constant weights on one of `shards` ranks. What quantisation keeps beside the codes is on all."""
    rest = parts.rest * parts.weight_bytes
    if quantization == "none":
        return (sum(parts.linear) * parts.weight_bytes + rest) // shards
    if quantization == "int8":  # and an fp32 scale per output
        return (sum(parts.linear) + rest) // shards + 4 * parts.outputs
    scales = sum(math.ceil(n / 64) + 4 * math.ceil(math.ceil(n / 64) / 256) + NF4_TABLES for n in parts.linear)
    return (sum(n // 2 for n in parts.linear) + rest) // shards + scales


def estimate(
    parts: Parts,
    config: Config,
    *,
    stage: int,
    quantization: str,
    world: int,
    memory: float | None = None,
    zero: Mapping[str, Any] | None = None,
    process: int = 0,
) -> Estimate:
    """Bytes per rank of a run on `world` ranks.

    Args:
        parts: the model's counts.
        config: of the run.
        stage, quantization: of ZeRO and of the base.
        world: number of ranks.
        memory: bytes of one device.
        zero: the section zero_optimization of the DeepSpeed file: sizes of buckets, offload.
        process: bytes of the process before the model is loaded, for a run on a CPU.
    """
    groups = [parts.layers[layer] for layer in parts.selected if parts.layers[layer]] + [parts.head]
    every = [layer for layer in parts.layers if layer] + [parts.head]
    job = _Job(parts, config, stage, quantization, world, zero or {}, sum(map(sum, groups)), sum(map(sum, every)))
    on_cpu = parts.device == "cpu"
    share = world if stage == 3 else 1
    loaded = share if quantization == "none" else 1  # a quantised base is divided when it has been read whole
    base, adapters = base_bytes(parts, quantization, share), job.adapted * parts.trained_bytes // share
    gradients = job.trained * parts.trained_bytes // (world if stage >= 2 else 1)
    optimizer = state_bytes(groups, stage, world, parts.trained_bytes)
    full = state_bytes(every, stage, world, parts.trained_bytes)
    buffers = job.buckets() + job.gathered()
    parked = 0
    if config.tuning.deselected_state == "offload":
        left = [layer for number, layer in enumerate(parts.layers) if layer and number not in parts.selected]
        states = [state_bytes([layer], stage, world, parts.trained_bytes) for layer in left]
        parked = sum(states if on_cpu else [pinned_bytes(size // FLOAT) for size in states])
    moved = 0 if on_cpu else job.moved(optimizer + gradients, base + adapters)
    activations = job.activations(gradients)
    total = process + base + adapters + gradients + optimizer + buffers + activations + (parked if on_cpu else -moved)
    room = None if memory is None else memory - (0 if on_cpu else RESERVE) - total
    largest = None
    if room is not None and parts.per_row:
        largest = max(0, math.floor(parts.rows + room / parts.per_row))
    return Estimate(
        stage=stage,
        quantization=quantization,
        process=process,
        base=base,
        adapters=adapters,
        gradients=gradients,
        optimizer=optimizer,
        optimizer_full=full,
        buffers=buffers,
        activations=activations,
        parked=parked,
        host=total - process if on_cpu else parked + moved + base_bytes(parts, quantization, loaded),
        sent_per_step=job.sent(),
        total=total,
        memory=None if memory is None else int(memory),
        fits=None if room is None else room >= 0,
        largest_micro_batch=largest,
    )


@dataclass(frozen=True)
class _Job:
    """What the parts of an estimate depend on, as `estimate` takes it."""

    parts: Parts
    config: Config
    stage: int
    quantization: str
    world: int
    zero: Mapping[str, Any]
    trained: int  # elements that train at a time
    adapted: int  # elements of all adapters and the head

    def buckets(self) -> int:
        """What DeepSpeed collects gradients in."""
        if not self.stage or not self.zero.get("contiguous_gradients", True):
            return 0
        bucket = int(self.zero.get("reduce_bucket_size", BUCKET))
        if self.parts.device == "cpu":  # a page that is never written is never there
            bucket = min(bucket, self.trained)
        twice = self.stage < 3 and self.zero.get("overlap_comm", False)
        return bucket * self.parts.trained_bytes * (2 if twice else 1)

    def gathered(self) -> int:
        """Weights that are whole or floating-point for a while, and the workspaces of the products."""
        parts, zero = self.parts, self.zero
        total = 0 if parts.device == "cpu" else WORKSPACES
        if self.quantization != "none" and parts.linear:  # one weight at a time
            total += max(parts.linear) * parts.weight_bytes
        if self.stage == 3 and self.world > 1:  # weights in use or soon used again, and a copy of those that come next
            live = int(zero.get("stage3_max_live_parameters", LIVE))
            ahead = int(zero.get("stage3_prefetch_bucket_size", PREFETCHED))
            elements = parts.constant + sum(map(sum, parts.layers))
            width = base_bytes(parts, self.quantization) / max(1, parts.constant)
            total += int((min(live, elements) + min(ahead, elements)) * width)
        return total

    def moved(self, state: int, weights: int) -> int:
        """Bytes of training `state` and `weights` that are in host memory instead of a GPU's."""
        moved = state if "offload_optimizer" in self.zero else 0
        return moved + (weights if self.stage == 3 and "offload_param" in self.zero else 0)

    def activations(self, gradients: int) -> int:
        """Of the largest step; evaluation, which has no `gradients`, and the update, which has no activations."""
        # ZeRO 1 and 2 copy gradients to fp32 for the update.
        update = 4 * self.trained // self.world if self.stage in (1, 2) else 0
        parts = self.parts
        return max(parts.peak, parts.scoring, parts.evaluation - gradients - self.buckets(), update)

    def sent(self) -> int:
        """Bytes that a rank sends in an optimizer step, by ring algorithms (tests/jobs/test_traffic.py counts them)."""
        ring = (self.world - 1) / self.world
        gradients = ring * self.trained * self.parts.trained_bytes
        # DeepSpeed's stages 1 and 2 all-reduce a bucket, unless they are set to reduce each rank's part to it.
        divided = self.stage in (1, 2)
        whole = self.stage == 0 or (divided and self.zero.get("use_multi_rank_bucket_allreduce", True))
        sent = gradients * (2 if whole else 1)  # all-reduce, or reduce-scatter
        if divided:
            sent += gradients  # all-gather of what was updated
        if self.stage == 3:
            passes, adapters = (
                2 * self.config.optim.gradient_accumulation_steps,
                self.adapted * self.parts.trained_bytes,
            )
            sent += passes * ring * (base_bytes(self.parts, self.quantization) + adapters)
        return int(sent) + 8 * len(self.parts.layers)  # the scores
