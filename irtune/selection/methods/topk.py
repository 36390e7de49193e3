"""The k layers with the highest scores."""

import math
from typing import Any

from irtune.config.declarations import Method
from irtune.selection.chooser import Chooser, Observation


class TopKChooser(Chooser):
    """Trains the `count` layers of highest fresh score; keeps the selection when a score is not finite."""

    needs_scores = True

    def __init__(self, num_layers: int, interval: int = 10, seed: int = 0, *, count: int = 1):
        super().__init__(num_layers, interval, seed)
        self.count = count
        self.scores: list[float] = [0.0] * num_layers
        self.bad_in_a_row = 0

    def choose(self, seen: Observation) -> list[int]:
        """Highest scores first; ties go to the lower layer."""
        if not self.remember(seen):
            return list(seen.selected)
        order = sorted(range(self.num_layers), key=lambda layer: (-self.scores[layer], layer))
        return sorted(order[: self.count])

    def remember(self, seen: Observation) -> bool:
        """Take over fresh scores; False, and counted, when one of them is not finite."""
        fresh = list(seen.scores or [])
        if any(score is not None and not math.isfinite(score) for score in fresh):
            self.bad_in_a_row += 1
            return False
        self.bad_in_a_row = 0
        for layer, score in enumerate(fresh):
            if score is not None:
                self.scores[layer] = score
        return True

    def state_dict(self) -> dict[str, Any]:
        """Scores (length L) and the count of bad selections in a row."""
        return {"scores": list(self.scores), "bad_in_a_row": self.bad_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over remembered scores and the count of bad selections."""
        self.scores = list(state["scores"])
        self.bad_in_a_row = int(state["bad_in_a_row"])


METHOD = Method(
    name="topk",
    summary="the highest scores",
    from_config=lambda tuning, candidates: TopKChooser(
        candidates.num_layers, tuning.interval, candidates.seed, count=candidates.count
    ),
    takes_budget=True,
    budget=0.25,
)
