"""Which examples make up which micro-batch, and the tensors of a micro-batch.

The plan depends on the seed, the lengths and the global batch only: not on how the M micro-batches of a step are spread
over ranks and accumulation steps. So 4 ranks x 1, 2 x 2 and 1 x 4 train on the same micro-batches in the same order.
"""

import random
from collections.abc import Sequence

import torch

from irtune.errors import ConfigError


class BatchPlan:
    """Order of the training examples, one epoch after the other."""

    def __init__(self, lengths: Sequence[int], micro_batch_size: int, micro_batches: int, seed: int, bucket: int = 50):
        """Plan steps of `micro_batches` micro-batches (M = ranks x accumulation) of `micro_batch_size` examples.

        `bucket` global batches are sorted by length together: more of them means less padding, and less randomness in
        who meets whom. 1: a global batch is a random one, sorted into its micro-batches.

        Raises:
            ConfigError: when a global batch is larger than the corpus.
        """
        self.lengths, self.seed, self.bucket = lengths, seed, bucket
        self.micro_batch_size, self.micro_batches = micro_batch_size, micro_batches
        global_batch = micro_batch_size * micro_batches
        if global_batch > len(lengths):
            raise ConfigError(
                f"a global batch of {global_batch} examples ({micro_batch_size} x {micro_batches} micro-batches) is "
                f"larger than the training split of {len(lengths)}; use fewer ranks, smaller optim.micro_batch_size or "
                "optim.gradient_accumulation_steps"
            )
        # The examples of an incomplete last batch are left out; others in each epoch, since the order changes.
        self.steps_per_epoch = len(lengths) // global_batch
        self._epoch: tuple[int, list[list[int]]] | None = None

    def step(self, step: int) -> list[list[int]]:
        """The M micro-batches of optimizer step `step` (counted from 0), as positions in the training split."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._plan(epoch))
        first = position * self.micro_batches
        return self._epoch[1][first : first + self.micro_batches]

    def _plan(self, epoch: int) -> list[list[int]]:
        """Shuffle, sort by length within buckets, cut, and shuffle the steps."""
        rng = random.Random(f"order/{self.seed}/{epoch}")
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        size, per_step = self.micro_batch_size, self.micro_batches
        order = order[: self.steps_per_epoch * size * per_step]
        batches = []
        for start in range(0, len(order), self.bucket * size * per_step):
            bucket = sorted(order[start : start + self.bucket * size * per_step], key=lambda i: (self.lengths[i], i))
            batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
        steps = [batches[i : i + per_step] for i in range(0, len(batches), per_step)]
        rng.shuffle(steps)
        return [batch for step in steps for batch in step]


def evaluation_batches(lengths: Sequence[int], batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Batches of positions for one rank: every position stands in exactly one batch of one rank.

    Longest first, so that an out-of-memory error comes at once. All ranks get equally many batches, because ZeRO 3
    needs every rank in every forward pass: a rank that has one fewer gets an empty list as its last.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rounds = -(-len(batches) // world_size)
    mine = batches[rank::world_size]
    return mine + [[]] * (rounds - len(mine))


def collate(
    encoded: Sequence[dict[str, list[int]]],
    pad_token_id: int,
    labels: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> dict[str, torch.Tensor]:
    """Pad to the longest example of the batch, on the right.

    Returns:
        input_ids and attention_mask, int64 [batch, length]; token_type_ids where the examples have them; labels,
        int64 [batch], when given.
    """
    length = max(len(item["input_ids"]) for item in encoded)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([item[name] + [value] * (length - len(item[name])) for item in encoded])

    batch = {
        "input_ids": padded("input_ids", pad_token_id),
        "attention_mask": torch.tensor(
            [[1] * len(item["input_ids"]) + [0] * (length - len(item["input_ids"])) for item in encoded]
        ),
    }
    if "token_type_ids" in encoded[0]:
        batch["token_type_ids"] = padded("token_type_ids", 0)
    if labels is not None:
        batch["labels"] = torch.tensor(labels)
    if device is not None and device.type == "cuda":  # only from pinned memory does a copy not wait
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
