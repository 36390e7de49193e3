"""What a run reads of its corpus: this rank's micro-batches of a step, and predictions of a split."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

from irtune.data import BatchSampler, Corpus, collate
from irtune.data.batches import PaddedLengths, sent
from irtune.distributed import runtime
from irtune.engine.engine import MIX_ORDER, MIX_SHARE, WEIGHTS
from irtune.evaluation.metrics import Predictions, predict

EVALUATION_BATCH = 2  # in micro-batches: no gradients, so more examples fit

Batch = dict[str, torch.Tensor]
Variant = Callable[[int, int], dict[str, list[int]]]  # from a training example's place and an epoch to what is seen


class TrainingData:
    """The corpus as token ids on a device, in the sampler's order.

    max_steps: optimizer steps of the whole run.
    evaluation_batch, evaluation_tokens: size of evaluation batches, in examples; in tokens where that is not None.
    """

    def __init__(
        self,
        corpus: Corpus,
        encoded: dict[str, list[dict[str, list[int]]]],
        sampler: BatchSampler,
        *,
        max_steps: int,
        pad_token_id: int,
        device: torch.device,
        seed: int,
        padded: PaddedLengths | None = None,
        variant: Variant | None = None,
        mixup: float = 0.0,
        packed: bool = False,
    ):
        """Keep them.

        Args:
            corpus, sampler, max_steps, pad_token_id, device: of the run.
            encoded: by split, what the encoder makes of each example.
            seed: of dropout and of `mixup`.
            padded: see `collate`.
            variant: of the training examples. None: as they are `encoded`, in all epochs.
            mixup: `optim.mixup`.
            packed: the model trains without padding.
        """
        self.padded, self.variant, self.mixup, self.packed = padded, variant, mixup, packed
        self.corpus, self.encoded, self.sampler, self.max_steps = corpus, encoded, sampler, max_steps
        self.pad_token_id, self.device, self.seed = pad_token_id, device, seed
        self.kept: Callable[..., torch.Tensor] | None = None  # see frozen_outputs.KeptStates.rows
        self.weighted = any(example.weight != 1 for example in corpus.splits["train"])
        self.evaluation_batch = EVALUATION_BATCH * sampler.micro_batch_size
        self.evaluation_tokens = None if sampler.tokens is None else EVALUATION_BATCH * sampler.tokens

    def batches(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches of optimizer step `step`, counted from 0; each sets its own dropout seed."""
        places, epoch = self.sampler.step(step), self.sampler.epoch(step)
        for number in range(runtime.rank(), len(places), runtime.launched_world_size()):
            # Seeded by place in the step, not by rank: any split over ranks draws the same dropout.
            torch.manual_seed(runtime.derived_seed(self.seed, "micro-batch", step, number))
            yield self.batch(places[number], epoch) | self._mix(step, number, len(places[number]))

    def _mix(self, step: int, number: int, examples: int) -> Batch:
        """What `optim.mixup` mixes in micro-batch `number` of a step, whatever rank has it."""
        if not self.mixup:
            return {}
        rng, order = random.Random(f"mixup/{self.seed}/{step}/{number}"), list(range(examples))
        share = rng.betavariate(self.mixup, self.mixup)
        rng.shuffle(order)
        return {MIX_SHARE: sent(torch.tensor(share), self.device), MIX_ORDER: sent(torch.tensor(order), self.device)}

    def batch(self, positions: list[int], epoch: int = 0) -> Batch:
        """The training examples at `positions`, as `collate` returns them, with labels and weights if they have any.

        Augmented, they are those of `epoch`; `lengths` stays that of the originals.
        """
        examples, encoded = self.corpus.splits["train"], self.encoded["train"]
        labels = [self.corpus.task.target(examples[i].label, len(self.corpus.labels)) for i in positions]
        seen = [encoded[i] if self.variant is None else self.variant(i, epoch) for i in positions]
        batch = collate(seen, self.pad_token_id, labels, self.device, self.padded, self.packed)
        if self.kept is not None:
            mask: Any = batch["attention_mask"]
            states = self.kept(positions, mask.shape[1], packed=self.packed and mask.padded)
            mask.kept = sent(states, self.device)
        if self.weighted:
            batch[WEIGHTS] = sent(torch.tensor([examples[i].weight for i in positions]), self.device)
        return batch

    def lengths(self, step: int) -> list[list[int]]:
        """Tokens of the examples in each micro-batch of a step, those of all ranks."""
        return [[self.sampler.lengths[i] for i in positions] for positions in self.sampler.step(step)]

    def ids(self, step: int) -> list[list[str]]:
        """Ids of the examples in each of this rank's micro-batches of a step."""
        mine = self.sampler.step(step)[runtime.rank() :: runtime.launched_world_size()]
        return [[self.corpus.splits["train"][i].id for i in positions] for positions in mine]

    def label_counts(self) -> list[int]:
        """Training examples of each class, without those that have a predicted label."""
        numbers, known = self.corpus.task.numbers, [e for e in self.corpus.splits["train"] if not e.pseudo]
        labels = [number for example in known for number in numbers(example.label)]
        return [labels.count(number) for number in range(len(self.corpus.labels))]

    def evaluation(self, split: str, forward: Callable[[Batch], torch.Tensor]) -> Predictions:
        """Logits of a split by `forward`, which turns a batch into logits [batch, classes]. Collective."""
        return predict(
            forward,
            self.encoded[split],
            [example.label for example in self.corpus.splits[split]],
            len(self.corpus.labels),
            batch_size=self.evaluation_batch,
            tokens=self.evaluation_tokens,
            pad_token_id=self.pad_token_id,
            device=self.device,
            padded=self.padded,
            task=self.corpus.task,
        )
