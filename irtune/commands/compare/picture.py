"""compare.png: training loss over time, and dev macro-F1, of every method."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from irtune.commands.compare.report import LINEAR, Row, has_curves
from irtune.commands.compare.runs import Outcome
from irtune.files import replacing
from irtune.tasks import SINGLE_LABEL, Task

WINDOW = 5


def draw(outcomes: Sequence[Outcome], rows: Sequence[Row], file: Path, task: Task = SINGLE_LABEL) -> None:
    """One line of panels per corpus: loss curves on the left, the task's main metric, macro-F1 for labels, with its
    spread over seeds on the right. Of several shares of the training rows: the metric over their number.
    """
    words = task.headline[task.main]
    if has_curves(rows):
        _draw_curves(rows, file, f"dev_{task.main}", words)
        return
    corpora = list(dict.fromkeys(row["data"] for row in rows))
    figure = Figure(figsize=(12, 4 * len(corpora)), layout="constrained")
    for data, (left, right) in zip(corpora, figure.subplots(len(corpora), 2, squeeze=False)):
        here = [row for row in rows if row["data"] == data]
        names = [_name(row["adapter"], row["method"], rows) for row in here if row["method"] != LINEAR]
        colours = dict(zip(names, colormaps["tab10"].colors * 3))  # type: ignore[attr-defined]
        _losses(left, [o for o in outcomes if o.cell.data == data], rows, colours)
        left.set_title(f"{data}: training loss")
        _bars(right, here, rows, colours, f"dev_{task.main}", words)
        right.set_title(f"{data}: dev {words}")
    with replacing(file) as scratch:
        figure.savefig(scratch, dpi=120)


def _draw_curves(rows: Sequence[Row], file: Path, main: str, words: str) -> None:
    """A panel per corpus, a line with error bars per method, the linear baseline dashed."""
    corpora = list(dict.fromkeys(row["data"] for row in rows))
    figure = Figure(figsize=(7 * len(corpora), 5), layout="constrained")
    for data, axes in zip(corpora, figure.subplots(1, len(corpora), squeeze=False)[0]):
        here = [row for row in rows if row["data"] == data and row.get(main) is not None]
        for name in dict.fromkeys(_name(row["adapter"], row["method"], rows) for row in here):
            mine = [row for row in here if _name(row["adapter"], row["method"], rows) == name]
            style = {"color": "black", "linestyle": "--"} if name == LINEAR else {}
            axes.errorbar(
                [row["train_rows"] for row in mine],
                [row[main] for row in mine],
                yerr=[row.get(f"{main}_sd") or 0.0 for row in mine],
                marker="o", markersize=4, capsize=3, linewidth=1.5, label=name, **style,
            )  # fmt: skip
        sizes = sorted({row["train_rows"] for row in here})
        axes.set_xscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("training rows")
        axes.set_ylabel(f"dev {words} (mean and standard deviation over seeds)")
        axes.set_title(data)
        axes.legend(fontsize="small")
    with replacing(file) as scratch:
        figure.savefig(scratch, dpi=120)


def _name(adapter: str, method: str, rows: Sequence[Row]) -> str:
    several = len({row["adapter"] for row in rows if row["adapter"]}) > 1
    return f"{adapter} {method}" if several and adapter else method


def _losses(axes: Axes, outcomes: Sequence[Outcome], rows: Sequence[Row], colours: dict) -> None:
    """One line per method: mean over seeds, then a running mean, since batches of short and long texts differ a lot."""
    for name, colour in colours.items():
        runs = [
            _logged(outcome)
            for outcome in outcomes
            if outcome.results is not None and _name(outcome.cell.adapter, outcome.cell.variant, rows) == name
        ]
        if not runs:
            continue
        length = min(len(run) for run in runs)
        seconds, losses = np.mean([run[:length] for run in runs], axis=0).T
        width = max(1, min(WINDOW, length // 4))
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(seconds[width - 1 :], smooth, color=colour, linewidth=1.5, label=name)
    axes.set_xlabel("training time (seconds, mean over seeds)")
    axes.set_ylabel(f"loss (running mean of up to {WINDOW} log lines)")
    if axes.lines:
        axes.legend(fontsize="small")


def _logged(outcome: Outcome) -> np.ndarray:
    """Seconds since the start and loss of each log line, float64 [lines, 2]."""
    lines = (outcome.cell.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    return np.column_stack([np.cumsum([r["seconds"] for r in records]), [r["loss"] for r in records]])


def _bars(axes: Axes, here: Sequence[Row], rows: Sequence[Row], colours: dict, main: str, words: str) -> None:
    shown = [row for row in here if row["method"] != LINEAR and row.get(main) is not None]
    names = [_name(row["adapter"], row["method"], rows) for row in shown]
    axes.barh(
        names,
        [row[main] for row in shown],
        xerr=[row.get(f"{main}_sd") or 0.0 for row in shown],
        color=[colours[name] for name in names],
    )
    axes.invert_yaxis()
    linear = [row[main] for row in here if row["method"] == LINEAR]
    if linear:
        axes.axvline(linear[0], color="black", linestyle="--", linewidth=1, label=LINEAR)
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.13), frameon=False)
    axes.set_xlabel(f"{words} (mean and standard deviation over seeds)")
