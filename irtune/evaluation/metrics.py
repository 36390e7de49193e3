"""Exact metrics over ranks: every example counts once, however many ranks there are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from irtune.data import collate, evaluation_batches
from irtune.data.batches import PaddedLengths
from irtune.distributed import runtime
from irtune.errors import DistributedError


@dataclass(frozen=True)
class Predictions:
    """Logits of a split in the order of its examples: float32 [examples, classes], and labels int64 [examples]."""

    logits: torch.Tensor
    labels: torch.Tensor

    @property
    def probabilities(self) -> torch.Tensor:
        """softmax of the logits, float32 [examples, classes]."""
        return self.logits.softmax(-1)


def predict(
    forward: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    encoded: Sequence[dict[str, list[int]]],
    labels: Sequence[int],
    num_classes: int,
    *,
    batch_size: int,
    pad_token_id: int,
    device: torch.device,
    tokens: int | None = None,
    padded: PaddedLengths | None = None,
) -> Predictions:
    """Run `forward` (a batch to logits [batch, classes]) over all examples, spread over ranks. Collective.

    In batches of `batch_size` examples, or of as many as fit into `tokens`, padded to one of the lengths `padded`.

    Raises:
        DistributedError: when an example was not predicted exactly once.
    """
    lengths = [len(item["input_ids"]) for item in encoded]
    logits = torch.zeros(len(encoded), num_classes, device=device)
    times = torch.zeros(len(encoded), device=device)
    rank, world = runtime.rank(), runtime.launched_world_size()
    for positions in evaluation_batches(lengths, batch_size, rank, world, tokens):
        # A rank without work left goes along with one example, since ZeRO 3 needs all ranks; nothing of it is kept.
        chosen = [encoded[i] for i in positions or [len(encoded) - 1]]
        batch = collate(chosen, pad_token_id, device=device, lengths=padded)
        with torch.no_grad():
            output = forward(batch)
        if positions:
            index = torch.tensor(positions, device=device)
            logits[index] = output.float()
            times[index] += 1
    runtime.all_reduce(logits)
    runtime.all_reduce(times)
    if not bool((times == 1).all()):
        wrong = int((times != 1).sum())
        raise DistributedError(f"{wrong} of {len(encoded)} examples were not predicted exactly once")
    return Predictions(logits.cpu(), torch.tensor(labels))


def metrics(predictions: Predictions, names: Sequence[str]) -> dict[str, Any]:
    """Every metric that a result reports, in plain JSON types.

    Classes that occur neither as label nor as prediction count as zero in macro averages; macro_f1_present is the mean
    over the classes that occur as label. AUPRC is the macro mean over all classes of the average precision of the
    softmax scores.
    """
    # Imported here: it takes half a second, which the first step need not wait for.
    from torchmetrics.functional import classification

    logits, labels, classes = predictions.logits, predictions.labels, len(names)
    predicted = logits.argmax(-1)
    every: dict[str, Any] = {"num_classes": classes, "average": None}
    precision = classification.multiclass_precision(predicted, labels, **every)
    recall = classification.multiclass_recall(predicted, labels, **every)
    f1 = classification.multiclass_f1_score(predicted, labels, **every)
    average_precision = _average_precision(predictions.probabilities, labels, classes)
    support = torch.bincount(labels, minlength=classes)
    return {
        "examples": len(labels),
        "loss": float(torch.nn.functional.cross_entropy(logits, labels)),
        "accuracy": float((predicted == labels).float().mean()),
        "macro_precision": float(precision.mean()),
        "macro_recall": float(recall.mean()),
        "macro_f1": float(f1.mean()),
        "macro_f1_present": float(f1[support > 0].mean()),
        "auprc": float(average_precision.mean()),
        "per_class": {
            name: {
                "precision": float(precision[c]),
                "recall": float(recall[c]),
                "f1": float(f1[c]),
                "average_precision": float(average_precision[c]),
                "examples": int(support[c]),
            }
            for c, name in enumerate(names)
        },
        "confusion_matrix": classification.multiclass_confusion_matrix(predicted, labels, num_classes=classes).tolist(),
    }


def _average_precision(probabilities: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Average precision per class, float32 [classes]; 0 for classes without an example, where it is not defined."""
    from torchmetrics.functional.classification import multiclass_average_precision

    present = torch.bincount(labels, minlength=classes) > 0
    result = torch.zeros(classes)
    values = multiclass_average_precision(probabilities, labels, num_classes=classes, average=None)
    result[present] = values[present].float()
    return result
