"""What a run's classification head reads of each text: the pooled hidden states."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from irtune.data import Example, padded_lengths
from irtune.evaluation.metrics import predict
from irtune.evaluation.saved_run import LoadedRun


def pooled_states(run: LoadedRun, examples: Sequence[Example], batch_size: int) -> torch.Tensor:
    """The input of the head's first linear module for each example, float32 [examples, width]. Collective.

    Where the head is applied to every token, the input at the last one.
    """
    seen: list[torch.Tensor] = []

    def remember(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0].detach())

    def forward(batch: dict[str, Any]) -> torch.Tensor:
        seen.clear()
        run.model(**batch)
        states, mask = seen[0], batch["attention_mask"]
        if states.dim() == 2:
            return states
        extra = states.shape[1] - mask.shape[1]  # embeddings that an adapter puts before the text
        last = extra + (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        return states[torch.arange(len(states), device=states.device), last]

    head = run.classifier.model.get_submodule(run.classifier.anatomy.head[0])
    # peft keeps the untrained module beside the trained one; only what runs is seen.
    linear = [part for part in head.modules() if isinstance(part, nn.Linear)]
    handles = [part.register_forward_pre_hook(remember) for part in linear]
    encoded = [run.encoder.encode(example) for example in examples]
    try:
        return predict(
            forward,
            encoded,
            [0] * len(encoded),
            linear[0].in_features,
            batch_size=batch_size,
            pad_token_id=int(run.classifier.tokenizer.pad_token_id),  # type: ignore[arg-type]
            device=run.device,
            padded=padded_lengths(run.config, run.device),
        ).logits
    finally:
        for handle in handles:
            handle.remove()
