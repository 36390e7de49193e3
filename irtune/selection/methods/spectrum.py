"""Spectrum (Hartford et al. 2024, arXiv 2406.06623): the layers whose weights have the highest signal-to-noise ratios.

Spectrum ranks the matrices of each module type and trains the top fraction of each. irtune trains whole layers: a layer
has one vote from every module type of whose top `count` it is a member, and the layers with most votes train; between
equal votes the lower mean rank decides, then the lower layer. The ratios are those of the pretrained weights, so the
choice is made once.
"""

from collections.abc import Mapping, Sequence

from irtune.config.declarations import Method
from irtune.selection.methods.fixed import FixedChooser


class SpectrumChooser(FixedChooser):
    """Trains `count` layers; `ratios` has the L signal-to-noise ratios of each module type."""

    def __init__(self, num_layers: int, seed: int = 0, *, count: int, ratios: Mapping[str, Sequence[float]]):
        super().__init__(num_layers, seed, layers=top_by_votes(ratios, num_layers, count))


def top_by_votes(ratios: Mapping[str, Sequence[float]], num_layers: int, count: int) -> list[int]:
    """Ascending ids of the `count` layers with most votes."""
    votes, ranks = [0] * num_layers, [0] * num_layers
    for values in ratios.values():
        for rank, layer in enumerate(sorted(range(num_layers), key=lambda i: (-values[i], i))):
            votes[layer] += rank < count
            ranks[layer] += rank
    return sorted(sorted(range(num_layers), key=lambda i: (-votes[i], ranks[i], i))[:count])


METHOD = Method(
    name="spectrum",
    summary="layers by the signal-to-noise ratio of their weights, once",
    from_config=lambda tuning, candidates: SpectrumChooser(
        candidates.num_layers, candidates.seed, count=candidates.count, ratios=candidates.ratios
    ),
    takes_budget=True,
    budget=0.25,
    repeats=False,
    needs_ratios=True,
)
