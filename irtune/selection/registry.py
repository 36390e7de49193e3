"""The registry of selection methods: from a name and its settings to a chooser."""

from collections.abc import Callable, Mapping, Sequence

from irtune.config.schema import TuningConfig
from irtune.errors import ConfigError
from irtune.selection.chooser import Chooser
from irtune.selection.methods.cyclic import CyclicChooser
from irtune.selection.methods.fixed import FixedChooser, FullChooser, SpafitChooser, parse_layers
from irtune.selection.methods.grass import GrassChooser
from irtune.selection.methods.ir import IRChooser
from irtune.selection.methods.ist import IstChooser
from irtune.selection.methods.random_layers import LisaChooser, RandomChooser
from irtune.selection.methods.spectrum import SpectrumChooser
from irtune.selection.methods.topk import TopKChooser
from irtune.selection.subset import SubsetChooser

# Layers trained at a time when the user sets no budget: a number of layers, or a fraction of them.
PAPER_BUDGETS: dict[str, int | float] = {
    "rst": 0.125,
    "ist": 0.25,
    "lisa": 2,
    "cyclic": 1,
    "grass": 0.25,
    "spectrum": 0.25,
    "topk": 0.25,
}


def takes_budget(method: str) -> bool:
    """Whether `tuning.budget` has a meaning for a method."""
    return method == "ir" or method in PAPER_BUDGETS


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


def build_chooser(
    tuning: TuningConfig,
    num_layers: int,
    seed: int,
    sizes: Sequence[int] | None = None,
    ratios: Mapping[str, Sequence[float]] | None = None,
) -> Chooser:
    """Return the chooser named by `tuning.method`, among those layers that have parameters.

    Args:
        tuning: the method and its settings.
        num_layers: L.
        seed: of everything random.
        sizes: trainable parameters of each layer; None: every layer has some.
        ratios: L signal-to-noise ratios per module type, for the method spectrum.

    Raises:
        ConfigError: for a budget or layers that the model has not.
    """
    sizes = [1] * num_layers if sizes is None else sizes
    layers = [layer for layer, size in enumerate(sizes) if size]
    if tuning.method == "fixed":
        return FixedChooser(num_layers, seed, layers=_named_layers(tuning.layers or "", num_layers, layers))
    if not layers:  # parameters are elsewhere, and always train
        return FixedChooser(num_layers, seed, layers=[])
    some = {name: [values[layer] for layer in layers] for name, values in (ratios or {}).items()}
    chooser = _build(tuning, len(layers), seed, [sizes[layer] for layer in layers], some)
    return chooser if len(layers) == num_layers else SubsetChooser(chooser, layers, num_layers)


def _named_layers(text: str, num_layers: int, with_parameters: Sequence[int]) -> list[int]:
    try:
        layers = parse_layers(text, num_layers)
    except ValueError as error:
        raise ConfigError(f"tuning.layers: {error}") from None
    empty = [layer for layer in layers if layer not in with_parameters]
    if empty:
        raise ConfigError(f"tuning.layers: layers {empty} have no parameters; those that have some: {with_parameters}")
    return layers


def _build(
    tuning: TuningConfig, num_layers: int, seed: int, sizes: Sequence[int], ratios: Mapping[str, Sequence[float]]
) -> Chooser:
    interval = tuning.interval
    count = layer_budget(tuning.budget or PAPER_BUDGETS.get(tuning.method, 1), num_layers)
    low, high = tuning.min_fraction, tuning.max_fraction
    if tuning.budget is not None:
        low = high = count / num_layers

    builders: dict[str, Callable[[], Chooser]] = {
        "full": lambda: FullChooser(num_layers, seed),
        "spafit": lambda: SpafitChooser(num_layers, seed, layers=range(num_layers)),
        "spectrum": lambda: SpectrumChooser(num_layers, seed, count=count, ratios=ratios),
        "rst": lambda: RandomChooser(num_layers, interval, seed, count=count),
        "lisa": lambda: LisaChooser(num_layers, interval, seed, count=count),
        "cyclic": lambda: CyclicChooser(num_layers, interval, seed, count=count, order=tuning.order),
        "ist": lambda: IstChooser(num_layers, interval, seed, count=count),
        "topk": lambda: TopKChooser(num_layers, interval, seed, count=count),
        "grass": lambda: GrassChooser(
            num_layers, interval, seed, count=count, sizes=sizes, temperature=tuning.temperature, ema=tuning.ema
        ),
        "ir": lambda: IRChooser(
            num_layers,
            interval,
            seed,
            rule=tuning.rule,
            num_splits=tuning.num_splits,
            min_fraction=low,
            max_fraction=high,
            ema=tuning.ema,
            random_first=tuning.first == "random_half",
            cost_weight=tuning.cost_weight,
        ),
    }
    return builders[tuning.method]()
