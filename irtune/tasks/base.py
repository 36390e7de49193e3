"""The interface of a task, which is classification by one label here, and what a model predicts for a split."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

# From a label's cell and its place to its name in the file and the one that `data.labels` gives it.
NameOf = Callable[[Any, str], tuple[str, str]]
Label = Any  # of an example: the number of its label, a tuple of such numbers in ascending order, or a value


@dataclass(frozen=True)
class Task:
    """One label per example. Other tasks override what is different for them.

    The label of an example is the number of its label; `names` are the labels in order of their numbers.
    """

    name = "single_label"
    problem_type = "single_label_classification"  # transformers' word for it
    heading = "Classes"  # of the labels, in a model card
    least_labels = 2
    mistake = "probability"  # what `confidence` is
    main = "macro_f1"  # by which settings are compared
    headline: ClassVar[Mapping[str, str]] = {"accuracy": "accuracy", "macro_f1": "macro-F1", "auprc": "AUPRC"}
    blank: ClassVar[Label] = 0  # of a text whose label nobody knows

    # ----- reading -----

    def values(self, cell: Any, where: str) -> list[Any]:
        """The raw labels in a cell.

        Raises:
            DataError: naming the place, for a cell of another kind.
        """
        return [cell]

    def read(self, cell: Any, where: str, name_of: NameOf) -> tuple[Any, Any]:
        """A cell as it is in the file, and by the names of `data.labels`.

        Raises:
            DataError: as `values` and `name_of`.
        """
        return name_of(cell, where)

    def names(self, label: Any) -> Sequence[str]:
        """The names in what `read` returns."""
        return (label,)

    def numbered(self, label: Any, numbers: Mapping[str, int]) -> Label:
        """The label of an example from what `read` returns."""
        return numbers[label]

    def strata(self, labels: Sequence[Any]) -> Sequence[Any]:
        """What a split keeps the shares of, for each of `labels` as `read` returns them."""
        return labels

    # ----- labels of examples -----

    def numbers(self, label: Label) -> Sequence[int]:
        """Numbers of the labels that an example counts for."""
        return (label,)

    def shown(self, label: Label, names: Sequence[str]) -> Any:
        """The label in plain JSON types."""
        return names[label]

    def target(self, label: Label, classes: int) -> Any:
        """What `torch.tensor` makes the target of: int64 [] here."""
        return label

    # ----- predictions -----

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """What is shown of logits [..., classes]: probabilities of the same shape."""
        return logits.softmax(-1)

    def predicted(self, logits: torch.Tensor) -> torch.Tensor:
        """The predicted labels of logits [examples, classes], in the form of the targets."""
        return logits.argmax(-1)

    def positives(self, labels: torch.Tensor, classes: int) -> Any:
        """Whether each example has each label, bool [examples, classes]; None where there are no labels."""
        return torch.nn.functional.one_hot(labels, classes).bool()

    def tuned(self, predictions: "Predictions") -> "Task":
        """The task with the thresholds that suit `predictions` best."""
        return self

    def restored(self, results: Mapping[str, Any]) -> "Task":
        """The task as a finished run has left it."""
        return self

    def recorded(self, names: Sequence[str]) -> dict[str, Any]:
        """What results.json keeps of it."""
        return {}

    def written(self, scores: torch.Tensor, names: Sequence[str]) -> dict[str, Any]:
        """A prediction from its scores [classes], in plain JSON types: predicted, and its probabilities."""
        values = scores.tolist()
        best = max(range(len(values)), key=values.__getitem__)
        every = [round(value, 6) for value in values]
        return {"predicted": names[best], "probability": every[best], "probabilities": dict(zip(names, every))}

    def confidence(self, predictions: "Predictions") -> torch.Tensor:
        """How sure, or how far off, each prediction is, float [examples]: mistakes are shown in this order."""
        return predictions.probabilities.amax(-1)

    def only(self, predictions: "Predictions", names: Sequence[str]) -> str | None:
        """What all predictions of a split with several labels are, in words; None where they differ."""
        predicted = self.predicted(predictions.logits).unique(dim=0)
        if len(predicted) > 1 or len(predictions.labels.unique(dim=0)) < 2:
            return None
        return self.in_words(predicted[0], names)

    def in_words(self, predicted: torch.Tensor, names: Sequence[str]) -> str:
        """A prediction, as a message names it."""
        return repr(names[int(predicted)])

    def metrics(self, predictions: "Predictions", names: Sequence[str]) -> dict[str, Any]:
        """Every metric that a result reports, in plain JSON types; `per_class` has an entry for each of `names`.

        Classes that occur neither as label nor as prediction count as zero in macro averages; macro_f1_present is the
        mean over the classes that occur as label. AUPRC is the macro mean over all classes of the average precision of
        the softmax scores.
        """
        # Imported here: it takes half a second, which the first step need not wait for.
        from torchmetrics.functional import classification

        logits, labels, classes = predictions.logits, predictions.labels, len(names)
        predicted = logits.argmax(-1)
        every: dict[str, Any] = {"num_classes": classes, "average": None}
        precision = classification.multiclass_precision(predicted, labels, **every)
        recall = classification.multiclass_recall(predicted, labels, **every)
        f1 = classification.multiclass_f1_score(predicted, labels, **every)
        support = torch.bincount(labels, minlength=classes)
        average_precision = torch.zeros(classes)  # of classes without an example, where it is not defined
        values = classification.multiclass_average_precision(predictions.probabilities, labels, **every)
        average_precision[support > 0] = values[support > 0].float()
        confusion = classification.multiclass_confusion_matrix(predicted, labels, num_classes=classes)
        return {
            "examples": len(labels),
            "loss": float(torch.nn.functional.cross_entropy(logits, labels)),
            "accuracy": float((predicted == labels).float().mean()),
            "macro_precision": float(precision.mean()),
            "macro_recall": float(recall.mean()),
            "macro_f1": float(f1.mean()),
            "macro_f1_present": float(f1[support > 0].mean()),
            "auprc": float(average_precision.mean()),
            "per_class": per_class(names, precision, recall, f1, average_precision, support),
            "confusion_matrix": confusion.tolist(),
        }

    # ----- baselines -----

    def baseline(self, labels: Sequence[Label], names: Sequence[str]) -> tuple[str, torch.Tensor]:
        """What is easily predicted for every example after training on `labels`: its name, and logits [classes]."""
        most = Counter(labels).most_common(1)[0][0]
        return f"always {names[most]}", torch.nn.functional.one_hot(torch.tensor(most), len(names)).float()

    def linear(self, c: float, class_weight: str | None) -> Any:
        """A linear model of scikit-learn, C times as free as the usual one, to be fitted to targets."""
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(C=c, class_weight=class_weight, max_iter=2000)

    def linear_logits(self, model: Any, matrix: Any, classes: int) -> torch.Tensor:
        """Logits of a fitted linear model, float32 [examples, classes]."""
        scores = torch.full((matrix.shape[0], classes), -1e9)  # a class without a training example is never chosen
        scores[:, torch.tensor(model.classes_)] = torch.tensor(model.predict_log_proba(matrix), dtype=torch.float32)
        return scores


SINGLE_LABEL = Task()


@dataclass(frozen=True)
class Predictions:
    """Logits of a split in the order of its examples: float32 [examples, classes], and their targets [examples, ...].

    labels: int64 [examples] for one label per example; see `Task.target`.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    task: Task = SINGLE_LABEL

    @property
    def probabilities(self) -> torch.Tensor:
        """`Task.scores` of the logits, float32 [examples, classes]."""
        return self.task.scores(self.logits)

    @property
    def positives(self) -> Any:
        """`Task.positives` of the labels."""
        return self.task.positives(self.labels, self.logits.shape[-1])

    def tuned(self) -> "Predictions":
        """The same with the thresholds that suit them best."""
        return replace(self, task=self.task.tuned(self))


def per_class(
    names: Sequence[str],
    precision: torch.Tensor,
    recall: torch.Tensor,
    f1: torch.Tensor,
    average_precision: torch.Tensor,
    support: torch.Tensor,
) -> dict[str, dict[str, float]]:
    """Metrics of each class, from tensors [classes]."""
    return {
        name: {
            "precision": float(precision[c]),
            "recall": float(recall[c]),
            "f1": float(f1[c]),
            "average_precision": float(average_precision[c]),
            "examples": int(support[c]),
        }
        for c, name in enumerate(names)
    }
