"""Blocks of layers one after the other, K steps each (BAdam: Luo et al., NeurIPS 2024, algorithm 1; LIFT)."""

from typing import Literal

from irtune.config.declarations import Method
from irtune.selection.chooser import Chooser, Observation


class CyclicChooser(Chooser):
    """Cuts the layers into blocks of `count` neighbours and visits them in `order`; random: redrawn every round."""

    def __init__(
        self,
        num_layers: int,
        interval: int = 10,
        seed: int = 0,
        *,
        count: int = 1,
        order: Literal["ascending", "descending", "random"] = "random",
    ):
        super().__init__(num_layers, interval, seed, count=count)
        self.blocks = [list(range(i, min(i + count, num_layers))) for i in range(0, num_layers, count)]
        self.order = order

    def first(self) -> list[int]:
        """The first block of the first round."""
        return self._block(0)

    def choose(self, seen: Observation) -> list[int]:
        """The next block."""
        return self._block(seen.step // self.interval)

    def _block(self, turn: int) -> list[int]:
        round_, position = divmod(turn, len(self.blocks))
        order = list(range(len(self.blocks)))
        if self.order == "descending":
            order.reverse()
        elif self.order == "random":
            self.random(round_).shuffle(order)
        return self.blocks[order[position]]


METHOD = Method(
    name="cyclic",
    summary="blocks of layers in turn",
    from_config=lambda tuning, candidates: CyclicChooser(
        candidates.num_layers, tuning.interval, candidates.seed, count=candidates.count, order=tuning.order
    ),
    takes_budget=True,
    budget=1,
)
