"""What the page says of a run, from the files in its folder. Whatever an unfinished run lacks is left out."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from irtune.commands.inspect import read_records, read_results, read_selections
from irtune.config import load_config
from irtune.config.yaml_file import read_recipe
from irtune.data import Example, read_corpus
from irtune.data.diff import diff
from irtune.data.readers.hub import hub_from_cache
from irtune.errors import IrtuneError, RunError
from irtune.redaction import without_secrets
from irtune.tracking.pictures import arrays, row

# In the order of their rows; a run has those of its task.
METRICS = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "auprc": "AUPRC",
    "jaccard": "Jaccard index",
    "pearson": "Pearson's r",
    "spearman": "Spearman's rho",
    "mean_absolute_error": "mean absolute error",
}
MAIN = ("macro_f1", "pearson")
MISTAKES, BINS, LONGEST = 12, 10, 700
Selections = tuple[list[int], np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class RunData:
    """A run. train, dev: columns of metrics.jsonl by name. bins: examples, mean confidence and accuracy of each."""

    name: str
    folder: Path
    finished: bool
    steps: int
    results: dict[str, Any]
    facts: dict[str, str]
    settings: dict[str, Any]
    train: dict[str, list[Any]]
    dev: dict[str, list[Any]]
    selections: Selections | None
    bins: list[tuple[int, float, float]]
    calibration_error: float
    mistakes: list[dict[str, Any]]
    notes: list[str]


def read_run_data(folder: Path) -> RunData:
    """Read the run in `folder`.

    Raises:
        RunError: when it holds none, or a damaged file.
    """
    if not (folder / "config.yaml").is_file():
        raise RunError(f"{folder} is not a run folder: it has no config.yaml; accepted: the run.output_dir of a run")
    problems: list[str] = []
    settings = without_secrets(read_recipe(str(folder / "config.yaml"), problems))
    if problems or not all(isinstance(settings.get(name), dict) for name in ("model", "data", "tuning", "optim")):
        raise RunError(problems[0] if problems else f"{folder / 'config.yaml'} is damaged: it lacks sections")
    results, logged = read_results(folder / "results.json"), read_records(folder / "metrics.jsonl")
    steps = results.get("steps") or max((record["step"] for record in logged), default=0)
    notes = [] if results else [f"not finished: it has reached step {steps}; what is here is what it has written"]
    predictions = _predictions(folder / "predictions.jsonl", "confusion_matrix" in results.get("dev", {}))
    bins, error = _calibration(predictions)
    mistakes, note = _mistakes(folder, predictions)
    dev = [record for record in logged if record.get("kind") == "eval" and record.get("split") == "dev"]
    if not results and dev:
        results = {"dev": dev[-1]}
    try:
        selections = arrays([row(record) for record in read_selections(folder)])
    except RunError as missing:
        selections = None
        notes.append(str(missing))
    return RunData(
        name=folder.resolve().name, folder=folder, finished="steps" in results, steps=steps, results=results,
        facts=_facts(settings, results, steps), settings=settings, dev=_columns(dev, ("step", "loss", *MAIN)),
        train=_columns([r for r in logged if r.get("kind") == "train"], ("step", "loss", "tokens_per_second")),
        selections=selections, bins=bins, calibration_error=error, mistakes=mistakes, notes=notes + note,
    )  # fmt: skip


def _columns(records: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, list[Any]]:
    return {name: [record.get(name) for record in records] for name in names}


def _facts(settings: dict[str, Any], results: dict[str, Any], steps: int) -> dict[str, str]:
    """What was trained on what, and what it cost: the same rows for every run."""
    model, data, tuning, optim = (settings[name] for name in ("model", "data", "tuning", "optim"))
    adapter, base = settings.get("adapter", {}), model.get("quantization", "none")

    def number(name: str, form: str, unit: float = 1.0, after: str = "") -> str:
        value = results.get(name)
        return "-" if value is None else f"{value / unit:{form}}{after}"

    per_step, layers = results.get("layers_trained_per_step"), results.get("num_layers")
    length = f"of {optim['max_steps']}" if optim.get("max_steps") else f"(epochs: {optim.get('epochs'):g})"
    return {
        "model": Path(str(model.get("name_or_path"))).name,
        "corpus": str(data.get("path") or data.get("train")),
        "format": f"{model.get('dtype')}" + (f", base in {base}" if base != "none" else ""),
        "prompt, pooling": f"{data.get('prompt')}, {model.get('pooling', 'class')}",
        "adapter": f"{adapter.get('type')}, r {adapter.get('r')}",
        "method": str(tuning.get("method")),
        "learning rate, loss": f"{optim.get('lr')}, {optim.get('loss')}",
        "seed": str(settings.get("run", {}).get("seed")),
        "steps": f"{steps} {length}",
        "layers per step": f"{per_step:.1f} of {layers}" if per_step is not None else "-",
        "training time": number("training_seconds", ",.0f", after=" s"),
        "whole time": number("wall_seconds", ",.0f", after=" s"),
        "examples per second": number("examples_per_second", ".1f"),
        "ranks, ZeRO stage": f"{results.get('world_size', '-')}, {results.get('zero_stage', '-')}",
        "peak memory per rank": number("peak_memory_bytes", ",.0f", 2**20, " MiB"),
        "planned memory per rank": number("planned_memory_bytes", ",.0f", 2**20, " MiB"),
        "optimizer state at the end": number("optimizer_state_bytes", ",.2f", 2**20, " MiB"),
    }


def _predictions(file: Path, single: bool) -> list[dict[str, Any]]:
    """Records of predictions.jsonl, each with `confidence`, the probability of what was predicted.

    None where an example has other than a `single` label: calibration and mistakes are about one.
    """
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if single and file.is_file() else []
    try:
        records = [json.loads(line) for line in lines]
        return [record | {"confidence": record["probabilities"][record["predicted"]]} for record in records]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file} is damaged: it does not hold predictions of irtune") from error


def _calibration(predictions: list[dict[str, Any]]) -> tuple[list[tuple[int, float, float]], float]:
    """Bins of equal width with what is in them, and the expected calibration error over them (Guo et al., 2017)."""
    if not predictions:
        return [], 0.0
    confidence = np.array([record["confidence"] for record in predictions])
    right = np.array([record["label"] == record["predicted"] for record in predictions])
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = []
    for number in range(BINS):
        inside = place == number
        count = int(inside.sum())
        bins.append((count, float(confidence[inside].mean()), float(right[inside].mean())) if count else (0, 0.0, 0.0))
    return bins, sum(count * abs(sure - good) for count, sure, good in bins) / len(predictions)


def _mistakes(folder: Path, predictions: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The most confident mistakes on dev, with their texts where the corpus is at hand."""
    wrong = sorted((r for r in predictions if r["label"] != r["predicted"]), key=lambda r: -r["confidence"])[:MISTAKES]
    if not wrong:
        return [], []
    examples: dict[str, Example] = {}
    note = []
    try:
        data = load_config(["--config", str(folder / "config.yaml")]).data
        with hub_from_cache():
            examples = {example.id: example for example in read_corpus(data).splits["dev"]}
    except IrtuneError as error:
        note = [f"mistakes are without their texts, since the corpus cannot be read: {error}"]
    return [
        {"id": r["id"], "label": r["label"], "predicted": r["predicted"], "confidence": r["confidence"],
         "pieces": _pieces(examples[r["id"]]) if r["id"] in examples else []}
        for r in wrong
    ], note  # fmt: skip


def _pieces(example: Example) -> list[tuple[str, str]]:
    """Kind (=, - or +, as in a diff) and text of each piece, cut after `LONGEST` characters."""
    if example.after is None:
        return [("=", example.before[:LONGEST])]
    pieces: list[tuple[str, str]] = []
    left = LONGEST
    for piece in diff(example.before, example.after):
        if left <= 0:
            return [*pieces, ("=", "…")]
        pieces.append((piece.kind, piece.text[:left]))
        left -= len(piece.text)
    return pieces
