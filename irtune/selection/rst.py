"""RST: a random subset of layers at every selection, the baseline of Liu and Litman (2025), section 4."""

from irtune.selection.base import Chooser, Observation


class RandomChooser(Chooser):
    """Draws `count` layers uniformly at random, seeded."""

    def __init__(self, num_layers: int, interval: int = 1, seed: int = 0, *, count: int = 1):
        super().__init__(num_layers, interval, seed)
        self.count = count

    def first(self) -> list[int]:
        """The draw of step 0."""
        return self.sample(self.count, step=0)

    def choose(self, seen: Observation) -> list[int]:
        """A new draw that depends on the seed and the step only."""
        return self.sample(self.count, seen.step)
