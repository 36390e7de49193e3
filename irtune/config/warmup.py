"""How long the warm-up is."""

import math

from irtune.config.schema import OptimConfig


def warmup_length(optim: OptimConfig, max_steps: int) -> int:
    """Optimizer steps of warm-up in a run of `max_steps`: `optim.warmup_steps`, or the fraction of all, rounded up."""
    if optim.warmup_fraction is None:
        return optim.warmup_steps
    return math.ceil(round(optim.warmup_fraction * max_steps, 6))  # .07 x 100 is a little more than 7
