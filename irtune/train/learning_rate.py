"""The learning rate as a function of the step. No scheduler object: re-selection rebuilds the optimizer under it."""

import math


def learning_rate(step: int, *, peak: float, warmup_steps: int, max_steps: int, schedule: str) -> float:
    """Learning rate of optimizer step `step` (counted from 0).

    Rises linearly over `warmup_steps` so that the last of them has the peak, then follows `schedule` (linear, cosine or
    constant); linear and cosine would reach 0 at `max_steps`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    if schedule == "linear":
        return peak * max(0.0, 1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
