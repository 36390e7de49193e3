"""`python -m irtune pseudo`: labels for unlabelled texts by the vote of finished runs, to train another run on."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from irtune.commands.common import a_path, a_share, add_trust, at_least, check_single, parser, ranks, trusted
from irtune.commands.predict import TEXTS, to_examples
from irtune.data import check_apart, read_corpus, read_table
from irtune.distributed import runtime
from irtune.errors import ConfigError, DataError
from irtune.evaluation.ensemble import open_runs
from irtune.evaluation.saved_run import read_run
from irtune.files import to_json, write_text, writing


def main(arguments: Sequence[str]) -> int:
    """Predict with all runs, keep what they agree on with confidence, and write it as rows for data.pseudo."""
    options = parser(
        "pseudo",
        "Label texts with the mean probabilities of several runs (other prompts, seeds or adapters), as MPT does, and "
        "keep those whose label is probable enough. The output has the texts, the label and its probability "
        "(confidence); train on it with --data.pseudo FILE. Texts of the runs' dev or test splits are refused.",
        "python -m irtune pseudo --runs runs/a,runs/b --unlabelled new.csv --per-class 100 --output pseudo.jsonl",
    )
    options.add_argument("--runs", required=True, type=_paths, help="folders of finished runs, comma-separated")
    options.add_argument("--unlabelled", required=True, type=a_path, help="file with the text columns of the runs")
    options.add_argument("--threshold", type=a_share, default=0.9, help="least mean probability (default 0.9)")
    options.add_argument("--per-class", type=at_least(1), help="most rows of a label, the most confident ones")
    options.add_argument("--output", required=True, type=a_path, help="file (.jsonl)")
    options.add_argument("--batch_size", type=at_least(1), default=16, help="examples per forward pass (default 16)")
    add_trust(options)
    given = options.parse_args(list(arguments))
    if given.output.suffix != ".jsonl":
        raise ConfigError(f"--output {str(given.output)!r}: accepted: a name that ends with .jsonl")
    if given.output.exists():
        raise ConfigError(f"--output {str(given.output)!r} exists; name a file that does not")
    with ranks() as world:
        with runtime.shared_errors():
            rows, where = read_table(given.unlabelled), str(given.unlabelled)
            run = open_runs(given.runs, world.device, trusted(given))
            data = run.config.data
            check_single(data, "pseudo")
            examples = to_examples(rows, where, data, advice="rename those with the texts")
            for folder in given.runs:
                check_apart(examples, read_corpus(read_run(folder)[0].data).splits, where)
        probabilities = run.predict(examples, given.batch_size).probabilities
        kept = vote(probabilities, given.threshold, given.per_class)
        if not kept:
            raise DataError(
                f"{where}: no label has a mean probability of {given.threshold:g}, the highest is "
                f"{float(probabilities.max()):.3f}; lower --threshold"
            )
        if world.is_main:
            lines = []
            for row, label, confidence in kept:
                texts = {getattr(data, name): getattr(examples[row], name) for name in TEXTS if getattr(data, name)}
                lines.append(
                    to_json(texts | {data.label: run.labels[label], "confidence": round(confidence, 6)}) + "\n"
                )
            with writing(given.output):
                given.output.parent.mkdir(parents=True, exist_ok=True)
                write_text(given.output, "".join(lines))
            counts = Counter(label for _, label, _ in kept)
            each = ", ".join(f"{name} {counts[number]}" for number, name in enumerate(run.labels))
            sys.stderr.write(f"{len(kept)} of {len(rows)} texts are labelled: {each}\n")
    return 0


def vote(probabilities: torch.Tensor, threshold: float, per_class: int | None) -> list[tuple[int, int, float]]:
    """Row, label and probability of what is kept of mean `probabilities` [rows, classes], in order of the rows.

    The likeliest label has at least the `threshold`; with `per_class`, only so many rows of a label, those with the
    highest probability, the first of equal ones.
    """
    found = [
        (row, max(range(len(values)), key=values.__getitem__)) for row, values in enumerate(probabilities.tolist())
    ]
    sure = [(row, label, float(probabilities[row, label])) for row, label in found]
    sure = [one for one in sure if one[2] >= threshold]
    taken = Counter[int]()
    kept = []
    for row, label, confidence in sorted(sure, key=lambda one: -one[2]):
        taken[label] += 1
        if per_class is None or taken[label] <= per_class:
            kept.append((row, label, confidence))
    return sorted(kept)


def _paths(text: str) -> list[Path]:
    folders = [a_path(part.strip()) for part in text.split(",") if part.strip()]
    if not folders:
        raise argparse.ArgumentTypeError("names no folder; accepted: folders of finished runs, comma-separated")
    return folders
