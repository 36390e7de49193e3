"""Which examples make up which micro-batch, and the tensors of a micro-batch.

The order depends on the seed, the lengths, M and the size of a micro-batch only: not on how the M micro-batches of a
step are spread over ranks and accumulation steps. So 4 ranks x 1, 2 x 2 and 1 x 4 train on the same micro-batches in
the same order.
"""

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from irtune.config.schema import Config, OptimConfig
from irtune.errors import ConfigError

CPU_MULTIPLE = 32


class BatchSampler:
    """Order of the training examples, one epoch after the other."""

    def __init__(
        self,
        lengths: Sequence[int],
        micro_batch_size: int,
        micro_batches: int,
        seed: int,
        bucket: int = 50,
        tokens: int | None = None,
        packed: bool = False,
    ):
        """Draw steps of `micro_batches` micro-batches (M = ranks x accumulation).

        Args:
            lengths: of the training examples, in tokens.
            micro_batch_size: examples in a micro-batch.
            micro_batches: M.
            seed: of the order.
            bucket: global batches that are sorted by length together: more of them means less padding, and less
                randomness in who meets whom. 1: a global batch is a random one, sorted into its micro-batches.
            packed: no padding, so that every global batch is a random one, whose examples are dealt out to its
                micro-batches so that all of them have about as many tokens.
            tokens: a micro-batch holds as many examples as fit into so many tokens and padding, instead of
                `micro_batch_size`: all of them are about the same work. Epochs may then differ by a few steps.

        Raises:
            ConfigError: when a global batch is larger than the corpus.
        """
        self.lengths, self.seed, self.bucket, self.tokens = lengths, seed, bucket, tokens
        self.micro_batch_size, self.micro_batches = micro_batch_size, micro_batches
        self.packed = packed
        self._epoch: tuple[int, list[list[int]]] | None = None
        self._starts = [0]  # first steps of those epochs that are known, with `tokens`
        if tokens is not None:
            if len(lengths) < micro_batches:
                raise ConfigError(
                    f"{micro_batches} micro-batches per step are more than the {len(lengths)} examples of the training "
                    "split; use fewer ranks or smaller optim.gradient_accumulation_steps"
                )
            self.steps_per_epoch = len(self._batches(0)) // micro_batches
            return
        global_batch = micro_batch_size * micro_batches
        if global_batch > len(lengths):
            raise ConfigError(
                f"a global batch of {global_batch} examples ({micro_batch_size} x {micro_batches} micro-batches) is "
                f"larger than the training split of {len(lengths)}; use fewer ranks, smaller optim.micro_batch_size or "
                "optim.gradient_accumulation_steps"
            )
        # The examples of an incomplete last batch are left out; others in each epoch, since the order changes.
        self.steps_per_epoch = len(lengths) // global_batch

    def step(self, step: int) -> list[list[int]]:
        """The M micro-batches of optimizer step `step` (counted from 0), as positions in the training split."""
        epoch, position = divmod(step, self.steps_per_epoch) if self.tokens is None else self._find(step)
        first = position * self.micro_batches
        return self._batches(epoch)[first : first + self.micro_batches]

    def epoch(self, step: int) -> int:
        """The epoch of optimizer step `step`, both counted from 0."""
        return step // self.steps_per_epoch if self.tokens is None else self._find(step)[0]

    def examples(self, steps: int) -> int:
        """Examples in the first `steps` optimizer steps."""
        if self.tokens is None:
            return steps * self.micro_batch_size * self.micro_batches
        return sum(len(batch) for step in range(steps) for batch in self.step(step))

    @property
    def examples_per_step(self) -> float:
        """Examples in an optimizer step, a whole number; with `tokens`, on average over the first epoch, rounded."""
        if self.tokens is None:
            return self.micro_batch_size * self.micro_batches
        return round(self.examples(self.steps_per_epoch) / self.steps_per_epoch, 1)

    def _find(self, step: int) -> tuple[int, int]:
        """Epoch of a step and its place there, where epochs differ in length."""
        while step >= self._starts[-1]:
            steps = len(self._batches(len(self._starts) - 1)) // self.micro_batches
            self._starts.append(self._starts[-1] + steps)
        epoch = bisect.bisect_right(self._starts, step) - 1
        return epoch, step - self._starts[epoch]

    def _batches(self, epoch: int) -> list[list[int]]:
        """All micro-batches of an epoch: shuffle, sort by length within buckets, cut, and shuffle the steps."""
        if self._epoch is not None and self._epoch[0] == epoch:
            return self._epoch[1]
        rng = random.Random(f"order/{self.seed}/{epoch}")
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        batches = self._cut(order) if self.tokens is None else self._fill(order, self.tokens)
        per_step = self.micro_batches
        for _ in range(len(batches) % per_step):  # left out; others in each epoch
            batches.pop(rng.randrange(len(batches)))
        steps = [batches[i : i + per_step] for i in range(0, len(batches), per_step)]
        rng.shuffle(steps)
        self._epoch = (epoch, [batch for step in steps for batch in step])
        return self._epoch[1]

    def _cut(self, order: list[int]) -> list[list[int]]:
        """Micro-batches of equally many examples."""
        size = self.micro_batch_size
        at_once = (1 if self.packed else self.bucket) * size * self.micro_batches
        batches: list[list[int]] = []
        order = order[: self.steps_per_epoch * size * self.micro_batches]
        for start in range(0, len(order), at_once):
            bucket = sorted(order[start : start + at_once], key=lambda i: (self.lengths[i], i))
            if self.packed:
                batches += self._deal(bucket)
            else:
                batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
        return batches

    def _deal(self, ordered: list[int]) -> list[list[int]]:
        """A global batch in its order of lengths to M micro-batches: to the first first, then to the last first."""
        per_step = self.micro_batches
        rounds = [ordered[i : i + per_step] for i in range(0, len(ordered), per_step)]
        return [list(batch) for batch in zip(*(dealt[:: 1 - 2 * (n % 2)] for n, dealt in enumerate(rounds)))]

    def _fill(self, order: list[int], tokens: int) -> list[list[int]]:
        """Micro-batches of as many examples as fit into `tokens`; at least M of them."""
        per_step = self.micro_batches * tokens * len(order) // sum(self.lengths)
        at_once = self.bucket * max(1, per_step)
        batches: list[list[int]] = []
        batch: list[int] = []
        for start in range(0, len(order), at_once):
            # What a bucket leaves of its last micro-batch goes with the next one: only the very last is not full.
            # Among equal lengths the order stays random, or in a small corpus the same texts would always meet.
            bucket = sorted([*batch, *order[start : start + at_once]], key=lambda i: self.lengths[i])
            batch = []
            for position in bucket:
                if batch and (len(batch) + 1) * self.lengths[position] > tokens:
                    batches.append(batch)
                    batch = []
                batch.append(position)
        batches.append(batch)
        while len(batches) < self.micro_batches:
            large = max(batches, key=len)
            batches.append([large.pop() for _ in range(len(large) // 2)])
        return batches


def build_sampler(
    encoded: Sequence[dict[str, list[int]]], config: Config, micro_batches: int, *, packed: bool = False
) -> BatchSampler:
    """The sampler of a run with `micro_batches` micro-batches per step, over the `encoded` training examples.

    packed: the model trains without padding.

    Raises:
        ConfigError: as `BatchSampler`.
    """
    optim = config.optim
    return BatchSampler(
        [len(item["input_ids"]) for item in encoded],
        optim.micro_batch_size,
        micro_batches,
        config.run.seed,
        config.data.length_bucket,
        optim.micro_batch_tokens,
        packed,
    )


def total_steps(optim: OptimConfig, sampler: BatchSampler) -> int:
    """Optimizer steps of a run: `optim.max_steps`, or as many as make `optim.epochs`."""
    return optim.max_steps or max(1, round(optim.epochs * sampler.steps_per_epoch))


def evaluation_batches(
    lengths: Sequence[int], batch_size: int, rank: int, world_size: int, tokens: int | None = None
) -> list[list[int]]:
    """Batches of positions for one rank: every position is in exactly one batch of one rank.

    Of `batch_size` examples each, or of as many as fit into `tokens` with padding, one at least.
    Longest first, so that an out-of-memory error comes at once. All ranks get equally many batches, because ZeRO 3
    needs every rank in every forward pass: a rank that has one fewer gets an empty list as its last.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches, first = [], 0
    while first < len(order):
        size = batch_size if tokens is None else max(1, tokens // max(1, lengths[order[first]]))
        batches.append(order[first : first + size])
        first += size
    rounds = -(-len(batches) // world_size)
    mine = batches[rank::world_size]
    return mine + [[]] * (rounds - len(mine))


@dataclass(frozen=True)
class PaddedLengths:
    """Lengths that batches are padded to: multiples of `multiple`, and `limit`, the longest input in tokens.

    For CPUs in bf16: oneDNN compiles its products anew for every new shape, so that with a new length in every batch a
    step takes several times as long and memory grows.
    """

    multiple: int
    limit: int

    def at_least(self, length: int) -> int:
        """The smallest of these lengths that is not below `length`."""
        return max(length, min(-(-length // self.multiple) * self.multiple, self.limit))


def padded_lengths(config: Config, device: torch.device) -> PaddedLengths | None:
    """Lengths that batches of a run on `device` are padded to; None: to their longest example.

    Batches by tokens have another number of examples each time anyway, and their size is a limit.
    """
    few = device.type == "cpu" and config.model.dtype == "bfloat16" and config.optim.micro_batch_tokens is None
    return PaddedLengths(CPU_MULTIPLE, config.data.max_length) if few else None


def sent(tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """A tensor of the host on `device`, without waiting for the device; None: where it is."""
    if device is not None and device.type == "cuda":  # only from pinned memory does a copy not wait
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def collate(
    encoded: Sequence[dict[str, list[int]]],
    pad_token_id: int,
    labels: Sequence[Any] | None = None,
    device: torch.device | None = None,
    lengths: PaddedLengths | None = None,
    packed: bool = False,
) -> dict[str, torch.Tensor]:
    """Pad to the longest example of the batch, or to the next of `lengths`, on the right.

    Returns:
        input_ids and attention_mask, int64 [batch, length]; token_type_ids, edit_mask and side_mask where the examples
        have them; labels when given: targets, int64 [batch] for one label per example. attention_mask.padded says
        whether it holds a 0, and where `packed`, attention_mask.lengths is the list of the examples' lengths.
    """
    length = max(len(item["input_ids"]) for item in encoded)
    if lengths is not None:
        length = lengths.at_least(length)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([item[name] + [value] * (length - len(item[name])) for item in encoded])

    batch = {
        "input_ids": padded("input_ids", pad_token_id),
        "attention_mask": torch.tensor(
            [[1] * len(item["input_ids"]) + [0] * (length - len(item["input_ids"])) for item in encoded]
        ),
    }
    for name in ("token_type_ids", "edit_mask", "side_mask"):
        if name in encoded[0]:
            batch[name] = padded(name, 0)
    if labels is not None:
        batch["labels"] = torch.tensor(labels)
    batch = {name: sent(tensor, device) for name, tensor in batch.items()}
    # For kernels/masks.py: on a GPU, to look at the mask is to wait for it.
    batch["attention_mask"].padded = any(len(item["input_ids"]) < length for item in encoded)  # type: ignore[attr-defined]
    if packed:  # for models/packing.py
        batch["attention_mask"].lengths = [len(item["input_ids"]) for item in encoded]  # type: ignore[attr-defined]
    return batch
