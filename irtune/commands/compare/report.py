"""From the outcomes of a comparison to rows, compare.csv and compare.md."""

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from irtune.commands.compare.linear import LinearResult
from irtune.commands.compare.runs import Outcome
from irtune.evaluation.bootstrap import paired_bootstrap
from irtune.files import replacing, write_text
from irtune.tasks import SINGLE_LABEL, Task

LINEAR = "linear baseline"
REFERENCE = "full"
BEFORE = ("data", "adapter", "method", "seeds")
CURVE = ("fraction", "train_rows")  # of learning curves, after the first of those
AFTER = (
    "layers_per_step", "layers_ever", "wall_seconds", "examples_per_second", "optimizer_state_bytes_mean",
    "optimizer_state_bytes_max", "peak_memory_bytes", "macro_f1_minus_full", "low_95", "high_95", "p", "error",
)  # fmt: skip
Row = dict[str, Any]
Place = tuple[str, float | None]  # corpus, and share of its training rows


def columns(task: Task, *, curves: bool = False) -> tuple[str, ...]:
    """Those of compare.csv: between the others, mean and standard deviation of each metric that the task shows."""
    names = [f"{split}_{name}" for split in ("dev", "test") for name in task.headline]
    before = (BEFORE[0], *CURVE, *BEFORE[1:]) if curves else BEFORE
    return (*before, *(column for name in names for column in (name, f"{name}_sd")), *AFTER)


def build_rows(
    outcomes: Sequence[Outcome], linear: dict[Place, list[LinearResult]], task: Task = SINGLE_LABEL
) -> list[Row]:
    """One row per corpus, share of its rows, adapter and method (mean and standard deviation over seeds), the linear
    baseline first.
    """
    rows: list[Row] = []
    for place in dict.fromkeys((outcome.cell.data, outcome.cell.fraction) for outcome in outcomes):
        here = [outcome for outcome in outcomes if (outcome.cell.data, outcome.cell.fraction) == place]
        fits = linear.get(place, [])
        found = [_linear_row(place[0], fits, task)] if fits else []
        for adapter in dict.fromkeys(outcome.cell.adapter for outcome in here):
            group = [outcome for outcome in here if outcome.cell.adapter == adapter]
            full = [outcome for outcome in group if outcome.cell.variant == REFERENCE and outcome.results]
            for variant in dict.fromkeys(outcome.cell.variant for outcome in group):
                mine = [outcome for outcome in group if outcome.cell.variant == variant]
                found.append(_row(place[0], adapter, variant, mine, full, task))
        if place[1] is not None:
            size = round(statistics.mean(fit.rows for fit in fits)) if fits else None
            found = [row | {"fraction": place[1], "train_rows": size} for row in found]
        rows += found
    return rows


def _linear_row(data: str, fits: Sequence[LinearResult], task: Task) -> Row:
    row: Row = {"data": data, "adapter": "", "method": LINEAR, "seeds": len(fits)}
    row["wall_seconds"] = statistics.mean(fit.seconds for fit in fits)
    for split in fits[0].metrics:
        row |= _spread_of(split, [fit.metrics for fit in fits], task)
    return row


def _spread_of(split: str, results: Sequence[dict[str, Any]], task: Task) -> Row:
    """Mean and standard deviation of each metric of a split."""
    row: Row = {}
    for name in task.headline:
        values = [result[split][name] for result in results]
        row[f"{split}_{name}"] = statistics.mean(values)
        row[f"{split}_{name}_sd"] = statistics.stdev(values) if len(values) > 1 else None
    return row


def _row(
    data: str, adapter: str, variant: str, outcomes: Sequence[Outcome], full: Sequence[Outcome], task: Task
) -> Row:
    good = [outcome for outcome in outcomes if outcome.results is not None]
    errors = [f"seed {outcome.cell.seed}: {outcome.error}" for outcome in outcomes if outcome.error]
    row: Row = {"data": data, "adapter": adapter, "method": variant, "seeds": len(good), "error": "; ".join(errors)}
    results = [outcome.results for outcome in good if outcome.results is not None]
    if not results:
        return row
    for split in ("dev", "test"):
        if all(split in result for result in results):
            row |= _spread_of(split, results, task)
    for column, read in {
        "layers_per_step": lambda r: r["layers_trained_per_step"],
        "layers_ever": lambda r: r["layers_ever_trained"],
        "wall_seconds": lambda r: r["wall_seconds"],
        "examples_per_second": lambda r: r["examples_per_second"],
        "optimizer_state_bytes_mean": lambda r: r["optimizer_state_bytes_at_selections"]["mean"],
        "optimizer_state_bytes_max": lambda r: r["optimizer_state_bytes_at_selections"]["max"],
        "peak_memory_bytes": lambda r: r["peak_memory_bytes"],
    }.items():
        row[column] = statistics.mean(read(result) for result in results)
    if variant != REFERENCE and task.least_labels > 1:
        row |= _against(good, full)
    return row


def _against(good: Sequence[Outcome], full: Sequence[Outcome]) -> Row:
    """Paired bootstrap against `full`, over the seeds that both have; on test where there is one, else on dev."""
    pairs = [(a, b) for a in good for b in full if a.cell.seed == b.cell.seed]
    if not pairs:
        return {}
    ours, theirs = ([_predictions(pair[side].cell.folder) for pair in pairs] for side in (0, 1))
    names = list(ours[0][0]["probabilities"])

    def chosen(run: list[dict[str, Any]], key: str) -> np.ndarray:
        """bool [examples, classes]"""
        sets = [record[key] if isinstance(record[key], list) else [record[key]] for record in run]
        return np.array([[name in found for name in names] for found in sets])

    predicted = [[chosen(run, "predicted") for run in side] for side in (ours, theirs)]
    result = paired_bootstrap(chosen(ours[0], "label"), predicted[0], predicted[1], len(names))
    return {"macro_f1_minus_full": result.value, "low_95": result.low, "high_95": result.high, "p": result.p}


def _predictions(folder: Path) -> list[dict[str, Any]]:
    """Predictions of a run by example id, so that no order can mislead."""
    test = folder / "predictions_test.jsonl"
    file = test if test.is_file() else folder / "predictions.jsonl"
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return sorted(records, key=lambda record: record["id"])


def has_curves(rows: Sequence[Row]) -> bool:
    """Whether the rows are of several shares of the training rows."""
    return any("fraction" in row for row in rows)


def write_csv(rows: Sequence[Row], file: Path, task: Task = SINGLE_LABEL) -> None:
    """All columns, units in their names; an empty cell if there is no value."""
    with replacing(file) as scratch, scratch.open("w", newline="", encoding="utf-8") as out:
        names = columns(task, curves=has_curves(rows))
        writer = csv.DictWriter(out, names)
        writer.writeheader()
        writer.writerows({name: row.get(name) for name in names} for row in rows)


def write_markdown(rows: Sequence[Row], file: Path, notes: Sequence[str], task: Task = SINGLE_LABEL) -> None:
    """The table that a person reads, with what it was made of below."""
    has_test = any(f"test_{task.main}" in row for row in rows)
    splits = ("dev", "test") if has_test else ("dev",)
    curves = has_curves(rows)
    header = ["data", *(["training rows"] if curves else []), "adapter", "method", "seeds"]
    header += [f"{split} {name}" for split in splits for name in task.headline.values()]
    header += ["layers per step", "ever", "seconds", "examples/s", "optimizer state (MiB)", "peak memory (MiB)"]
    header += [f"macro-F1 minus full ({splits[-1]})", "p"]
    lines = ["# Comparison", "", _line(header), _line(["---"] * len(header))]
    for row in rows:
        cells = [row["data"], *([str(row["train_rows"])] if curves else []), row["adapter"], row["method"]]
        if row.get("error") and not row["seeds"]:
            error = str(row["error"]).replace("|", "\\|")
            lines.append(_line([*cells, f"failed: {error}"]))
            continue
        cells.append(str(row["seeds"]))
        cells += [_spread(row, f"{split}_{name}") for split in splits for name in task.headline]
        cells += [_number(row, "layers_per_step", ".1f"), _number(row, "layers_ever", ".0f")]
        cells += [_number(row, "wall_seconds", ".0f"), _number(row, "examples_per_second", ".1f")]
        cells += [
            _number(row, "optimizer_state_bytes_mean", ".2f", 2**20),
            _number(row, "peak_memory_bytes", ".0f", 2**20),
        ]
        cells += [_difference(row), _number(row, "p", ".3f")]
        lines.append(_line(cells))
    failed = [f"- {row['data']}, {row['adapter']}, {row['method']}: {row['error']}" for row in rows if row.get("error")]
    if failed:
        lines += ["", "Failed runs:", "", *failed]
    lines += ["", *notes, ""]
    write_text(file, "\n".join(lines))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(row: Row, name: str, form: str, unit: float = 1.0) -> str:
    return f"{row[name] / unit:{form}}" if row.get(name) is not None else ""


def _spread(row: Row, name: str) -> str:
    deviation = row.get(f"{name}_sd")
    return _number(row, name, ".3f") + (f" ± {deviation:.3f}" if deviation is not None else "")


def _difference(row: Row) -> str:
    if row.get("macro_f1_minus_full") is None:
        return ""
    return f"{row['macro_f1_minus_full']:+.3f} [{row['low_95']:+.3f}, {row['high_95']:+.3f}]"
