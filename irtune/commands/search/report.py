"""search.csv and search.md: every trial, the front, and the search beside random search."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from irtune.commands.search.trials import STARTUP, Trial, front, hypervolume, side_by_side
from irtune.files import replacing, write_text

SAMPLER = "optuna's multi-objective tree-structured Parzen estimator"


def write_csv(trials: Sequence[Trial], file: Path, *, metric: str, cost: str, sign: int) -> None:
    """A row for each trial, in the order in which they ran."""
    best = [id(trial) for trial in front(trials, sign)]
    keys = list(trials[0].values) if trials else []
    with replacing(file) as scratch, scratch.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["trial", "search", *keys, f"dev_{metric}", cost, "front", "run", "error"])
        for trial in trials:
            kind = "both" if trial.shared else "guided" if trial.guided else "random"
            values = [_plain(value) for value in trial.values.values()]
            writer.writerow([trial.number, kind, *values, trial.metric, trial.cost, int(id(trial) in best), trial.run,
                             trial.error])  # fmt: skip


def write_markdown(
    trials: Sequence[Trial], file: Path, notes: Sequence[str], *, metric: str, cost: str, sign: int
) -> None:
    """The two searches, the front, what failed, and `notes`."""
    lines = ["# Search", "", _line(["", "trials", "failed", f"best dev {metric}", cost, "area"]), _line(["---"] * 6)]
    corner, spans = _box(trials, sign)
    for name, mine in side_by_side(trials).items():
        failed = sum(trial.error is not None for trial in mine)
        best = max((t for t in mine if t.metric is not None), key=lambda t: sign * t.metric, default=None)
        cells = [f"{best.metric:.3f}", f"{best.cost:,.0f}"] if best is not None else ["", ""]
        area = hypervolume([_point(trial, corner, spans, sign) for trial in front(mine, sign)], (0.0, 0.0))
        lines.append(_line([name, str(len(mine)), str(failed), *cells, f"{area:.3f}"]))
    lines += ["", "What no other trial beats in both, the cheapest first:", ""]
    lines += [_line([f"dev {metric}", cost, "settings", "run"]), _line(["---"] * 4)]
    for trial in front(trials, sign):
        values = " ".join(f"`{key}: {_plain(value)}`" for key, value in trial.values.items())
        lines.append(_line([f"{trial.metric:.3f}", f"{trial.cost:,.0f}", values.replace("|", "\\|"), trial.run]))
    failed_ones = [f"- {trial.run}: {trial.error}" for trial in trials if trial.error is not None]
    if failed_ones:
        lines += ["", "Failed trials:", "", *failed_ones]
    about = (
        f"search: {STARTUP} trials at random, then {SAMPLER}. random search: as many trials, of which it shares those "
        f"{STARTUP}. area: the share of the box between the worst and the best dev {metric} and {cost} of all trials "
        "that the front covers (hypervolume). The test split was not evaluated; the best of many dev values is too "
        "good, so evaluate the setting that you choose on test, once."
    )
    write_text(file, "\n".join([*lines, "", about, "", *notes, ""]))


def _box(trials: Sequence[Trial], sign: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """The worst values of all trials, more being better, and how far the best are from them."""
    points = [(-t.cost, sign * t.metric) for t in trials if t.metric is not None]
    if not points:
        return (0.0, 0.0), (1.0, 1.0)
    sides = list(zip(*points))
    corner = (min(sides[0]), min(sides[1]))
    return corner, (max(sides[0]) - corner[0] or 1.0, max(sides[1]) - corner[1] or 1.0)


def _point(trial: Trial, corner: tuple[float, float], spans: tuple[float, float], sign: int) -> tuple[float, float]:
    """Cost and metric of a trial as shares of the box."""
    return (-trial.cost - corner[0]) / spans[0], (sign * trial.metric - corner[1]) / spans[1]


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
