"""The k layers with the highest scores."""

from irtune.config.declarations import Method
from irtune.selection.chooser import Observation, ScoreChooser


class TopKChooser(ScoreChooser):
    """Trains the `count` layers of highest fresh score; keeps the selection when a score is not finite."""

    def __init__(self, num_layers: int, interval: int = 10, seed: int = 0, *, count: int = 1):
        super().__init__(num_layers, interval, seed, count=count)
        self.scores = [0.0] * num_layers

    def choose(self, seen: Observation) -> list[int]:
        """Highest scores first; ties go to the lower layer."""
        if not self.remember(seen):
            return list(seen.selected)
        order = sorted(range(self.num_layers), key=lambda layer: (-self.scores[layer], layer))
        return sorted(order[: self.count])

    def remember(self, seen: Observation) -> bool:
        """Take over fresh scores; False, and counted, when one of them is not finite."""
        fresh = list(seen.scores or [])
        if not self.are_finite(fresh):
            return False
        for layer, score in enumerate(fresh):
            if score is not None:
                self.scores[layer] = score
        return True


METHOD = Method(
    name="topk",
    summary="the highest scores",
    from_config=TopKChooser.from_config,
    takes_budget=True,
    budget=0.25,
)
