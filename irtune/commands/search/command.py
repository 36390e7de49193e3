"""`python -m irtune search`: propose, train, note; then the report."""

import importlib.util
import json
import logging
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from irtune.commands.common import a_path, add_ranks, at_least, parser, show
from irtune.commands.compare.grid import Cell
from irtune.commands.compare.runs import check_folders, run_cell
from irtune.commands.report import write_page
from irtune.commands.search.report import write_csv, write_markdown
from irtune.commands.search.trials import STARTUP, Trial, first_values, front, of_search, options, propose
from irtune.config import Config, load_config
from irtune.config.search_space import Space, read_space
from irtune.config.yaml_file import read_recipe
from irtune.data import read_corpus
from irtune.errors import ConfigError, RunError
from irtune.files import read_object, to_json, write_json, writing

log = logging.getLogger("irtune")
RECORD = "search.json"
MOST_BYTES = 2**26
# What --minimize names -> its place in results.json, and its words.
COSTS = {
    "parameters": ("trained_parameters_per_step", "trained parameters per step"),
    "seconds": ("wall_seconds", "seconds"),
}


def search(arguments: Sequence[str]) -> int:
    """Run or continue a search; returns 0 where at least one trial finished.

    Raises:
        ConfigError: for every mistake in recipe, ranges and options, before the first trial.
    """
    built = parser(
        "search",
        "Try settings in the ranges of the recipe's section `search`, for the best dev metric (run.best_metric) and "
        "the least cost at once, and as many settings at random to compare with. Stop it and start it again as you "
        "like: finished trials are kept. The test split is never evaluated. Writes search.md, search.csv, search.png "
        "and report.html with the best runs.",
        "python -m irtune search --config launch/recipes/search-autopeft.yaml --trials 40 --data.path corpus/ "
        "--data.train_fraction 0.1",
        trainer=True,
    )
    built.add_argument("--config", required=True, help="recipe with a section search: KEY: RANGE")
    built.add_argument(
        "--trials", required=True, type=at_least(1), help=f"of the search; random search adds all but {STARTUP} of them"
    )
    built.add_argument("--minimize", choices=tuple(COSTS), default="parameters", help="the cost (default parameters)")
    built.add_argument("--skip_random", action="store_true", help="no random search to compare with")
    add_ranks(built)
    built.add_argument("--output_dir", type=a_path, default="runs/search", help="folder of the runs and the results")
    given, rest = built.parse_known_args(list(arguments))
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("search needs optuna: pip install 'irtune[search]'")
    space, config = _checked(given.config, rest)
    folder, ranks = given.output_dir, given.ranks or max(1, torch.cuda.device_count())
    read_corpus(config.data)  # refuses one without a dev split, before anything is trained
    sign = -1 if config.run.best_metric == "loss" else 1
    command = f"python -m irtune search {shlex.join(arguments)}"
    record = _Record(folder, _identity(given, rest))
    trials = record.trials
    wanted = [(number, True) for number in range(given.trials)]
    wanted += [] if given.skip_random else [(number, False) for number in range(STARTUP, given.trials)]
    for number, in_search in wanted:
        guided = in_search and number >= STARTUP
        trial = next((trial for trial in trials if (trial.number, trial.guided) == (number, guided)), None)
        if trial is None:
            before = [trial for trial in of_search(trials) if trial.number < number]
            trial = propose(space, before, number, guided=guided, seed=config.run.seed, sign=sign)
            trials.append(trial)
            record.save()
        if not trial.done:
            log.info("%s of %d: %s", trial.run, given.trials, " ".join(options(trial.values)))
            _run(trial, trials, ["--config", given.config, *rest], folder, ranks, given.minimize)
            record.save()
            _report(trials, folder, command, config.run.best_metric, given.minimize)  # also when it is stopped half-way
        said = trial.error or f"dev {config.run.best_metric} {trial.metric:.3f}, {given.minimize} {trial.cost:,.0f}"
        log.info("  %s", said)
    _report(trials, folder, command, config.run.best_metric, given.minimize, pictures=True)
    show((folder / "search.md").read_text(encoding="utf-8"))
    return 0 if any(trial.metric is not None for trial in trials) else 1


def _checked(file: str, rest: list[str]) -> tuple[Space, Config]:
    """The ranges, and the configuration with a value in range for each of them."""
    problems: list[str] = []
    space = read_space(file, problems)
    try:
        config = load_config(["--config", file, *rest, *options(first_values(space))])
    except ConfigError as error:
        problems += [problem for problem in error.problems if problem not in problems]
    overridden = sorted({option.partition("=")[0].removeprefix("--") for option in rest} & set(space))
    problems += [f"--{key} sets a key that {file!r} searches; remove one of the two" for key in overridden]
    if problems:
        raise ConfigError(problems)
    return space, config


def _identity(given: Any, rest: list[str]) -> dict[str, Any]:
    """What a search must have in common with the one that it goes on with."""
    content = json.loads(to_json(read_recipe(given.config, []), other=str))
    return {"recipe": content, "options": rest, "minimize": given.minimize}


class _Record:
    """The trials of a folder so far, as its search.json has them."""

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.file, self.identity, self.trials = folder / RECORD, identity, list[Trial]()
        if self.file.is_file():
            found = read_object(self.file, MOST_BYTES, RunError)
            other = [name for name, value in identity.items() if found.get(name) != value]
            if other:
                raise ConfigError(f"{folder} holds a search with other {' and '.join(other)}; choose another "
                                  "--output_dir")  # fmt: skip
            self.trials = [Trial(**trial) for trial in found["trials"]]

    def save(self) -> None:
        """Write search.json."""
        with writing(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, self.identity | {"trials": [asdict(trial) for trial in self.trials]})


def _run(trial: Trial, trials: Sequence[Trial], line: list[str], folder: Path, ranks: int, cost: str) -> None:
    """Give `trial` its outcome: that of an earlier one with the same values, or of a run of its own."""
    same = next((other for other in trials if other.done and other.values == trial.values), None)
    if same is not None:
        trial.run, trial.metric, trial.cost, trial.error = same.run, same.metric, same.cost, same.error
        return
    place = folder / trial.run
    line = [*line, *options(trial.values), "--run.evaluate_test=false", f"--run.output_dir={place}"]
    try:
        config = load_config(line)
    except ConfigError as error:  # values that contradict each other
        trial.error = "; ".join(error.problems)
        return
    cell = Cell("", config.adapter.type, config.tuning.method, config.run.seed, place, tuple(line))
    check_folders([cell])
    outcome = run_cell(cell, ranks)
    if outcome.results is None:
        trial.error = outcome.error
        return
    metric = outcome.results["dev"][config.run.best_metric]
    if metric is None or not math.isfinite(metric):
        trial.error = f"dev {config.run.best_metric} is not a number"
        return
    trial.metric, trial.cost = metric, outcome.results[COSTS[cost][0]]


def _report(
    trials: Sequence[Trial], folder: Path, command: str, metric: str, minimize: str, *, pictures: bool = False
) -> None:
    """Write search.md and search.csv; with `pictures`, search.png and report.html too."""
    words: dict[str, Any] = {"metric": metric, "cost": COSTS[minimize][1], "sign": -1 if metric == "loss" else 1}
    best = list(dict.fromkeys(folder / trial.run for trial in front(trials, words["sign"])))
    notes = [f"Command: `{command}`"]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if pictures:
            # Drawing needs matplotlib, which takes a second to load.
            from irtune.commands.search.picture import draw

            draw(trials, folder / "search.png", **words)
        if pictures and best:
            write_page(best, folder / "report.html")
            runs = " ".join(shlex.quote(str(run)) for run in best)
            notes += [
                "",
                "The runs of the front, with curves, layers and mistakes: [report.html](report.html), which "
                f"`python -m irtune report --run {runs}` makes.",
            ]
        write_csv(trials, folder / "search.csv", **words)
        write_markdown(trials, folder / "search.md", notes, **words)
