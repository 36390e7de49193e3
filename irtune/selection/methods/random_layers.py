"""LISA: a few layers uniformly at random, for K steps at a time (Pan et al., NeurIPS 2024, algorithm 1)."""

from irtune.config.declarations import Method
from irtune.selection.chooser import Chooser, Observation


class LisaChooser(Chooser):
    """Draws `count` layers (gamma) every `interval` steps (K). The head trains always, as everywhere in irtune."""

    def first(self) -> list[int]:
        """The draw of step 0."""
        return self.sample(self.count, step=0)

    def choose(self, seen: Observation) -> list[int]:
        """A new draw that depends on the seed and the step only."""
        return self.sample(self.count, seen.step)


class RandomChooser(LisaChooser):
    """LISA with K = 1: draws `count` layers uniformly at random at every step, from a sequence of its own."""


LISA = Method(
    name="lisa",
    summary="a few random layers for tuning.interval steps",
    from_config=LisaChooser.from_config,
    takes_budget=True,
    budget=2,
    fills_with={"none": {"adapter.embeddings": True}},  # LISA's always trained parts, with the head
)
RST = Method(
    name="rst",
    summary="random layers at every step",
    from_config=RandomChooser.from_config,
    takes_budget=True,
    budget=0.125,
    fills={"tuning.interval": 1},
)
