"""A number per example: the model has one output, which is the number itself."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar

import numpy as np
import torch

from irtune.errors import DataError, brief
from irtune.tasks.base import Label, NameOf, Predictions, Task

LARGEST = 1e9  # of a value; larger ones are another column
STRATA, STRATUM = 10, 20  # most parts of the values that a split keeps the shares of, and the least rows of one


@dataclass(frozen=True)
class Regression(Task):
    """The label of an example is its value, a target float32 []; the one "label" is the name of the column."""

    name = "regression"
    problem_type = "regression"
    heading = "Value"
    least_labels = 1
    mistake = "error"
    main = "pearson"
    blank: ClassVar[Label] = 0.0
    headline: ClassVar[Mapping[str, str]] = {"pearson": "Pearson", "spearman": "Spearman", "r2": "R2"}

    def read(self, cell: Any, where: str, name_of: NameOf) -> tuple[Any, Any]:
        """A finite number, or a text that is one."""
        good = isinstance(cell, str | int | float | Decimal) and not isinstance(cell, bool)
        try:
            value = float(cell) if good else np.nan
        except (ValueError, OverflowError):
            value = np.nan
        if not abs(value) <= LARGEST:
            raise DataError(
                f"{where}: {brief(cell)} is not a value of data.task regression; accepted: a number from "
                f"-{LARGEST:,.0f} to {LARGEST:,.0f}"
            )
        return value, value

    def names(self, label: Any) -> Sequence[str]:
        """None."""
        return ()

    def numbered(self, label: Any, numbers: Mapping[str, int]) -> Label:
        """The value itself."""
        return label

    def strata(self, labels: Sequence[Any]) -> Sequence[Any]:
        """Equally many values each: the lowest, the next and so on."""
        parts = max(1, min(STRATA, len(labels) // STRATUM))
        edges = np.quantile(labels, np.arange(1, parts) / parts)
        return [f"{part:02d}" for part in np.searchsorted(edges, labels, side="right")]

    def numbers(self, label: Label) -> Sequence[int]:
        """Every example counts for the one column."""
        return (0,)

    def shown(self, label: Label, names: Sequence[str]) -> Any:
        """The value."""
        return label

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """The values."""
        return logits

    def predicted(self, logits: torch.Tensor) -> torch.Tensor:
        """float [examples]."""
        return logits.squeeze(-1)

    def positives(self, labels: torch.Tensor, classes: int) -> Any:
        """There are none."""
        return None

    def written(self, scores: torch.Tensor, names: Sequence[str]) -> dict[str, Any]:
        """The value only."""
        return {"predicted": round(float(scores[0]), 6)}

    def confidence(self, predictions: Predictions) -> torch.Tensor:
        """Distance from the true value."""
        return (self.predicted(predictions.logits) - predictions.labels).abs()

    def in_words(self, predicted: torch.Tensor, names: Sequence[str]) -> str:
        """The number."""
        return f"{float(predicted):.4g}"

    def metrics(self, predictions: Predictions, names: Sequence[str]) -> dict[str, Any]:
        """loss is the mean squared error. A correlation with what does not vary, and r2 of it, count as 0."""
        from scipy import stats

        guess, true = self.predicted(predictions.logits).double().numpy(), predictions.labels.double().numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant values, which count as 0
            found = [stats.pearsonr(guess, true)[0], stats.spearmanr(guess, true)[0]] if len(true) > 1 else [0.0, 0.0]
        spread = float(((true - true.mean()) ** 2).sum())
        error = float(((true - guess) ** 2).sum())
        values = {
            "examples": len(true),
            "loss": error / len(true),
            "mean_absolute_error": float(np.abs(true - guess).mean()),
            **{name: float(np.nan_to_num(value)) for name, value in zip(("pearson", "spearman"), found)},
            "r2": 1 - error / spread if spread else 0.0,
        }
        return values | {"per_class": {names[0]: dict(values)}}

    def baseline(self, labels: Sequence[Label], names: Sequence[str]) -> tuple[str, torch.Tensor]:
        """The mean."""
        mean = float(np.mean(labels))
        return f"always {mean:.4g}", torch.tensor([mean])

    def linear(self, c: float, class_weight: str | None) -> Any:
        """Ridge regression."""
        from sklearn.linear_model import Ridge

        return Ridge(alpha=1 / c)

    def linear_logits(self, model: Any, matrix: Any, classes: int) -> torch.Tensor:
        """The values."""
        return torch.tensor(model.predict(matrix), dtype=torch.float32).view(-1, 1)
