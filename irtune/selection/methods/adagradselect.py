"""AdaGradSelect: high gradient norms at first, then layers that were often chosen (arXiv 2512.15764).

S: written from a second-hand summary. With probability epsilon, which decays, the layers of highest gradient norm
train; otherwise layers are drawn by probabilities from a Dirichlet distribution over how often each was chosen. The
decay per selection is irtune's own.
"""

from typing import Any

from irtune.config.declarations import Method
from irtune.selection.chooser import Observation, weighted_sample
from irtune.selection.methods.topk import TopKChooser

EPSILON_DECAY = 0.9  # epsilon is 1 at the first selection, .35 at the eleventh
PRIOR = 1.0  # of each layer in the Dirichlet distribution


class AdaGradSelectChooser(TopKChooser):
    """Trains `count` layers; `counts` says how often each was chosen."""

    def __init__(self, num_layers: int, interval: int = 10, seed: int = 0, *, count: int = 1):
        super().__init__(num_layers, interval, seed, count=count)
        self.counts = [0] * num_layers
        self.selections = 0

    def choose(self, seen: Observation) -> list[int]:
        """Explore or draw."""
        highest = super().choose(seen)
        if self.bad_in_a_row:
            return highest
        rng = self.random(seen.step)
        if rng.random() < EPSILON_DECAY**self.selections:
            chosen = highest
        else:
            # Gamma variates in proportion are a draw from the Dirichlet distribution.
            weights = [rng.gammavariate(PRIOR + count, 1.0) for count in self.counts]
            chosen = weighted_sample(weights, self.count, rng)
        self.selections += 1
        for layer in chosen:
            self.counts[layer] += 1
        return chosen

    def state_dict(self) -> dict[str, Any]:
        """Scores and counts (length L), the number of selections, and that of bad ones in a row."""
        return super().state_dict() | {"counts": list(self.counts), "selections": self.selections}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take all of it over."""
        super().load_state_dict(state)
        self.counts, self.selections = list(state["counts"]), int(state["selections"])


METHOD = Method(
    name="adagradselect",
    summary="high gradient norms at first, then layers that were often chosen",
    from_config=AdaGradSelectChooser.from_config,
    takes_budget=True,
    budget=0.25,
)
