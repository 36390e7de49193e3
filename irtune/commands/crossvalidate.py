"""`python -m irtune crossvalidate`: stratified k-fold training, for corpora too small for one dev split."""

import logging
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from irtune.commands.common import a_path, add_ranks, at_least, parser, show
from irtune.commands.compare.grid import Cell
from irtune.commands.compare.runs import Outcome, check_folders, run_cell
from irtune.config import load_config
from irtune.files import write_json, write_text, writing
from irtune.tasks import task_of

log = logging.getLogger("irtune")


def main(arguments: Sequence[str]) -> int:
    """Train k times, each time with another fold as dev split; write crossvalidate.json and crossvalidate.md."""
    options = parser(
        "crossvalidate",
        "Train K times, each time with another fold of the training (and dev) examples as dev split. Folds "
        "are stratified by label and keep documents (data.group) whole. Options of the trainer hold for all folds; "
        "finished folds are kept, so it can be stopped and continued.",
        "python -m irtune crossvalidate --folds 5 --config launch/recipes/iterater-smollm2.yaml "
        "--data.path corpus/ --data.group doc_id",
        trainer=True,
    )
    options.add_argument("--folds", type=at_least(2), default=5, help="K (default 5)")
    add_ranks(options)
    options.add_argument(
        "--output_dir", type=a_path, default="runs/crossvalidate", help="folder of the runs and the results"
    )
    given, trainer = options.parse_known_args(list(arguments))
    folder = given.output_dir
    cells = []
    for fold in range(1, given.folds + 1):
        place = folder / f"fold_{fold}"
        line = [*trainer, f"--data.fold={fold}/{given.folds}", f"--run.output_dir={place}"]
        config = load_config(line)
        cells.append(Cell("", config.adapter.type, config.tuning.method, fold, place, tuple(line)))
    names = list(task_of(config.data).headline)
    check_folders(cells)
    ranks = given.ranks or max(1, torch.cuda.device_count())
    outcomes = []
    for cell in cells:
        log.info("fold %d of %d", cell.seed, given.folds)
        outcomes.append(run_cell(cell, ranks))
        log.info("  %s", outcomes[-1].error or _brief(outcomes[-1].results, names))
    found = summary(outcomes, names)
    with writing(folder):
        write_json(folder / "crossvalidate.json", found)
        write_text(folder / "crossvalidate.md", _markdown(found))
    show(_markdown(found))
    return 0 if all(outcome.results for outcome in outcomes) else 1


def summary(outcomes: Sequence[Outcome], names: Sequence[str]) -> dict[str, Any]:
    """Mean, standard deviation and values of each dev metric over the folds that finished; errors of the others."""
    good = [(outcome.cell.seed, outcome.results["dev"]) for outcome in outcomes if outcome.results]
    values = {name: {str(fold): dev[name] for fold, dev in good} for name in names}
    return {
        "folds": len(outcomes),
        "metrics": {
            name: {
                "mean": statistics.mean(folds.values()),
                "standard_deviation": statistics.stdev(folds.values()) if len(folds) > 1 else None,
                "folds": folds,
            }
            for name, folds in values.items()
            if folds
        },
        "errors": {str(outcome.cell.seed): outcome.error for outcome in outcomes if outcome.error},
    }


def _brief(results: dict[str, Any] | None, names: Sequence[str]) -> str:
    dev = results["dev"] if results else {}
    return ", ".join(f"{name} {dev[name]:.3f}" for name in names)


def _markdown(found: dict[str, Any]) -> str:
    lines = [f"# Cross-validation, {found['folds']} folds", "", "| metric | mean | standard deviation | folds |",
             "| --- | --- | --- | --- |"]  # fmt: skip
    for name, row in found["metrics"].items():
        deviation = "" if row["standard_deviation"] is None else f"{row['standard_deviation']:.3f}"
        folds = ", ".join(f"{value:.3f}" for value in row["folds"].values())
        lines.append(f"| {name} | {row['mean']:.3f} | {deviation} | {folds} |")
    lines += ["", *(f"- fold {fold} failed: {error}" for fold, error in found["errors"].items())]
    return "\n".join(lines) + "\n"
