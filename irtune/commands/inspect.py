"""`python -m irtune inspect`: which layers a run trained, with what scores and state. Unfinished runs too."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from irtune.commands.common import a_path, add_json, parser, show, show_json, table
from irtune.errors import RunError, brief
from irtune.files import read_object, replacing, writing
from irtune.tracking.pictures import arrays, rgb, row, score_map, trained_map

BAR = 24
MAX_LAYERS = 10_000
MAX_RESULTS = 2**26  # bytes of results.json


def main(arguments: Sequence[str]) -> int:
    """Print a table of layers and write layers.png, or print JSON."""
    options = parser(
        "inspect",
        "Layers of a run, finished or not: share of steps in which each trained, its last score, whether it trains. "
        "Writes layers.png into the run folder.",
        "python -m irtune inspect --run runs/mine",
    )
    options.add_argument("--run", required=True, type=a_path, help="folder of a run")
    add_json(options)
    given = options.parse_args(list(arguments))
    folder = given.run
    found = inspect(folder)
    if given.json:
        show_json(found)
        return 0
    target = folder / "layers.png"
    with writing(target), replacing(target) as scratch:
        Image.fromarray(picture(read_selections(folder), found["steps"])).save(scratch)
    show(_text(found, folder))
    return 0


def read_selections(folder: Path) -> list[dict[str, Any]]:
    """The records of selection.jsonl.

    Raises:
        RunError: when there is none, or no selection in it.
    """
    file = folder / "selection.jsonl"
    if not file.is_file():
        raise RunError(
            f"{folder} is not a run folder: it has no selection.jsonl; accepted: the run.output_dir of a run"
        )
    records = read_records(file)
    if not records:
        raise RunError(f"the run in {folder} has not selected any layers yet")
    layers = records[0].get("num_layers")
    if not isinstance(layers, int) or not 1 <= layers <= MAX_LAYERS:
        raise RunError(f"{file}, line 1: num_layers is {brief(layers)}; accepted: 1 to {MAX_LAYERS}")
    for number, record in enumerate(records, 1):
        scores, selected = record.get("scores") or [None] * layers, record.get("selected")
        chosen = isinstance(selected, list) and all(isinstance(i, int) and 0 <= i < layers for i in selected)
        scored = isinstance(scores, list) and all(isinstance(s, int | float | None) for s in scores)
        if not (chosen and scored and len(scores) == layers and record.get("num_layers") == layers):
            raise RunError(f"{file}, line {number} is damaged: it is not a selection among {layers} layers")
    return records


def read_results(file: Path) -> dict[str, Any]:
    """The content of results.json; nothing where there is none yet."""
    found = read_object(file, MAX_RESULTS, RunError) if file.is_file() else {}
    if found and not isinstance(found.get("steps"), int):
        raise RunError(f"{file} is damaged: it has no steps")
    return found


def read_records(file: Path) -> list[dict[str, Any]]:
    """Objects with a step of a file of JSON lines. The last line may be cut, since a run may be writing it.

    Raises:
        RunError: naming the first line that is damaged.
    """
    records = []
    lines = file.read_bytes().decode("utf-8", "replace").rstrip("\n").split("\n") if file.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif number < len(lines):
            raise RunError(f"{file}, line {number} is damaged: it is not a record of irtune")
    return records


def picture(records: Sequence[dict[str, Any]], steps: int) -> np.ndarray:
    """Scores (where there are any) above trained layers, over steps: uint8 [height, width, 3]."""
    places, scores, trained = arrays([row(record) for record in records])
    parts = [score_map(places, scores, steps)] if np.isfinite(scores).any() else []
    return np.concatenate([rgb(figure) for figure in [*parts, trained_map(places, trained, steps)]])


def inspect(folder: Path) -> dict[str, Any]:
    """Layers, selections and optimizer state of a run, in plain JSON types."""
    records = read_selections(folder)
    results = read_results(folder / "results.json")
    logged = read_records(folder / "metrics.jsonl")
    steps = results["steps"] if results else max((r["step"] for r in logged), default=records[-1]["step"])
    memory = [record for record in logged if record.get("kind") == "memory"]
    trained = [0] * records[0]["num_layers"]
    for record, after in zip(records, [*(r["step"] for r in records[1:]), steps]):
        for layer in record["selected"]:
            trained[layer] += after - record["step"]
    scored = next((record["scores"] for record in reversed(records) if record["scores"]), [None] * len(trained))
    return {
        "finished": bool(results),
        "steps": steps,
        "selections": len(records),
        "changes": sum(bool(record.get("changed")) for record in records),
        "selected": records[-1]["selected"],
        "optimizer_state_bytes": memory[-1].get("optimizer_state_bytes") if memory else None,
        "parked_state_bytes": memory[-1].get("parked_state_bytes") if memory else None,
        "layers": [
            {"layer": i, "steps": count, "share": count / steps if steps else 0.0, "last_score": score}
            for i, (count, score) in enumerate(zip(trained, scored))
        ],
    }


def _text(found: dict[str, Any], folder: Path) -> str:
    rows = [
        [
            str(row["layer"]) + (" *" if row["layer"] in found["selected"] else ""),
            str(row["steps"]),
            f"{row['share']:.0%}",
            "" if row["last_score"] is None else f"{row['last_score']:.3g}",
        ]
        for row in found["layers"]
    ]
    lines = table(["layer", "steps", "share", "last score"], rows).split("\n")
    bars = ["", *("#" * round(BAR * row["share"]) for row in found["layers"])]
    width = max(map(len, lines))
    state = found["optimizer_state_bytes"]
    bytes_said = (
        "" if state is None else f"optimizer state {state:,} bytes, parked {found['parked_state_bytes'] or 0:,} bytes\n"
    )
    return (
        f"{folder}: {'finished' if found['finished'] else 'not finished'}, {found['steps']} steps, "
        f"{found['selections']} selections, {found['changes']} of them changed the layers\n{bytes_said}"
        + "\n".join(f"{line.ljust(width)}  {bar}".rstrip() for line, bar in zip(lines, bars))
        + f"\n* trains at the end; picture: {folder / 'layers.png'}"
    )
