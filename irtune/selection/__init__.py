"""THE METHOD: which layers are trained. Choosers are pure and seeded; scores and signal_noise, which need torch, are
imported by name, so that this package needs none."""

from irtune.selection.chooser import Candidates, Chooser, Observation
from irtune.selection.registry import build_chooser, largest_selection, layer_budget
from irtune.selection.split import split_layers

__all__ = [
    "Candidates",
    "Chooser",
    "Observation",
    "build_chooser",
    "largest_selection",
    "layer_budget",
    "split_layers",
]
