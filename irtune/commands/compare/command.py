"""`python -m irtune compare`: the runs of a grid one after another, then the table, the numbers and the picture."""

import argparse
import logging
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from irtune.commands.common import a_path, add_ranks, at_least, parser, show
from irtune.commands.compare.grid import Cell, build_grid, parse_corpora, parse_fractions, parse_variants
from irtune.commands.compare.linear import LinearResult, linear_baseline
from irtune.commands.compare.report import Place, build_rows, write_csv, write_markdown
from irtune.commands.compare.runs import Outcome, check_folders, run_cell
from irtune.commands.report import write_page
from irtune.config import load_config
from irtune.data import read_corpus
from irtune.errors import ConfigError
from irtune.files import writing
from irtune.tasks import SINGLE_LABEL, Task, task_of

log = logging.getLogger("irtune")
PACKAGES = ("torch", "deepspeed", "transformers", "peft")


def command_options() -> argparse.ArgumentParser:
    """The command's own options; all others are the trainer's."""
    built = parser(
        "compare",
        "Train every method on every corpus with every seed, and compare. Stop it and start it again as you like: "
        "finished runs are kept. Writes compare.md, compare.csv and compare.png.",
        "python -m irtune compare --config launch/recipes/iterater-smollm2.yaml --methods full,rst,ir "
        "--seeds 3 --budget 6 --data iterater-human=corpus/",
        trainer=True,
    )
    built.add_argument("--methods", required=True, help="for example full,rst,ist,lisa,ir,ir+preset=reference")
    built.add_argument(
        "--seeds", type=at_least(1), default=3, help="runs of each method, with seeds 0, 1, ... (default 3)"
    )
    built.add_argument("--adapters", help="adapter types, for example lora,dora (default: the recipe's)")
    built.add_argument("--data", help="corpora as PATH or PRESET=PATH, comma-separated (default: the recipe's)")
    built.add_argument("--budget", help="layers, or a fraction of them, for every method that can keep a budget")
    built.add_argument(
        "--fractions", help="shares of the training rows, for example 0.05,0.1,0.25,1: learning curves instead of bars"
    )
    add_ranks(built)
    built.add_argument("--output_dir", type=a_path, default="runs/compare", help="folder of the runs and the results")
    return built


def compare(arguments: Sequence[str]) -> int:
    """Run or continue a comparison; returns 0, also when some of its runs failed: they are rows with their errors.

    Raises:
        ConfigError: for every mistake in the options, before the first run.
    """
    options, trainer = command_options().parse_known_args(list(arguments))
    folder = options.output_dir
    fractions: list[float | None] = [None]
    if options.fractions is not None:
        fractions = [*parse_fractions(options.fractions)]
        if any(option.startswith(("--data.train_fraction", "--data.subset_seed")) for option in trainer):
            raise ConfigError("--fractions sets data.train_fraction and data.subset_seed; leave them out")
    cells = build_grid(
        variants=parse_variants(options.methods),
        adapters=options.adapters.split(",") if options.adapters else [None],
        corpora=parse_corpora(options.data),
        seeds=options.seeds,
        budget=options.budget,
        folder=folder,
        arguments=trainer,
        fractions=fractions,
    )
    task = task_of(load_config(cells[0].arguments).data)
    check_folders(cells)
    linear = _linear_baselines(cells)
    ranks = options.ranks or max(1, torch.cuda.device_count())
    outcomes: list[Outcome] = []
    for number, cell in enumerate(cells, 1):
        log.info("run %d of %d: %s", number, len(cells), cell.title)
        outcomes.append(run_cell(cell, ranks))
        log.info("  %s", _brief(outcomes[-1], task))
        write_report(outcomes, linear, folder, _notes(arguments, ranks), task)  # also when it is stopped half-way
    finished = [outcome.cell.folder for outcome in outcomes if outcome.results is not None]
    if finished:
        write_page(finished, folder / "report.html")
        link = "Every run, with curves, layers and mistakes: [report.html](report.html)"
        write_report(outcomes, linear, folder, [*_notes(arguments, ranks), link, ""], task)
    show((folder / "compare.md").read_text(encoding="utf-8"))
    return 0


def _linear_baselines(cells: Sequence[Cell]) -> dict[Place, list[LinearResult]]:
    """One fit for each corpus; for a share of its rows, one for each seed, which draws others."""
    found: dict[Place, list[LinearResult]] = {}
    seen = set()
    for cell in cells:
        data, seed = load_config(cell.arguments).data, None if cell.fraction in (None, 1) else cell.seed
        if (cell.data, cell.fraction, seed) in seen:
            continue
        seen.add((cell.data, cell.fraction, seed))
        share = "" if cell.fraction is None else f", {cell.fraction:g} of the training rows"
        log.info("linear baseline on %s%s", cell.data, share)
        found.setdefault((cell.data, cell.fraction), []).append(linear_baseline(read_corpus(data)))
    return found


def _brief(outcome: Outcome, task: Task) -> str:
    if outcome.results is None:
        return f"failed: {outcome.error}"
    dev = outcome.results["dev"]
    shown = ", ".join(f"{words} {dev[name]:.3f}" for name, words in task.headline.items())
    layers, seconds = outcome.results["layers_trained_per_step"], outcome.results["wall_seconds"]
    return f"dev {shown}, {layers:.1f} layers per step, {seconds:.0f} s"


def write_report(
    outcomes: list[Outcome],
    linear: dict[Place, list[LinearResult]],
    folder: Path,
    notes: list[str],
    task: Task = SINGLE_LABEL,
) -> None:
    """Write compare.md, compare.csv and compare.png from what is known so far."""
    # Drawing needs matplotlib, which takes a second to load.
    from irtune.commands.compare.picture import draw

    rows = build_rows(outcomes, linear, task)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(rows, folder / "compare.csv", task)
        whole = {data: fits[0] for (data, _), fits in linear.items()}  # of several shares, the largest
        settings = [f"Linear baseline on {data}: {result.setting}" for data, result in whole.items()]
        write_markdown(rows, folder / "compare.md", [*notes, *settings], task)
        draw(outcomes, rows, folder / "compare.png", task)


def _notes(arguments: Sequence[str], ranks: int) -> list[str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    return [
        f"Command: `python -m irtune compare {shlex.join(arguments)}`",
        "",
        f"{ranks} rank(s) on {device}; Python {platform.python_version()} on {sys.platform}; {versions}. "
        "Macro-F1 minus full: paired bootstrap over examples, 10,000 resamples, 95 % interval and two-sided p.",
        "",
    ]
