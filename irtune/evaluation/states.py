"""What a run makes of each text inside: what its head reads, and what its last layer but one gives."""

from collections.abc import Callable, Sequence
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
    return _watched(run, examples, batch_size, forward, handles, linear[0].in_features)


def inner_states(
    run: LoadedRun,
    examples: Sequence[Example],
    batch_size: int,
    read: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    size: int,
) -> torch.Tensor:
    """`read(states, mask)` of the last layer but one for each example, float32 [examples, size]. Collective.

    `read` gets the layer's output [batch, tokens, width] and the attention mask [batch, tokens].
    """
    seen: list[torch.Tensor] = []

    def remember(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).detach())

    def forward(batch: dict[str, Any]) -> torch.Tensor:
        seen.clear()
        run.model(**batch)
        mask = batch["attention_mask"]
        return read(
            seen[0][:, seen[0].shape[1] - mask.shape[1] :], mask
        )  # without what an adapter puts before the text

    layers = list(run.classifier.model.get_submodule(run.classifier.anatomy.layers).children())
    handles = [layers[max(0, len(layers) - 2)].register_forward_hook(remember)]
    return _watched(run, examples, batch_size, forward, handles, size)


def _watched(
    run: LoadedRun,
    examples: Sequence[Example],
    batch_size: int,
    forward: Callable[[dict[str, Any]], torch.Tensor],
    handles: Sequence[Any],
    size: int,
) -> torch.Tensor:
    """`forward` of all examples, float32 [examples, size]; the hooks are removed."""
    encoded = [run.encoder.encode(example) for example in examples]
    try:
        return predict(
            forward,
            encoded,
            [0] * len(encoded),
            size,
            batch_size=batch_size,
            pad_token_id=int(run.classifier.tokenizer.pad_token_id),  # type: ignore[arg-type]
            device=run.device,
            padded=padded_lengths(run.config, run.device),
        ).logits
    finally:
        for handle in handles:
            handle.remove()
