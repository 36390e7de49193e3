"""Accumulation steps from the global batch, once the number of ranks is known."""

import math
from dataclasses import replace

from irtune.config.schema import Config, OptimConfig


def accumulation(optim: OptimConfig, ranks: int) -> tuple[int, list[str]]:
    """Micro-batches per rank and optimizer step on `ranks` ranks, and one sentence per problem.

    global batch = micro-batch x accumulation x ranks. An accumulation of 1, which is the default, is filled in.
    """
    total, given = optim.global_batch_size, optim.gradient_accumulation_steps
    if total is None or total < 1 or optim.micro_batch_size < 1:  # the last two are reported elsewhere
        return given, []
    at_once = optim.micro_batch_size * ranks
    if total % at_once:
        nearest = [value for value in (total // at_once * at_once, -(-total // at_once) * at_once) if value]
        sizes = _divisors(total // ranks) if total % ranks == 0 else []
        smaller = f", or optim.micro_batch_size {' or '.join(map(str, sizes))}" if sizes else ""
        return given, [
            f"optim.global_batch_size is {total}, which is not a multiple of optim.micro_batch_size "
            f"{optim.micro_batch_size} x {ranks} rank(s); accepted: {' or '.join(map(str, nearest))}{smaller}"
        ]
    steps = total // at_once
    if given not in (1, steps):
        return given, [
            f"optim.gradient_accumulation_steps is {given}, but optim.global_batch_size {total} on {ranks} rank(s) "
            f"with optim.micro_batch_size {optim.micro_batch_size} makes it {steps}; remove one of the two"
        ]
    return steps, []


def longest_micro_batch(config: Config) -> int:
    """Examples of the longest input, data.max_length tokens, in one micro-batch; rounded up where tokens fill it."""
    tokens = config.optim.micro_batch_tokens
    return config.optim.micro_batch_size if tokens is None else -(-tokens // config.data.max_length)


def with_accumulation(config: Config, ranks: int) -> Config:
    """`config` with the accumulation steps of a job of `ranks` ranks; as it is where there is a problem."""
    steps, _ = accumulation(config.optim, ranks)
    if steps == config.optim.gradient_accumulation_steps:
        return config
    return replace(config, optim=replace(config.optim, gradient_accumulation_steps=steps))


def _divisors(number: int) -> list[int]:
    """Divisors of `number`, the largest ones first, four at most."""
    small = [value for value in range(1, math.isqrt(number) + 1) if number % value == 0]
    return sorted({*small, *(number // value for value in small)}, reverse=True)[:4]
