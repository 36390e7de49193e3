"""IST: importance-aware sparse tuning (Yao et al., Findings of EMNLP 2024, section 3).

Every layer has an importance I, at first 0. Each step trains a draw of layers with weights sigmoid(-I). At times,
candidate sets of layers, drawn with weights sigmoid(I), are suppressed and the model's loss is measured: a set whose
suppression hurts less than the others is rewarded, and the importance of its members rises, so that they train less.
"""

import math
from collections.abc import Sequence
from typing import Any

from irtune.config.declarations import Method
from irtune.selection.chooser import Chooser, Observation, sigmoid, weighted_sample

TRIAL_INTERVAL = 10
TRIALS = 3
SUPPRESSED_SHARE = 0.5
LEARNING_RATE = 10.0


class IstChooser(Chooser):
    """Draws `count` layers at every step; every 10 steps it asks for the loss with half of the layers suppressed."""

    def __init__(self, num_layers: int, interval: int = 1, seed: int = 0, *, count: int = 1):
        super().__init__(num_layers, interval, seed, count=count)
        self.importance = [0.0] * num_layers

    def first(self) -> list[int]:
        """The draw of step 0."""
        return self._draw(0)

    def trials(self, step: int) -> list[list[int]]:
        """Sets of layers whose suppression is to be measured after `step`; none on most steps."""
        if step % TRIAL_INTERVAL:
            return []
        rng = self.random(-step)
        weights = [sigmoid(value) for value in self.importance]
        size = max(1, round(SUPPRESSED_SHARE * self.num_layers))
        return [weighted_sample(weights, size, rng) for _ in range(TRIALS)]

    def choose(self, seen: Observation) -> list[int]:
        """Learn from the trials, if there were any, and draw."""
        if seen.trials:
            self._learn([layers for layers, _ in seen.trials], [loss for _, loss in seen.trials])
        return self._draw(seen.step)

    def _learn(self, suppressed: Sequence[Sequence[int]], losses: Sequence[float]) -> None:
        """I_i += 10 * reward * s (1 - s), s = sigmoid(I_i), for suppressed i; reward = exp(-loss) minus their mean."""
        if not all(math.isfinite(loss) for loss in losses):
            return
        gains = [math.exp(-loss) for loss in losses]
        mean = sum(gains) / len(gains)
        before = list(self.importance)
        for layers, gain in zip(suppressed, gains):
            for layer in layers:
                s = sigmoid(before[layer])
                self.importance[layer] += LEARNING_RATE * (gain - mean) * s * (1 - s)

    def _draw(self, step: int) -> list[int]:
        return weighted_sample([sigmoid(-value) for value in self.importance], self.count, self.random(step))

    def state_dict(self) -> dict[str, Any]:
        """Importance of each layer."""
        return {"importance": list(self.importance)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the importance of each layer."""
        self.importance = list(state["importance"])


METHOD = Method(
    name="ist",
    summary="layers drawn by learnt importance",
    from_config=IstChooser.from_config,
    takes_budget=True,
    budget=0.25,
    suppresses=True,
    fills={"tuning.interval": 1},
)
