"""Write the page: read the runs, fill in the template, check the size."""

import time
import webbrowser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from irtune import __version__
from irtune.commands.common import a_path, parser, show
from irtune.commands.report import charts
from irtune.commands.report.read import MAIN, METRICS, RunData, read_run_data
from irtune.files import write_text, writing

COLOURS = 8  # of runs in one chart, as the page's style has them; further ones repeat


def main(arguments: Sequence[str]) -> int:
    """Write report.html."""
    options = parser(
        "report",
        "One HTML page, which needs no network, about a run or several side by side: what was trained on what, curves, "
        "layers and their scores, classes, calibration, worst mistakes with the edit marked, and cost. Unfinished runs "
        "too.",
        "python -m irtune report --run runs/mine --open",
    )
    options.add_argument("--run", required=True, nargs="+", type=a_path, help="folders of runs")
    options.add_argument("--output", type=a_path, help="the page (default: report.html in the first run's folder)")
    options.add_argument("--open", action="store_true", help="show it in the browser")
    given = options.parse_args(list(arguments))
    target = given.output or given.run[0] / "report.html"
    write_page(given.run, target)
    show(f"written to {target}")
    if given.open and not webbrowser.open(target.resolve().as_uri()):
        show("there is no browser to open it with")
    return 0


def write_page(folders: Sequence[Path], target: Path) -> None:
    """Write the page of the runs in `folders` to `target`.

    Raises:
        RunError: for a folder that holds no run.
    """
    runs = [replace(read_run_data(folder), name=name) for folder, name in zip(folders, _names(folders))]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, undefined=StrictUndefined)  # fmt: skip
    page = environment.get_template("page.html").render(
        runs=[_section(run, number % COLOURS) for number, run in enumerate(runs)],
        overview=_overview(runs),
        curves=_curves(runs),
        version=__version__,
        written=time.strftime("%Y-%m-%d %H:%M"),
    )
    with writing(target):
        write_text(target, page)


def _names(folders: Sequence[Path]) -> list[str]:
    """As many of the last parts of each folder as it takes to tell them apart: ir/seed_0 and full/seed_0."""
    parts = [folder.resolve().parts[1:] for folder in folders]
    for last in range(1, max(map(len, parts))):
        names = ["/".join(path[-last:]) for path in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return ["/".join(path) for path in parts]


def _overview(runs: Sequence[RunData]) -> list[tuple[str, list[str], set[int]]]:
    """Rows of the first table: what, its value for each run, and the places of the best ones where there are such."""
    rows: list[tuple[str, list[str], set[int]]] = []
    for split in ("dev", "test"):
        for name, title in METRICS.items():
            values = [run.results.get(split, {}).get(name) for run in runs]
            known = [value for value in values if value is not None]
            if known:
                several = len(set(known)) > 1 and not name.endswith("_error")
                best = {place for place, value in enumerate(values) if several and value == max(known)}
                rows.append((f"{split} {title}", ["-" if v is None else f"{v:.3f}" for v in values], best))
    for title in runs[0].facts:
        rows.append((title, [run.facts[title] for run in runs], set()))
    return rows


def _curves(runs: Sequence[RunData]) -> list[Any]:
    """Charts that have a line for each run."""

    def of_each(part: str, column: str) -> list[charts.Line]:
        tables = [getattr(run, part) for run in runs]
        return [charts.Line(run.name, number % COLOURS, table["step"], table[column])
                for number, (run, table) in enumerate(zip(runs, tables))]  # fmt: skip

    drawn = [
        charts.lines("Training loss", of_each("train", "loss")),
        *(charts.lines(f"dev {METRICS[name]}", of_each("dev", name), low=0.0, high=1.0) for name in MAIN),
        charts.lines("dev loss", of_each("dev", "loss")),
        charts.lines("Speed (tokens per second)", of_each("train", "tokens_per_second"), low=0.0),
    ]
    return [chart for chart in drawn if chart]


def _section(run: RunData, colour: int) -> dict[str, Any]:
    """What the template needs of one run."""
    selections = run.selections
    layers: list[Any] = []
    if selections is not None:
        steps, scores, trained = selections
        layers = [charts.scores(steps, scores, run.steps), charts.trained(steps, trained, run.steps),
                  charts.learning(steps, trained)]  # fmt: skip
    return {
        "run": run,
        "colour": colour,
        "layers": [chart for chart in layers if chart],
        "calibration": charts.calibration(run.bins, run.calibration_error) if run.bins else "",
    }
