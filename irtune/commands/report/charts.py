"""Charts of the page as small SVG texts. Colours are the page's variables, so that they follow light and dark.

Grids over layers and steps are pictures inside the SVG, a pixel for each cell: some hundred bytes instead of thousands
of rectangles. Each chart has a title and a sentence that says in words what it shows.
"""

import base64
import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from irtune.tracking.pictures import over_steps, viridis

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 260, 62, 14, 12, 42
POINTS = 300  # of a line; longer ones are thinned
MARKED = 40  # points up to which each one has a dot
TRAINED, FROZEN = (49, 130, 206, 255), (128, 128, 128, 40)  # RGBA: they show on white and on black
_numbers = itertools.count()


@dataclass(frozen=True)
class Line:
    """A line of a chart: its name, the number of its colour, and its points. None: a gap."""

    name: str
    colour: int
    steps: Sequence[int]
    values: Sequence[float | None]

    @property
    def points(self) -> list[tuple[int, float]]:
        """The points that there are, at most `POINTS` of them and always the last."""
        known = [(s, float(v)) for s, v in zip(self.steps, self.values) if v is not None and math.isfinite(v)]
        every = math.ceil(len(known) / POINTS) or 1
        return known[(len(known) - 1) % every :: every] if known else []


def lines(title: str, given: Sequence[Line], low: float | None = None, high: float | None = None) -> Markup:
    """Lines over optimizer steps; nothing where none has two points."""
    shown = [line for line in given if line.points]
    if all(len(line.points) < 2 for line in shown):
        return Markup("")
    every = [point for line in shown for point in line.points]
    end, ys = max(x for x, _ in every), [y for _, y in every]
    xs = [x for x in _ticks(0, end) if x <= end]
    ticks = _ticks(min(ys) if low is None else low, max(ys) if high is None else high)
    place = _scale(0, end, ticks[0], ticks[-1])
    parts = [_axes(xs, ticks, place, "optimizer step")]
    for line in shown:
        at = [place(x, y) for x, y in line.points]
        parts.append(Markup('<polyline class="line c{}" points="{}"/>').format(
            line.colour, " ".join(f"{x:.1f},{y:.1f}" for x, y in at)))  # fmt: skip
        if len(at) <= MARKED:
            parts += [Markup('<circle class="dot c{}" cx="{}" cy="{}" r="3"><title>{}</title></circle>').format(
                line.colour, f"{x:.1f}", f"{y:.1f}", f"{line.name}, step {step}: {value:.4g}")
                for (x, y), (step, value) in zip(at, line.points)]  # fmt: skip
    ends = {line.name: dict.fromkeys((line.points[0], line.points[-1])) for line in shown}
    said = "; ".join(f"{name}: " + ", ".join(f"{_number(y)} at step {x}" for x, y in points)
                     for name, points in ends.items())  # fmt: skip
    legend = [(line.name, f"c{line.colour}") for line in shown] if len(shown) > 1 else []
    return _figure(title, said, Markup("").join(parts), legend)


def _number(value: float) -> str:
    """Three digits, and all of a large number's."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def scores(steps: Sequence[int], values: np.ndarray, end: int) -> Markup:
    """Scores of the layers over steps: dark is low and bright is high, each selection divided by its highest score."""
    highest = np.nanmax(np.where(np.isfinite(values), values, -np.inf), axis=1, keepdims=True)
    relative = np.where(highest > 0, values / np.where(highest > 0, highest, 1.0), np.nan)
    if not np.isfinite(relative).any():
        return Markup("")
    grid, left, right = over_steps(steps, relative, end)
    pixels = viridis(np.sqrt(np.clip(np.nan_to_num(grid), 0, 1)))
    pixels[~np.isfinite(grid)] = FROZEN
    known = np.isfinite(relative)
    mean = np.where(known, relative, 0.0).sum(0) / np.maximum(known.sum(0), 1)  # 0 for a layer that never had a score
    top = [str(layer) for layer in np.argsort(-mean)[:3]]
    said = f"{len(grid)} layers at {len(steps)} selections; highest on average: layers {', '.join(top)}"
    return _grid("Layer scores, as a share of the selection's highest", said, pixels, left, right,
                 [("low", "low"), ("high", "high")])  # fmt: skip


def trained(steps: Sequence[int], chosen: np.ndarray, end: int) -> Markup:
    """Which layers trained over steps."""
    grid, left, right = over_steps(steps, chosen, end)
    share = np.nan_to_num(grid)[..., None]
    pixels = (share * np.array(TRAINED) + (1 - share) * np.array(FROZEN)).astype(np.uint8)
    ever = int(chosen.any(0).sum())
    said = f"{ever} of {len(grid)} layers were trained at some time, {chosen.sum(1).mean():.1f} at a time on average"
    return _grid("Layers trained", said, pixels, left, right, [("trained", "on"), ("frozen", "off")])


def learning(steps: Sequence[int], chosen: np.ndarray) -> Markup:
    """How steady selections are: layers at a time, and how many of them the selection before had too."""
    kept = [None, *(int((now & before).sum()) for before, now in itertools.pairwise(chosen))]
    both = [Line("layers", 0, steps, chosen.sum(1).tolist()), Line("of these, kept from the last", 1, steps, kept)]
    return lines("Layers at a time, by selection", both, low=0.0)


def calibration(bins: Sequence[tuple[int, float, float]], error: float) -> Markup:
    """Accuracy by confidence: bars on the diagonal mean that the probabilities can be taken at their word."""
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    place = _scale(0.0, 1.0, 0.0, 1.0)
    parts = [_axes(ticks, ticks, place, "confidence (accuracy upwards)")]
    width = 1 / len(bins)
    for number, (count, sure, good) in enumerate(bins):
        (left, top), (right, bottom) = place(number * width, good), place((number + 1) * width, 0.0)
        text = f"{count} examples with confidence {sure:.2f} on average: {good:.0%} right"
        parts += [Markup('<rect class="bar" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
            f"{left + 1:.1f}", f"{top:.1f}", f"{right - left - 2:.1f}", f"{bottom - top:.1f}", text)
            for _ in range(count > 0)]  # fmt: skip
    (x0, y0), (x1, y1) = place(0, 0), place(1, 1)
    parts.append(Markup('<line class="ideal" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(x0, y0, x1, y1))
    said = f"expected calibration error {error:.3f} over {len(bins)} bins"
    return _figure("Calibration", said, Markup("").join(parts), [("accuracy", "barkey"), ("ideal", "idealkey")])


def _grid(title: str, said: str, pixels: np.ndarray, left: int, right: int, legend: list[tuple[str, str]]) -> Markup:
    """A picture uint8 [layers, columns, 4] between its axes, layer 0 at the bottom."""
    data = io.BytesIO()
    Image.fromarray(pixels[::-1], "RGBA").save(data, "PNG", optimize=True)
    layers = len(pixels)
    place = _scale(left, right, -0.5, layers - 0.5)
    (x0, y0), (x1, y1) = place(left, layers - 0.5), place(right, -0.5)
    picture = Markup('<image x="{}" y="{}" width="{}" height="{}" preserveAspectRatio="none" '
                     'href="data:image/png;base64,{}"/>').format(
        x0, y0, x1 - x0, y1 - y0, base64.b64encode(data.getvalue()).decode())  # fmt: skip
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, layers) if layers <= 10 * s)
    axes = _axes([x for x in _ticks(left, right) if left <= x <= right], list(range(0, layers, step)), place,
                 "optimizer step (layers upwards)", lined=False)  # fmt: skip
    return _figure(title, said, picture + axes, legend)


def _scale(left: float, right: float, low: float, high: float) -> Any:
    """From values to places in the drawing."""
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    across, up = (right - left) or 1.0, (high - low) or 1.0
    return lambda x, y: (LEFT + wide * (x - left) / across, TOP + tall * (1 - (y - low) / up))


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers around [low, high]."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / about))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * number, 10) for number in range(first, max(last, first + 1) + 1)]


def _axes(xs: Sequence[float], ys: Sequence[float], place: Any, label: str, *, lined: bool = True) -> Markup:
    """Lines and numbers along both axes."""
    parts = []
    for y in ys:
        _, at = place(xs[0], y)
        if lined:
            parts.append(Markup('<line class="grid" x1="{}" y1="{y}" x2="{}" y2="{y}"/>').format(
                LEFT, WIDTH - RIGHT, y=f"{at:.1f}"))  # fmt: skip
        number = Markup('<text x="{}" y="{}" text-anchor="end">{}</text>')
        parts.append(number.format(LEFT - 8, f"{at + 4:.1f}", f"{y:g}"))
    for x in xs:
        at, _ = place(x, ys[0])
        parts.append(Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
            f"{at:.1f}", HEIGHT - BOTTOM + 18, f"{x:g}"))  # fmt: skip
    parts.append(Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
        (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, label))  # fmt: skip
    return Markup("").join(parts)


def _figure(title: str, said: str, inside: Markup, legend: Sequence[tuple[str, str]]) -> Markup:
    """A figure with its caption; the drawing is named by the title and described by the sentence."""
    number = next(_numbers)
    keys = Markup("").join(Markup('<span class="key"><i class="{}"></i>{}</span>').format(kind, escape(name))
                           for name, kind in legend)  # fmt: skip
    return Markup(
        '<figure><figcaption><b id="t{n}">{title}</b><span class="said" id="d{n}">{said}</span></figcaption>'
        '<svg viewBox="0 0 {w} {h}" role="img" aria-labelledby="t{n}" aria-describedby="d{n}">{inside}</svg>'
        '<div class="legend">{keys}</div></figure>'
    ).format(n=number, title=title, said=said, w=WIDTH, h=HEIGHT, inside=inside, keys=keys)
