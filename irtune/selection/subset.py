"""Choose among some of the layers only."""

from collections.abc import Sequence
from typing import Any

from irtune.selection.chooser import Chooser, Observation


class SubsetChooser(Chooser):
    """Lets `inner`, a chooser over as many layers as `layers` names, choose among these."""

    def __init__(self, inner: Chooser, layers: Sequence[int], num_layers: int):
        super().__init__(num_layers, inner.interval, inner.seed)
        self.inner, self.layers = inner, list(layers)
        self.needs_scores = inner.needs_scores

    @property
    def bad_in_a_row(self) -> int:  # type: ignore[override]
        """Selections in a row whose scores were not finite."""
        return self.inner.bad_in_a_row

    def _outer(self, chosen: Sequence[int]) -> list[int]:
        return [self.layers[position] for position in chosen]

    def first(self) -> list[int] | None:
        """The inner chooser's first layers."""
        chosen = self.inner.first()
        return None if chosen is None else self._outer(chosen)

    def is_due(self, step: int) -> bool:
        """When the inner chooser's selection is due."""
        return self.inner.is_due(step)

    def trials(self, step: int) -> list[list[int]]:
        """The inner chooser's sets of layers."""
        return [self._outer(layers) for layers in self.inner.trials(step)]

    def choose(self, seen: Observation) -> list[int]:
        """Show the inner chooser its layers only."""
        place = {layer: position for position, layer in enumerate(self.layers)}
        inside = Observation(
            seen.step,
            None if seen.scores is None else [seen.scores[layer] for layer in self.layers],
            [place[layer] for layer in seen.selected if layer in place],
            [([place[layer] for layer in layers], loss) for layers, loss in seen.trials],
        )
        return self._outer(self.inner.choose(inside))

    def state_dict(self) -> dict[str, Any]:
        """The inner chooser's state."""
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the inner chooser's state."""
        self.inner.load_state_dict(state)
