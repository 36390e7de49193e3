"""All layers, always: the paper's "full" (adapters on all layers, not full-parameter fine-tuning)."""

from irtune.selection.fixed import FixedChooser


class FullChooser(FixedChooser):
    """Trains every layer from the first step to the last."""

    def __init__(self, num_layers: int, seed: int = 0):
        super().__init__(num_layers, seed, layers=range(num_layers))
