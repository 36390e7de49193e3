"""From the name of a selection method and its settings to a chooser."""

from collections.abc import Mapping, Sequence

from irtune.config.declarations import implementation, methods
from irtune.config.schema import TuningConfig
from irtune.errors import ConfigError
from irtune.selection.chooser import Candidates, Chooser
from irtune.selection.methods.fixed import FixedChooser
from irtune.selection.subset import SubsetChooser


def layer_budget(budget: int | float, num_layers: int) -> int:
    """Number of layers that `budget` means in a model of `num_layers`: itself, or the nearest number to a fraction.

    Raises:
        ConfigError: when that is less than one layer or more than all.
    """
    count = budget if isinstance(budget, int) else max(1, round(budget * num_layers)) if 0 < budget <= 1 else 0
    if not 1 <= count <= num_layers:
        raise ConfigError(
            f"tuning.budget is {budget!r}; accepted: 1 to {num_layers} layers, or a fraction above 0 and at most 1.0"
        )
    return count


def largest_selection(tuning: TuningConfig, num_layers: int) -> int:
    """The most of `num_layers` layers that `tuning.method` may train at a time.

    Raises:
        ConfigError: for a budget that the model has not.
    """
    method = methods()[tuning.method]
    budget = method.budget if tuning.budget is None else tuning.budget
    if budget is not None:
        return layer_budget(budget, num_layers)
    largest = implementation(method).largest
    return num_layers if largest is None else largest(tuning, num_layers)


def build_chooser(
    tuning: TuningConfig,
    num_layers: int,
    seed: int,
    sizes: Sequence[int] | None = None,
    ratios: Mapping[str, Sequence[float]] | None = None,
) -> Chooser:
    """Return the chooser of `tuning.method`, among those layers that have parameters.

    Args:
        tuning: the method and its settings.
        num_layers: L.
        seed: of everything random.
        sizes: trainable parameters of each layer; None: every layer has some.
        ratios: L signal-to-noise ratios per module type, for methods that need them.

    Raises:
        ConfigError: for a budget or layers that the model has not.
    """
    sizes = [1] * num_layers if sizes is None else sizes
    method = implementation(methods()[tuning.method])
    assert method.from_config is not None, f"{method.module} declares no from_config"
    layers = list(range(num_layers)) if method.names_layers else [layer for layer, size in enumerate(sizes) if size]
    if not layers:  # parameters are elsewhere, and always train
        return FixedChooser(num_layers, seed, layers=[])
    budget = method.budget if tuning.budget is None else tuning.budget
    candidates = Candidates(
        num_layers=len(layers),
        seed=seed,
        count=len(layers) if budget is None else layer_budget(budget, len(layers)),
        sizes=[sizes[layer] for layer in layers],
        ratios={name: [values[layer] for layer in layers] for name, values in (ratios or {}).items()},
    )
    chooser = method.from_config(tuning, candidates)
    return chooser if len(layers) == num_layers else SubsetChooser(chooser, layers, num_layers)
