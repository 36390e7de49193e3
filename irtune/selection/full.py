"""All layers, always: the paper's "full" (adapters on all layers, not full-parameter fine-tuning)."""

from irtune.selection.base import Chooser, Observation


class FullChooser(Chooser):
    """Trains every layer from the first step to the last."""

    def __init__(self, num_layers: int, seed: int = 0):
        super().__init__(num_layers, interval=0, seed=seed)

    def first(self) -> list[int]:
        """All layers."""
        return list(range(self.num_layers))

    def choose(self, seen: Observation) -> list[int]:
        """All layers."""
        return list(range(self.num_layers))
