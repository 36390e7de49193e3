"""search.png: the trials of the search and of the random search, and the front of each."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from irtune.commands.search.trials import Trial, front, side_by_side
from irtune.files import replacing


def draw(trials: Sequence[Trial], file: Path, *, metric: str, cost: str, sign: int) -> None:
    """Dev metric over cost, on a logarithmic scale."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    style = {"search": ("tab:blue", "o"), "random search": ("tab:orange", "x")}
    for name, mine in side_by_side(trials).items():
        colour, marker = style[name]
        done = [trial for trial in mine if trial.metric is not None]
        best = front(mine, sign)
        axes.scatter([t.cost for t in done], [t.metric for t in done], color=colour, marker=marker, label=name)
        axes.step([t.cost for t in best], [t.metric for t in best], color=colour, where="post", linewidth=1.5)
    if any(trial.metric is not None for trial in trials):
        axes.set_xscale("log")
        axes.legend()
    axes.set_xlabel(cost)
    axes.set_ylabel(f"dev {metric}")
    axes.set_title("Trials, and the best metric for each cost")
    with replacing(file) as scratch:
        figure.savefig(scratch, dpi=120)
