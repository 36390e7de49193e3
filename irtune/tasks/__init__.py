"""What a corpus asks a model for: one label, a set of labels, or a number. All that differs between them is here."""

from collections.abc import Mapping
from typing import Any

from irtune.config.schema import DataConfig
from irtune.config.tasks import task_name
from irtune.tasks.base import SINGLE_LABEL, Predictions, Task
from irtune.tasks.multi_label import MultiLabel
from irtune.tasks.regression import Regression

__all__ = ["SINGLE_LABEL", "Predictions", "Task", "task_of"]


def task_of(data: DataConfig, results: Mapping[str, Any] | None = None) -> Task:
    """The task of a corpus, with the thresholds that a finished run has chosen where `results` are given.

    Raises:
        RunError: for thresholds in `results` that are not numbers from 0 to 1, one for each label.
    """
    task = {"single_label": SINGLE_LABEL, "multi_label": MultiLabel(data.label_separator), "regression": Regression()}[
        task_name(data)
    ]
    return task if results is None else task.restored(results)
