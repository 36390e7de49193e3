"""Several finished runs as one: the mean of their probabilities."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from irtune.config import Config
from irtune.data import Example
from irtune.errors import RunError
from irtune.evaluation.metrics import Predictions
from irtune.evaluation.saved_run import LoadedRun, load_run, read_run


@dataclass(frozen=True)
class Ensemble:
    """Runs with the same labels; only one of them is in memory at a time.

    config, labels: of the first run, whose order of labels and columns hold for all.
    """

    folders: tuple[Path, ...]
    config: Config
    labels: list[str]
    device: torch.device
    trusted: tuple[str, ...]

    def predict(self, examples: Sequence[Example], batch_size: int) -> Predictions:
        """Predictions whose probabilities are the mean of those of all runs; logits are their logarithms. Collective.

        Raises:
            RunError, ModelError, CheckpointError: as `load_run`.
        """
        total = torch.zeros(len(examples), len(self.labels), dtype=torch.float64)
        for folder in self.folders:
            run = load_run(folder, self.device, trusted=self.trusted)
            probabilities = run.predict(examples, batch_size).probabilities
            total += probabilities[:, [run.labels.index(label) for label in self.labels]]
            del run
        mean = (total / len(self.folders)).float().clamp(min=torch.finfo(torch.float32).tiny)
        return Predictions(mean.log(), torch.tensor([example.label for example in examples]))


def open_runs(folders: Sequence[Path], device: torch.device, trusted: Collection[str] = ()) -> LoadedRun | Ensemble:
    """What predicts: the run in the one folder, or those in several, averaged.

    Raises:
        RunError: for a folder that holds no finished run, and for runs with other labels or other kinds of texts.
        ModelError, CheckpointError: as `load_run`.
    """
    if len(folders) == 1:
        return load_run(folders[0], device, trusted=trusted)
    first, results = read_run(folders[0])
    labels = list(results["dev"]["per_class"])
    for folder in folders[1:]:
        config, results = read_run(folder)
        others = list(results["dev"]["per_class"])
        if set(others) != set(labels):
            raise RunError(
                f"{folder} has the labels {', '.join(others)}, and {folders[0]} has {', '.join(labels)}; accepted: "
                "runs with the same labels"
            )
        if (config.data.after is None) != (first.data.after is None):
            raise RunError(
                f"one of {folder} and {folders[0]} reads pairs and the other single texts (data.after); accepted: runs "
                "that read the same"
            )
    return Ensemble(tuple(folders), first, labels, device, tuple(trusted))
