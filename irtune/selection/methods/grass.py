"""GRASS: sample layers with probabilities from their mean gradient norms (2026).

m_l is the mean over probe steps of sqrt(||g_l||^2 / n_l), n_l the layer's number of trainable parameters;
p = softmax(m / tau); `count` layers (gamma) are drawn without replacement; m is refreshed by a moving average.
"""

import math
from collections.abc import Sequence

from irtune.config.declarations import Method
from irtune.selection.chooser import Observation, weighted_sample
from irtune.selection.methods.topk import TopKChooser


class GrassChooser(TopKChooser):
    """Draws layers by their scores; `sizes` are the n_l, `ema` is the weight of the old mean, `temperature` is tau."""

    def __init__(
        self,
        num_layers: int,
        interval: int = 10,
        seed: int = 0,
        *,
        count: int = 1,
        sizes: Sequence[int],
        temperature: float = 1.0,
        ema: float = 0.0,
    ):
        super().__init__(num_layers, interval, seed, count=count)
        self.sizes, self.temperature, self.ema = sizes, temperature, ema

    def choose(self, seen: Observation) -> list[int]:
        """Refresh the means and draw."""
        old, first = list(self.scores), not any(self.scores)
        fresh = None if seen.scores is None else [
            None if score is None else score / math.sqrt(size) for score, size in zip(seen.scores, self.sizes)
        ]  # fmt: skip
        if not self.remember(Observation(seen.step, fresh, seen.selected)):
            return list(seen.selected)
        if not first:
            self.scores = [self.ema * a + (1 - self.ema) * b for a, b in zip(old, self.scores)]
        return weighted_sample(self.probabilities(), self.count, self.random(seen.step))

    def probabilities(self) -> list[float]:
        """softmax(m / tau), length L."""
        highest = max(self.scores)
        weights = [math.exp((score - highest) / self.temperature) for score in self.scores]
        return [weight / sum(weights) for weight in weights]


METHOD = Method(
    name="grass",
    summary="layers drawn by their gradient norms",
    from_config=lambda tuning, candidates: GrassChooser(
        candidates.num_layers,
        tuning.interval,
        candidates.seed,
        count=candidates.count,
        sizes=candidates.sizes,
        temperature=tuning.temperature,
        ema=tuning.ema,
    ),
    takes_budget=True,
    budget=0.25,
    needs={"tuning.score": ("rms", "is defined for mean gradient norms")},
)
