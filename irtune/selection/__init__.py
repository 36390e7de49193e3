"""Choosers of layers: pure, seeded, without torch.distributed. `build_chooser` is the registry by name."""

from irtune.config.schema import TuningConfig
from irtune.selection.base import Chooser, Observation
from irtune.selection.full import FullChooser
from irtune.selection.ir import IRChooser
from irtune.selection.rst import RandomChooser
from irtune.selection.split import split_layers

__all__ = ["Chooser", "FullChooser", "IRChooser", "Observation", "RandomChooser", "build_chooser", "split_layers"]


def build_chooser(tuning: TuningConfig, num_layers: int, seed: int) -> Chooser:
    """Return the chooser named by `tuning.method` for a model of `num_layers` layers."""
    builders = {
        "full": lambda: FullChooser(num_layers, seed),
        "rst": lambda: RandomChooser(num_layers, tuning.interval, seed, fraction=tuning.fraction),
        "ir": lambda: IRChooser(
            num_layers,
            tuning.interval,
            seed,
            rule=tuning.rule,
            num_splits=tuning.num_splits,
            min_fraction=tuning.min_fraction,
            max_fraction=tuning.max_fraction,
            ema=tuning.ema,
            random_first=tuning.first == "random_half",
        ),
    }
    return builders[tuning.method]()
