"""`python -m irtune evaluate`: how good a run is on a corpus, how sure that is, and where it is wrong."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from irtune.commands.common import a_path, add_json, add_run, parser, ranks, show, show_json, table, trusted
from irtune.data import Example, read_split
from irtune.distributed import runtime
from irtune.errors import ConfigError
from irtune.evaluation.bootstrap import intervals
from irtune.evaluation.ensemble import Ensemble, open_runs
from irtune.evaluation.metrics import Predictions, metrics
from irtune.evaluation.saved_run import LoadedRun
from irtune.files import replacing, write_json, writing
from irtune.tracking.pictures import confusion_map

MISTAKES = 20
CALIBRATION = "expected_calibration_error"
BINS = 15  # of the calibration error, as Guo et al. (ICML 2017) have it


def main(arguments: Sequence[str]) -> int:
    """Evaluate a run on one split; write evaluation.json and confusion_matrix.png, print a table or the JSON."""
    options = parser(
        "evaluate",
        "Metrics of a finished run, or of the mean of several (--run A --run B), on a corpus: accuracy, macro and "
        "per-class scores, AUPRC, 95 % bootstrap intervals, expected calibration error, confusion matrix (also as PNG) "
        "and the 20 most confident mistakes. Where an example has a set of labels: without the error and the matrix; "
        "of values: Pearson, Spearman, R2 and the largest errors.",
        "python -m irtune evaluate --run runs/mine --data corpus/ --split test",
    )
    add_run(options, several=True)
    add_json(options)
    options.add_argument("--data", required=True, help="file, folder or hub id, with the columns of the run")
    options.add_argument("--split", choices=("dev", "test", "train"), default="test", help="split (default test)")
    options.add_argument("--output_dir", type=a_path, help="folder of the results (default: RUN/evaluation_SPLIT)")
    given = options.parse_args(list(arguments))
    if len(given.run) > 1 and given.output_dir is None:
        raise ConfigError("several runs have no folder in common: name one for their results with --output_dir")
    with ranks() as world:
        with runtime.shared_errors():
            run = open_runs(given.run, world.device, trusted(given))
            # A configuration is that of the training corpus; of another, a folder of it can be named.
            config = run.config.data.config if _same(given.data, run.config.data.path) else None
            data = dataclasses.replace(run.config.data, path=given.data, config=config, train=None, dev=None, test=None)
            examples = read_split(data, given.split, run.labels)
        predictions = run.predict(examples, given.batch_size)
        if world.is_main:
            found = evaluate(run, examples, predictions) | {"split": given.split, "data": given.data}
            found["run"] = ", ".join(map(str, given.run))
            folder = given.output_dir or given.run[0] / f"evaluation_{given.split}"
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / "evaluation.json", found)
                if "confusion_matrix" in found:
                    with replacing(folder / "confusion_matrix.png") as scratch:
                        confusion_map(found["confusion_matrix"], run.labels).savefig(scratch, dpi=120)
            show_json(found) if given.json else show(_text(found, run, folder))
    return 0


def _same(one: str, other: str | None) -> bool:
    """Whether two paths or hub ids are one corpus."""
    return other is not None and len({os.path.realpath(os.path.expanduser(name)) for name in (one, other)}) == 1


def evaluate(run: LoadedRun | Ensemble, examples: Sequence[Example], predictions: Predictions) -> dict[str, Any]:
    """Everything that is reported, in plain JSON types."""
    task, labels = predictions.task, predictions.labels
    predicted = task.predicted(predictions.logits)
    wrong = (predicted != labels).view(len(labels), -1).any(1)
    confidence = task.confidence(predictions)
    order = sorted(wrong.nonzero().flatten().tolist(), key=lambda i: -float(confidence[i]))
    return metrics(predictions, run.labels) | {
        **_certainty(predictions, predicted, len(run.labels)),
        "most_confident_mistakes": [
            {
                "id": examples[i].id,
                "label": task.shown(examples[i].label, run.labels),
                "predicted": task.written(predictions.probabilities[i], run.labels)["predicted"],
                task.mistake: round(float(confidence[i]), 4),
                "before": examples[i].before,
                "after": examples[i].after,
                **({"context": examples[i].context} if examples[i].context is not None else {}),
            }
            for i in order[:MISTAKES]
        ],
    }


def _certainty(predictions: Predictions, predicted: torch.Tensor, classes: int) -> dict[str, Any]:
    """Bootstrap intervals of labels, and the calibration error where each example has one."""
    if predictions.positives is None:
        return {}
    found: dict[str, Any] = {"intervals_95": intervals(predictions.labels.numpy(), predicted.numpy(), classes)}
    if predictions.labels.dim() == 1:
        error = multiclass_calibration_error(predictions.probabilities, predictions.labels, classes, n_bins=BINS)
        found[CALIBRATION] = float(error)
    return found


def _text(found: dict[str, Any], run: LoadedRun | Ensemble, folder: Path) -> str:
    intervals_95, task = found.get("intervals_95", {}), run.task

    def headline(name: str, words: str) -> str:
        low_high = intervals_95.get(name)
        return f"{words} {found[name]:.3f}" + (f" [{low_high[0]:.3f}, {low_high[1]:.3f}]" if low_high else "")

    lines = [
        f"{found['examples']} examples of {found['data']} ({found['split']})",
        "  ".join(headline(name, words) for name, words in task.headline.items())
        + (f"  calibration error {found[CALIBRATION]:.3f}" if CALIBRATION in found else ""),
        "",
    ]
    if intervals_95:
        names = ("precision", "recall", "f1", "average_precision")
        rows = [
            [label, *(f"{row[name]:.3f}" for name in names), str(row["examples"])]
            for label, row in found["per_class"].items()
        ]
        lines += [table(["label", "precision", "recall", "F1", "AP", "examples"], rows), ""]
    if "confusion_matrix" in found:
        confusion = [[label, *map(str, line)] for label, line in zip(run.labels, found["confusion_matrix"])]
        lines += ["confusion matrix (rows: label, columns: predicted)", table(["", *run.labels], confusion), ""]
    mistakes = [
        f"  {m['id']}: {_words(m['label'])} taken for {_words(m['predicted'])} ({m[task.mistake]:.2f}): "
        f"{_short(m['before'])!r} -> {_short(m['after'])!r}"
        for m in found["most_confident_mistakes"]
    ]
    what = "most confident mistakes" if intervals_95 else "largest errors"
    return "\n".join([*lines, f"{what} ({len(mistakes)}):", *mistakes, f"written to {folder}"])


def _words(label: Any) -> str:
    return (" + ".join(label) or "no label") if isinstance(label, list) else str(label)


def _short(text: str | None) -> str:
    return "" if text is None else text if len(text) <= 60 else text[:57] + "..."
