"""THE METHOD: which layers are trained. Choosers are pure and seeded; scores and signal_noise, which need torch, are
imported by name, so that this package needs none."""

from irtune.selection.chooser import Chooser, Observation
from irtune.selection.registry import build_chooser
from irtune.selection.split import split_layers

__all__ = ["Chooser", "Observation", "build_chooser", "split_layers"]
