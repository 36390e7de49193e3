"""Exact metrics over ranks: every example counts once, however many ranks there are."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from irtune.data import collate, evaluation_batches
from irtune.data.batches import PaddedLengths, sent
from irtune.distributed import runtime
from irtune.errors import DistributedError
from irtune.tasks import SINGLE_LABEL, Predictions, Task
from irtune.tasks.base import Label


def predict(
    forward: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    encoded: Sequence[dict[str, list[int]]],
    labels: Sequence[Label],
    num_classes: int,
    *,
    batch_size: int,
    pad_token_id: int,
    device: torch.device,
    tokens: int | None = None,
    padded: PaddedLengths | None = None,
    task: Task = SINGLE_LABEL,
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
        runtime.moving()
        with torch.no_grad():
            output = forward(batch)
        if positions:
            index = sent(torch.tensor(positions), device)
            logits[index] = output.float()
            times[index] += 1
    runtime.all_reduce(logits)
    runtime.all_reduce(times)
    if not bool((times == 1).all()):
        wrong = int((times != 1).sum())
        raise DistributedError(f"{wrong} of {len(encoded)} examples were not predicted exactly once")
    return Predictions(logits.cpu(), torch.tensor([task.target(label, num_classes) for label in labels]), task)


def metrics(predictions: Predictions, names: Sequence[str]) -> dict[str, Any]:
    """Every metric that a result reports, in plain JSON types: see `metrics` of the task."""
    return predictions.task.metrics(predictions, names)
