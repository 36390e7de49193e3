"""The same layers from the first step to the last, named by the user."""

from collections.abc import Sequence

from irtune.config.declarations import Method
from irtune.errors import ConfigError
from irtune.selection.chooser import Candidates, Chooser, Observation


class FixedChooser(Chooser):
    """Trains `layers` and never selects again."""

    def __init__(self, num_layers: int, seed: int = 0, *, layers: Sequence[int]):
        super().__init__(num_layers, interval=0, seed=seed)
        self.layers = sorted(set(layers))

    def first(self) -> list[int]:
        """The named layers."""
        return list(self.layers)

    def choose(self, seen: Observation) -> list[int]:
        """The named layers."""
        return list(self.layers)


def parse_layers(text: str, num_layers: int) -> list[int]:
    """Layers from a list of numbers and ranges, for example "0-3,7,-1" (-1 is the last layer).

    Raises:
        ValueError: with the part that is not a layer of the model.
    """
    layers: list[int] = []
    for part in text.split(","):
        piece = part.strip()
        first, dash, last = piece.rpartition("-") if not piece.startswith("-") else ("", "", piece)
        try:
            start, stop = (int(first), int(last)) if dash and first else (int(piece), int(piece))
        except ValueError:
            raise ValueError(f"{piece!r} is neither a layer nor a range of layers") from None
        start, stop = (number + num_layers if number < 0 else number for number in (start, stop))
        if not 0 <= start <= stop < num_layers:
            raise ValueError(f"{piece!r} is outside the layers 0 to {num_layers - 1}")
        layers += range(start, stop + 1)
    return sorted(set(layers))


class FullChooser(FixedChooser):
    """Trains every layer from the first step to the last."""

    def __init__(self, num_layers: int, seed: int = 0):
        super().__init__(num_layers, seed, layers=range(num_layers))


def _named_layers(text: str, candidates: Candidates) -> FixedChooser:
    """A chooser of the layers that `text` names.

    Raises:
        ConfigError: for layers that the model has not, or that have no parameters.
    """
    try:
        layers = parse_layers(text, candidates.num_layers)
    except ValueError as error:
        raise ConfigError(f"tuning.layers: {error}") from None
    full = [layer for layer, size in enumerate(candidates.sizes) if size]
    empty = [layer for layer in layers if layer not in full]
    if empty:
        raise ConfigError(f"tuning.layers: layers {empty} have no parameters; those that have some: {full}")
    return FixedChooser(candidates.num_layers, candidates.seed, layers=layers)


FIXED = Method(
    name="fixed",
    summary="the layers that tuning.layers names",
    from_config=lambda tuning, candidates: _named_layers(tuning.layers, candidates),
    repeats=False,
    names_layers=True,
    keys=("tuning.layers",),
    refuses=(({"tuning.layers": None}, "tuning.method fixed needs tuning.layers, for example 0-3,7"),),
)
FULL = Method(
    name="full",
    summary="all layers",
    from_config=lambda tuning, candidates: FullChooser(candidates.num_layers, candidates.seed),
    repeats=False,
)
SPAFIT = Method(
    name="spafit",
    summary="all but the lowest stratum of the adapter type spafit",
    from_config=lambda tuning, candidates: FullChooser(candidates.num_layers, candidates.seed),
    repeats=False,
    fills={"adapter.type": "spafit"},
    needs={"adapter.type": ("spafit", "trains the strata of the adapter type of that name")},
)
