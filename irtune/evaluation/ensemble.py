"""Several finished runs as one: the mean of their probabilities."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from irtune.config import Config
from irtune.config.tasks import MULTI, SINGLE, VALUE, WORDS, task_name
from irtune.data import Example
from irtune.errors import RunError
from irtune.evaluation.metrics import Predictions
from irtune.evaluation.saved_run import LoadedRun, load_run, read_run
from irtune.tasks import Task, task_of

# By task, what `Task.scores` makes given scores of; of a probability of 0, the least logit that is finite.
LOGITS = {
    SINGLE: lambda mean: mean.clamp(min=torch.finfo(torch.float32).tiny).log(),
    MULTI: lambda mean: mean.logit(eps=torch.finfo(torch.float32).eps),
    VALUE: lambda mean: mean,
}


@dataclass(frozen=True)
class Ensemble:
    """Runs with the same labels; only one of them is in memory at a time.

    config, labels, task: of the first run, whose columns, order of labels and thresholds hold for all.
    """

    folders: tuple[Path, ...]
    config: Config
    labels: list[str]
    device: torch.device
    trusted: tuple[str, ...]
    task: Task

    def predict(self, examples: Sequence[Example], batch_size: int) -> Predictions:
        """Predictions whose probabilities are the mean of those of all runs; logits are their logarithms. Collective.

        Raises:
            RunError, ModelError, CheckpointError: as `load_run`.
        """
        total = torch.zeros(len(examples), len(self.labels), dtype=torch.float64)
        targets = torch.zeros(0)
        for folder in self.folders:
            run = load_run(folder, self.device, trusted=self.trusted)
            found = run.predict(examples, batch_size)
            # Examples carry the numbers that labels have in the first run.
            targets = found.labels if run.folder == self.folders[0] else targets
            total += found.probabilities[:, [run.labels.index(label) for label in self.labels]]
            del run
        mean = (total / len(self.folders)).float()
        return Predictions(LOGITS[self.task.name](mean), targets, self.task)


def open_runs(folders: Sequence[Path], device: torch.device, trusted: Collection[str] = ()) -> LoadedRun | Ensemble:
    """What predicts: the run in the one folder, or those in several, averaged.

    Raises:
        RunError: for a folder that holds no finished run, and for runs with other labels or other kinds of texts.
        ModelError, CheckpointError: as `load_run`.
    """
    if len(folders) == 1:
        return load_run(folders[0], device, trusted=trusted)
    first, results = read_run(folders[0])
    labels, task = list(results["dev"]["per_class"]), task_of(first.data, results)
    for folder in folders[1:]:
        config, results = read_run(folder)
        others = list(results["dev"]["per_class"])
        if set(others) != set(labels):
            raise RunError(
                f"{folder} has the labels {', '.join(others)}, and {folders[0]} has {', '.join(labels)}; accepted: "
                "runs with the same labels"
            )
        if task_name(config.data) != task_name(first.data):
            raise RunError(
                f"{folder} predicts {WORDS[task_name(config.data)]}, and {folders[0]} {WORDS[task_name(first.data)]}; "
                "accepted: runs of the same task"
            )
        for name, kinds in (("after", "pairs and the other single texts"), ("context", "context and the other none")):
            if (getattr(config.data, name) is None) != (getattr(first.data, name) is None):
                raise RunError(
                    f"one of {folder} and {folders[0]} reads {kinds} (data.{name}); accepted: runs that read the same"
                )
    return Ensemble(tuple(folders), first, labels, device, tuple(trusted), task)
