"""RST: a random subset of layers at every step, the baseline of Liu and Litman (2025), section 4."""

from irtune.selection.lisa import LisaChooser


class RandomChooser(LisaChooser):
    """LISA with K = 1: draws `count` layers uniformly at random at every step, from a sequence of its own."""

    def __init__(self, num_layers: int, interval: int = 1, seed: int = 0, *, count: int = 1):
        super().__init__(num_layers, interval, seed, count=count)
