"""Pictures of a run: layer scores and trained layers over steps, confusion matrix, F1. Pure functions.

matplotlib is imported when the first picture is drawn, and without pyplot, which would keep every figure alive.
"""

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 400  # of a picture over steps: about one per pixel; longer runs show means
NUMBERED = 20  # classes up to which a confusion matrix has counts in its cells
NAME = 22  # characters of a class name that are shown
DPI, PIXELS = 140, 1200  # TensorBoard shows pictures 350 pixels wide at first: few inches, so that text stays readable
LOG_RATIO = 3.0  # scores that differ by more than this are shown on a log scale
BAR = (0.82, 0.15, 0.03, 0.74)  # place of the colour bar beside the layers
TRAINED, FROZEN = "#1f5a94", "#eceff1"
Row = tuple[int, np.ndarray, np.ndarray]


def score_map(steps: Sequence[int], scores: ArrayLike, end: int, kind: str = "score") -> "Figure":
    """Heat map of layer scores over steps.

    Args:
        steps: optimizer steps of the S selections, ascending.
        scores: float [S, layers]; NaN where a layer has none, which leaves a blank. Each holds until the next one.
        end: optimizer steps done.
        kind: what the score is, for the colour bar.
    """
    grid, left, right = over_steps(steps, scores, end)
    norm = _norm(grid)
    figure, axes = _layer_axes("Layer scores" if norm else "Layer scores: none known", len(grid))
    colours = _show(axes, grid, left, right, "viridis", norm)
    if norm is None:
        return figure
    bar = figure.colorbar(colours, cax=figure.add_axes(BAR), label=f"layer score ({kind})")
    if type(norm).__name__ == "LogNorm":
        _plain_log_ticks(bar)
    return figure


def trained_map(steps: Sequence[int], trained: ArrayLike, end: int) -> "Figure":
    """Raster of the layers that were trained over steps.

    Args:
        steps: optimizer steps of the S selections, ascending.
        trained: bool [S, layers]; each row holds until the next one.
        end: optimizer steps done.
    """
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    grid, left, right = over_steps(steps, trained, end)
    figure, axes = _layer_axes("Layers trained", len(grid))
    averaged = right - left > grid.shape[1]  # a column is several steps: shades between the two colours
    shades = LinearSegmentedColormap.from_list("trained", [FROZEN, TRAINED], N=256 if averaged else 2)
    colours = _show(axes, grid, left, right, shades, Normalize(0, 1))
    label = "share of steps trained" if averaged else None
    bar = figure.colorbar(colours, cax=figure.add_axes(BAR), label=label)
    if not averaged:
        bar.set_ticks([0.25, 0.75], labels=["frozen", "trained"])
    return figure


def share_bars(steps: Sequence[int], trained: ArrayLike, end: int) -> "Figure":
    """Bars: the share of optimizer steps in percent at which each layer was trained; arguments as in `trained_map`."""
    share = 100 * share_of_steps(steps, trained, end)
    figure, axes = _layer_axes("Share of steps trained", len(share), "optimizer steps (%)")
    axes.barh(np.arange(len(share)), share, height=0.8, color=TRAINED)
    axes.set(xlim=(0, 100))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def confusion_map(counts: ArrayLike, names: Sequence[str]) -> "Figure":
    """Confusion matrix: rows are labels, columns predictions, colour is the share of the row.

    Args:
        counts: int [classes, classes]. Written into the cells of up to 20 classes.
        names: of the classes.
    """
    matrix = np.asarray(counts, dtype=float)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    classes, short = len(matrix), [_short(name) for name in names]
    side, names_side = min(max(2.6, 0.42 * classes), 8.4), 0.6 + 0.085 * max(map(len, short))  # inches
    figure = _figure(names_side + side + 1.0, names_side + side + 0.4, layout="compressed")
    axes = figure.subplots()
    colours = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(colours, label="share of the label's examples", aspect=22, pad=0.03)
    if classes <= NUMBERED:
        size = 10 if matrix.max() < 1000 else 7.5
        for row, column in np.ndindex(classes, classes):
            empty = matrix[row, column] == 0
            if empty and classes > 10:
                continue  # what stands out is what can be read
            colour = "white" if share[row, column] > 0.55 else "#a0a0a0" if empty else "black"
            axes.text(column, row, f"{matrix[row, column]:.0f}", color=colour, size=size, ha="center", va="center")
    ticks, named, style = _name_ticks(short)
    axes.set_xticks(ticks, named, rotation=90, **style)
    axes.set_yticks(ticks, named, **style)
    axes.set(title="Confusion matrix", xlabel="predicted", ylabel="label")
    return figure


def f1_bars(f1: Sequence[float], names: Sequence[str], examples: Sequence[int]) -> "Figure":
    """Bars: F1 of each class, from 0 to 1, with its number of examples; a line at their mean, the macro-F1."""
    classes, macro = len(f1), sum(f1) / len(f1)
    short = [f"{_short(name)} ({count})" for name, count in zip(names, examples)]
    figure = _figure(4.0 + 0.085 * max(map(len, short)), min(max(1.8, 0.3 * classes), 9.0) + 1.05, layout="constrained")
    axes = figure.subplots()
    axes.barh(np.arange(classes), f1, height=0.75, color=TRAINED)
    axes.axvline(macro, color="#c0392b", linestyle="--", linewidth=1.2)
    ticks, named, style = _name_ticks(short)
    axes.set_yticks(ticks, named, **style)
    for row, value in enumerate(f1) if len(ticks) == classes else ():
        inside = value > 0.85
        box = {"facecolor": TRAINED if inside else "white", "edgecolor": "none", "pad": 0.8}  # over the line
        axes.text(value + (-0.01 if inside else 0.01), row, f"{value:.2f}", size=8, va="center_baseline", bbox=box,
                  ha="right" if inside else "left", color="white" if inside else "black")  # fmt: skip
    axes.set(xlim=(0, 1), ylim=(classes - 0.5, -0.5), xlabel="F1", title=f"F1 per class (macro-F1 {macro:.3f})")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def rgb(figure: "Figure") -> np.ndarray:
    """The picture itself, uint8 [height, width, 3] in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # names in a script that the font lacks
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def viridis(values: np.ndarray) -> np.ndarray:
    """Colours of values from 0 to 1 on matplotlib's scale viridis, uint8 [..., 4]."""
    from matplotlib import colormaps

    return (np.asarray(colormaps["viridis"](values)) * 255).astype(np.uint8)


def row(record: dict[str, Any]) -> Row:
    """A record of selection.jsonl in little memory: step, scores float32 [layers] with NaN, trained bool [layers]."""
    layers = record["num_layers"]
    scores = [np.nan if score is None else score for score in record["scores"] or [None] * layers]
    return record["step"], np.array(scores, dtype=np.float32), np.isin(np.arange(layers), record["selected"])


def arrays(rows: Sequence[Row]) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Steps of S selections, scores float32 [S, layers] and trained bool [S, layers]."""
    steps, scores, trained = zip(*rows)
    return list(steps), np.stack(scores), np.stack(trained)


def over_steps(steps: Sequence[int], values: ArrayLike, end: int) -> tuple[np.ndarray, int, int]:
    """Values at selections as a grid over steps, with at most 400 columns of equal width.

    Args:
        steps: optimizer steps of the S selections, ascending.
        values: [S, layers]; each row holds until the next one. What is not finite is left out of means.
        end: optimizer steps done; the last selection is shown for one step at least.

    Returns:
        float64 [layers, columns], a column being a step or the mean over several, NaN where nothing is known; and the
        steps at the left and the right edge.
    """
    rows = np.asarray(values, dtype=float)
    left, right = steps[0], max(end, steps[-1] + 1)
    edges = np.append(steps, right).astype(float)
    cuts = np.linspace(left, right, min(right - left, COLUMNS) + 1)
    known = np.isfinite(rows)
    total, weight = (_integral(edges, part, cuts) for part in (np.where(known, rows, 0.0), known.astype(float)))
    weight[weight < 1e-9] = np.nan
    return (total / weight).T, left, right


def share_of_steps(steps: Sequence[int], trained: ArrayLike, end: int) -> np.ndarray:
    """Share of the steps up to `end` at which each layer was trained, float64 [layers]; see `trained_map`."""
    lengths = np.diff(np.append(steps, max(end, steps[-1])))
    return lengths @ np.asarray(trained, dtype=float) / max(1, lengths.sum())


def _integral(edges: np.ndarray, rows: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """Integrals, between neighbouring `cuts`, of the step functions that are `rows` between `edges`: [cuts - 1, L]."""
    before = np.concatenate([np.zeros((1, rows.shape[1])), np.cumsum(rows * np.diff(edges)[:, None], axis=0)])
    place = np.clip(np.searchsorted(edges, cuts, side="right") - 1, 0, len(rows) - 1)
    return np.diff(before[place] + (cuts - edges[place])[:, None] * rows[place], axis=0)


def _norm(grid: np.ndarray) -> Any:
    """Colour scale of scores: logarithmic where they span a range and none is negative; None without any score."""
    from matplotlib.colors import LogNorm, Normalize

    known = grid[np.isfinite(grid)]
    if not known.size:
        return None
    low, high = float(known.min()), float(known.max())
    smallest = float(known[known > 0].min()) if high > 0 else 0.0
    if low >= 0 and smallest > 0 and high > LOG_RATIO * smallest:
        return LogNorm(max(smallest, 1e-6 * high), high, clip=True)
    margin = 0.0 if high > low else 0.5 * abs(high) or 0.5
    return Normalize(low - margin, high + margin)


def _plain_log_ticks(bar: Any) -> None:
    """0.2 instead of 2 x 10^-1, and more than one number where the scale is shorter than a decade."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    decades = math.log10(bar.norm.vmax / bar.norm.vmin)
    bar.locator = LogLocator(subs=(1.0, 2.0, 5.0) if decades < 3 else (1.0,))
    bar.minorlocator = NullLocator()
    bar.formatter = StrMethodFormatter("{x:g}")
    bar.update_ticks()


def _figure(width: float, height: float, layout: Any = None) -> "Figure":
    """An empty picture of `width` by `height` inches, with at most 1200 pixels along each side."""
    from matplotlib.figure import Figure

    dpi = min(DPI, PIXELS / max(width, height))
    return Figure(figsize=(width, height), dpi=dpi, facecolor="white", layout=layout)


def _layer_axes(title: str, layers: int, xlabel: str = "optimizer step") -> "tuple[Figure, Axes]":
    """A picture with layers upwards, at the same place in each, so that one can be laid beside the other."""
    figure = _figure(5.2, 3.3)
    axes = figure.add_axes((0.11, 0.15, 0.69, 0.74))
    axes.set(title=title, xlabel=xlabel, ylabel="layer", ylim=(-0.5, layers - 0.5), yticks=_layer_ticks(layers))
    return figure, axes


def _show(axes: "Axes", grid: np.ndarray, left: int, right: int, colours: Any, norm: Any) -> Any:
    """The grid as an image with step numbers along it; returns the image."""
    from matplotlib.ticker import MaxNLocator

    shown = axes.imshow(
        np.ma.masked_invalid(grid),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(left, right, -0.5, len(grid) - 0.5),
        cmap=colours,
        norm=norm,
    )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    return shown


def _layer_ticks(layers: int) -> range:
    return range(0, layers, next(step for step in (1, 2, 4, 5, 10, 20, 50, 100, layers) if layers <= 12 * step))


def _name_ticks(names: Sequence[str]) -> tuple[range, list[str], dict[str, Any]]:
    """Positions, names and text style of class names along an axis."""
    ticks = range(0, len(names), math.ceil(len(names) / 50))
    size = 10 if len(names) <= NUMBERED else 8.5 if len(names) <= 30 else 7
    return ticks, [names[tick] for tick in ticks], {"fontsize": size, "parse_math": False}  # a name may hold a dollar


def _short(name: str) -> str:
    return name if len(name) <= NAME else name[: NAME - 1] + "…"
