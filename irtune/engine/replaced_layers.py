"""Layers whose outputs can be put in, or left out, instead of being computed.

A batch whose attention mask has the attribute `kept` brings the output of the highest frozen layer along, in the form
in which hidden states pass between layers: padded, or without padding.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from irtune.adapters.guard import difference, tolerance
from irtune.engine.engine import FOR_LOSS
from irtune.errors import TrainingError, one_line
from irtune.models.packing import tokens_of

Batch = dict[str, torch.Tensor]


class ReplacedLayers:
    """Layers of a model of which those below `frozen` need not be computed where a batch has their outputs."""

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module], frozen: int):
        """Replace the forward of each of `modules`, all of the model's layers."""
        self.model, self.modules, self.frozen = model, modules, frozen
        self._kept: torch.Tensor | None = None
        self._computed = range(len(modules))
        self._output: Any = None  # of the last frozen layer, while `outputs` runs
        self._rest: tuple[None, ...] | None = None  # what layers return behind hidden states; None: no tuple
        model.register_forward_pre_hook(self._enter, with_kwargs=True)
        model.register_forward_hook(self._leave, always_call=True)
        for number, layer in enumerate(modules):
            layer.forward = self._replaced(number, layer.forward)  # type: ignore[method-assign]

    def outputs(self, batch: Batch) -> torch.Tensor:
        """Hidden states behind the frozen layers, of the tokens of a batch one after another: [tokens, width]."""
        self._computed = range(self.frozen)
        try:
            self._run(batch)
        finally:
            self._computed = range(len(self.modules))
        states, self._output = self._output, None
        return states[tokens_of(batch["attention_mask"], states).bool()]

    def check(self, batch: Batch) -> None:
        """Compare the last layer's output for a batch that has kept states with what it computes without.

        Raises:
            TrainingError: when they differ by more than rounding.
        """
        found: list[torch.Tensor] = []
        handle = self.modules[-1].register_forward_hook(
            lambda _layer, _args, output: found.append((output[0] if isinstance(output, tuple) else output).float())
        )
        mask = batch["attention_mask"]
        try:
            self._run(batch)
            del mask.kept  # type: ignore[attr-defined]
            self._run(batch)
        finally:
            handle.remove()
        tokens = mask.bool()
        change = difference(*(states[tokens] for states in found))
        if change > tolerance(self.model):
            raise TrainingError(
                "tuning.keep_frozen_outputs: the layers of this model compute something else from kept outputs of its "
                f"frozen layers (a difference of {change:.0%}); set it to false"
            )

    def _run(self, batch: Batch) -> None:
        try:
            with torch.no_grad():  # in training mode: if there is dropout after all, `check` sees it
                self.model(**{name: value for name, value in batch.items() if name not in FOR_LOSS})
        except (RuntimeError, TypeError, AttributeError, IndexError) as error:
            raise TrainingError(
                f"tuning.keep_frozen_outputs: this model cannot leave out its frozen layers ({one_line(error)}); set "
                "it to false"
            ) from error

    def _enter(self, _module: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        self._kept = getattr(kwargs.get("attention_mask"), "kept", None)

    def _leave(self, *_: Any) -> None:
        self._kept = None

    def _replaced(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        last = self.frozen - 1

        @functools.wraps(forward)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            if number in self._computed and not (self._kept is not None and number < self.frozen):
                output = forward(*args, **kwargs)
                if number == last and len(self._computed) == self.frozen:
                    self._output, *rest = output if isinstance(output, tuple) else (output,)
                    # Attention weights, which nobody reads. Were it anything else, `check` would tell.
                    self._rest = (None,) * len(rest) if isinstance(output, tuple) else None
                return output
            states = inspect.signature(forward).bind(*args, **kwargs).args[0]
            if self._kept is not None and number == last:  # rows without padding are filled up for some kernels
                states = nn.functional.pad(self._kept, (0, 0, 0, states.shape[1] - self._kept.shape[1]))
            return states if self._rest is None else (states, *self._rest)

        return replaced
