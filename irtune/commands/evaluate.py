"""`python -m irtune evaluate`: how good a run is on a corpus, how sure that is, and where it is wrong."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
BINS = 15  # of the calibration error, as Guo et al. (ICML 2017) have it


def main(arguments: Sequence[str]) -> int:
    """Evaluate a run on one split; write evaluation.json and confusion_matrix.png, print a table or the JSON."""
    options = parser(
        "evaluate",
        "Metrics of a finished run, or of the mean of several (--run A --run B), on a corpus: accuracy, macro and "
        "per-class scores, AUPRC, 95 % bootstrap intervals, "
        "expected calibration error, confusion matrix (also as PNG) and the 20 most confident mistakes.",
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
                with replacing(folder / "confusion_matrix.png") as scratch:
                    confusion_map(found["confusion_matrix"], run.labels).savefig(scratch, dpi=120)
            show_json(found) if given.json else show(_text(found, run.labels, folder))
    return 0


def _same(one: str, other: str | None) -> bool:
    """Whether two paths or hub ids are one corpus."""
    return other is not None and len({os.path.realpath(os.path.expanduser(name)) for name in (one, other)}) == 1


def evaluate(run: LoadedRun | Ensemble, examples: Sequence[Example], predictions: Predictions) -> dict[str, Any]:
    """Everything that is reported, in plain JSON types."""
    predicted = predictions.logits.argmax(-1)
    probabilities = predictions.probabilities
    wrong = (predicted != predictions.labels).nonzero().flatten().tolist()
    wrong.sort(key=lambda i: -float(probabilities[i].max()))
    calibration = multiclass_calibration_error(probabilities, predictions.labels, len(run.labels), n_bins=BINS)
    return metrics(predictions, run.labels) | {
        "intervals_95": intervals(predictions.labels.tolist(), predicted.tolist(), len(run.labels)),
        "expected_calibration_error": float(calibration),
        "most_confident_mistakes": [
            {
                "id": examples[i].id,
                "label": run.labels[examples[i].label],
                "predicted": run.labels[int(predicted[i])],
                "probability": round(float(probabilities[i].max()), 4),
                "before": examples[i].before,
                "after": examples[i].after,
            }
            for i in wrong[:MISTAKES]
        ],
    }


def _text(found: dict[str, Any], labels: Sequence[str], folder: Path) -> str:
    low_high = found["intervals_95"]
    rows = [
        [
            label,
            *(f"{row[name]:.3f}" for name in ("precision", "recall", "f1", "average_precision")),
            str(row["examples"]),
        ]
        for label, row in found["per_class"].items()
    ]
    confusion = [[label, *map(str, line)] for label, line in zip(labels, found["confusion_matrix"])]
    mistakes = [
        f"  {m['id']}: {m['label']} taken for {m['predicted']} ({m['probability']:.2f}): {_short(m['before'])!r} -> "
        f"{_short(m['after'])!r}"
        for m in found["most_confident_mistakes"]
    ]
    return "\n".join([
        f"{found['examples']} examples of {found['data']} ({found['split']})",
        f"accuracy {found['accuracy']:.3f} [{low_high['accuracy'][0]:.3f}, {low_high['accuracy'][1]:.3f}]  "
        f"macro-F1 {found['macro_f1']:.3f} [{low_high['macro_f1'][0]:.3f}, {low_high['macro_f1'][1]:.3f}]  "
        f"AUPRC {found['auprc']:.3f}  calibration error {found['expected_calibration_error']:.3f}",
        "",
        table(["label", "precision", "recall", "F1", "AP", "examples"], rows),
        "",
        "confusion matrix (rows: label, columns: predicted)",
        table(["", *labels], confusion),
        "",
        f"most confident mistakes ({len(mistakes)}):",
        *mistakes,
        f"written to {folder}",
    ])  # fmt: skip


def _short(text: str | None) -> str:
    return "" if text is None else text if len(text) <= 60 else text[:57] + "..."
