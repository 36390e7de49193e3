"""SPAFIT (Arora and Wang 2024): all layers above the frozen stratum train, all the time."""

from irtune.selection.fixed import FixedChooser


class SpafitChooser(FixedChooser):
    """The layers to which the adapter type spafit gave parameters: [a, L)."""
