"""A set of labels per example, which may be empty: each label is a question of its own, answered by a sigmoid."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from irtune.errors import DataError, RunError, brief
from irtune.tasks.base import Label, NameOf, Predictions, Task, per_class

EVEN = 0.5


@dataclass(frozen=True)
class MultiLabel(Task):
    """The label of an example is the tuple of its labels' numbers; a target is float32 [classes], 0 or 1.

    separator: between the labels of a text cell; None: cells are lists.
    thresholds: a label is predicted where its probability is above its threshold; empty: above .5.
    """

    separator: str | None = None
    thresholds: tuple[float, ...] = ()

    name = "multi_label"
    problem_type = "multi_label_classification"
    blank: ClassVar[Label] = ()
    headline: ClassVar[Mapping[str, str]] = {
        "macro_f1": "macro-F1", "micro_f1": "micro-F1", "auprc": "AUPRC", "jaccard": "Jaccard",
    }  # fmt: skip

    def values(self, cell: Any, where: str) -> list[Any]:
        """The raw labels in a list, or in a text that is split at the separator."""
        if isinstance(cell, list | tuple):
            return list(cell)
        if isinstance(cell, str) and self.separator is not None:
            return [part.strip() for part in cell.split(self.separator)] if cell.strip() else []
        if isinstance(cell, str):
            raise DataError(f"{where}: {brief(cell)} is a text, not a list of labels; set data.label_separator")
        raise DataError(f"{where}: {brief(cell)} is not a list of labels, which data.multi_label needs")

    def read(self, cell: Any, where: str, name_of: NameOf) -> tuple[Any, Any]:
        """Two tuples of names, each name once."""
        pairs = [name_of(value, where) for value in self.values(cell, where)]
        return tuple(dict.fromkeys(raw for raw, _ in pairs)), tuple(dict.fromkeys(name for _, name in pairs))

    def names(self, label: Any) -> Sequence[str]:
        """All of them."""
        return label

    def numbered(self, label: Any, numbers: Mapping[str, int]) -> Label:
        """In ascending order."""
        return tuple(sorted({numbers[name] for name in label}))

    def numbers(self, label: Label) -> Sequence[int]:
        """All of them."""
        return label

    def shown(self, label: Label, names: Sequence[str]) -> Any:
        """A list of names."""
        return [names[number] for number in label]

    def target(self, label: Label, classes: int) -> Any:
        """1.0 for each label of the example, 0.0 for the others."""
        return [float(number in label) for number in range(classes)]

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Sigmoids."""
        return logits.sigmoid()

    def _limits(self, classes: int) -> torch.Tensor:
        return torch.tensor(self.thresholds or [EVEN] * classes, dtype=torch.float64)

    def predicted(self, logits: torch.Tensor) -> torch.Tensor:
        """bool [examples, classes]."""
        return self._above(self.scores(logits))

    def _above(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.double() > self._limits(scores.shape[-1])

    def positives(self, labels: torch.Tensor, classes: int) -> Any:
        """The targets themselves."""
        return labels.bool()

    def tuned(self, predictions: Predictions) -> Task:
        """For each label the threshold with the best F1; of several the one nearest to .5, as for labels without any.

        Only thresholds halfway between two neighbouring probabilities, and .5, can differ in what they predict.
        """
        probabilities, wanted = predictions.probabilities.double(), predictions.labels.bool()
        chosen = []
        for scores, true in zip(probabilities.T, wanted.T):
            known = scores.unique()
            tried = torch.cat([torch.tensor([EVEN], dtype=torch.float64), (known[1:] + known[:-1]) / 2])
            tried = tried[(tried - EVEN).abs().argsort(stable=True)]
            order = scores.argsort(descending=True)
            hits = torch.cat([torch.zeros(1), true[order].float().cumsum(0)])  # among the first 0, 1, ... scores
            count = len(scores) - torch.searchsorted(scores[order].flip(0), tried, right=True)  # predicted
            f1 = 2 * hits[count] / (count + true.sum()).clamp(min=1)
            chosen.append(float(tried[int(f1.argmax())]))
        return replace(self, thresholds=tuple(chosen))

    def restored(self, results: Mapping[str, Any]) -> Task:
        """With the thresholds of results.json."""
        found, names = results.get("thresholds"), list(results["dev"]["per_class"])
        if not isinstance(found, dict) or list(found) != names:
            raise RunError(f"results.json is damaged: thresholds must name each of {', '.join(names)}")
        for name, value in found.items():
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
                raise RunError(f"results.json: the threshold of {name!r} is {brief(value)}; accepted: from 0 to 1")
        return replace(self, thresholds=tuple(map(float, found.values())))

    def recorded(self, names: Sequence[str]) -> dict[str, Any]:
        """The threshold of each label."""
        return {"thresholds": dict(zip(names, self._limits(len(names)).tolist()))}

    def written(self, scores: torch.Tensor, names: Sequence[str]) -> dict[str, Any]:
        """A list of names, and a probability for each label."""
        chosen = self._above(scores).tolist()
        every = {name: round(value, 6) for name, value in zip(names, scores.tolist())}
        return {"predicted": [name for name, yes in zip(names, chosen) if yes], "probabilities": every}

    def confidence(self, predictions: Predictions) -> torch.Tensor:
        """Of the wrong answers about an example's labels, the most confident."""
        wrong = self.predicted(predictions.logits) != predictions.labels.bool()
        sure = torch.maximum(predictions.probabilities, 1 - predictions.probabilities)
        return (sure * wrong).amax(-1)

    def in_words(self, predicted: torch.Tensor, names: Sequence[str]) -> str:
        """The names, or that there are none."""
        return ", ".join(repr(name) for name, yes in zip(names, predicted.tolist()) if yes) or "without any label"

    def metrics(self, predictions: Predictions, names: Sequence[str]) -> dict[str, Any]:
        """accuracy is the share of examples whose set is right; jaccard the mean of |common| / |either|, 1 if both are
        empty; micro_f1 that of all answers together. auprc and macro averages are over all labels, undefined ones 0.
        """
        from torchmetrics.functional.classification import multilabel_average_precision

        true, guess = predictions.labels.bool(), self.predicted(predictions.logits)
        hits, support, chosen = ((true & guess).sum(0), true.sum(0), guess.sum(0))
        precision, recall = hits / chosen.clamp(min=1), hits / support.clamp(min=1)
        f1 = 2 * hits / (support + chosen).clamp(min=1)
        values = multilabel_average_precision(predictions.probabilities, true.long(), len(names), average=None)
        average_precision = torch.where(support > 0, values.float(), 0.0)
        either = (true | guess).sum(1)
        jaccard = torch.where(either > 0, (true & guess).sum(1) / either.clamp(min=1), 1.0)
        return {
            "examples": len(true),
            "loss": float(torch.nn.functional.binary_cross_entropy_with_logits(predictions.logits, true.float())),
            "accuracy": float((true == guess).all(1).float().mean()),
            "macro_precision": float(precision.mean()),
            "macro_recall": float(recall.mean()),
            "macro_f1": float(f1.mean()),
            "macro_f1_present": float(f1[support > 0].mean()) if bool(support.any()) else 0.0,
            "micro_f1": float(2 * hits.sum() / (support + chosen).sum().clamp(min=1)),
            "auprc": float(average_precision.mean()),
            "jaccard": float(jaccard.mean()),
            "per_class": per_class(names, precision, recall, f1, average_precision, support),
        }

    def baseline(self, labels: Sequence[Label], names: Sequence[str]) -> tuple[str, torch.Tensor]:
        """The most frequent set."""
        most = Counter(labels).most_common(1)[0][0]
        title = " + ".join(self.shown(most, names)) or "no label"
        return f"always {title}", torch.tensor(self.target(most, len(names))) * 2 - 1

    def linear(self, c: float, class_weight: str | None) -> Any:
        """One model per label."""
        from sklearn.multiclass import OneVsRestClassifier

        return OneVsRestClassifier(super().linear(c, class_weight))

    def linear_logits(self, model: Any, matrix: Any, classes: int) -> torch.Tensor:
        """The models' own."""
        return torch.tensor(model.decision_function(matrix), dtype=torch.float32).view(-1, classes)
