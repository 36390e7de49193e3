"""Layer scores: how much each layer's adapters want to move, gathered while micro-batches pass through the model.

Gradients are turned into squared norms inside the backward pass, on the device. One all-reduce and one host read per
selection. Formulas and names: docs/method.md.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from irtune.adapters import LayerTable
from irtune.data.batches import sent
from irtune.distributed import runtime
from irtune.models.packing import tokens_of

GRADIENT_SCORES = ("rms", "global", "reference", "resnorm", "ratio")
WEIGHT_SCORES = ("weight", "ratio")  # which need each layer's projection


class LayerScores:
    """Collects the scores of one selection.

    kind: rms, global, reference (from gradients), resnorm (from gradients and hidden states), ratio (from gradients and
        constants), weight (from constants) or cosine (from hidden states).
    higher_is_important: False for cosine, where LOW values are selected.
    needs_gradients: False for weight and cosine, which a forward pass or none tells.
    """

    def __init__(
        self, table: LayerTable, kind: str, device: torch.device, projections: Sequence[torch.Tensor] | None = None
    ):
        """Prepare to score the layers of `table`; `projections` are L weight matrices, for `WEIGHT_SCORES`."""
        self.table, self.kind, self.device = table, kind, device
        self.higher_is_important = kind != "cosine"
        self.needs_gradients = kind in GRADIENT_SCORES
        self._weights = [float(w.detach().float().norm()) for w in projections or []] if kind in WEIGHT_SCORES else []
        self.reset()

    def reset(self) -> None:
        """Forget what was gathered."""
        layers = self.table.num_layers
        self._sums = torch.zeros(layers, dtype=torch.float64, device=self.device)
        self._token_sums = torch.zeros(layers, dtype=torch.float64, device=self.device)
        self._tokens = torch.zeros(layers, dtype=torch.float64, device=self.device)
        self._norms: list[tuple[int, torch.Tensor]] = []  # (layer, fp32 scalar) of this micro-batch's tensors
        self._gradients: dict[tuple[int, int], torch.Tensor] = {}  # (layer, parameter) -> sum over micro-batches
        self._micro_batches = 0
        self._scored: set[int] = set()

    @contextlib.contextmanager
    def micro_batch(self, attention_mask: torch.Tensor, *, all_layers: bool, factor: float) -> Iterator[None]:
        """Gather from the forward and backward pass inside the block.

        Args:
            attention_mask: [batch, length], 1 for tokens and 0 for padding, as `collate` makes it.
            all_layers: score frozen layers too; for gradients, inside `Engine.reaching_all_layers`. They are thrown
                away inside the backward pass, and the layers are frozen again before the optimizer could see them.
            factor: what gradients must be multiplied with to be those of the micro-batch's mean loss (undoes the
                division by accumulation steps, the loss scale, and the weight of a micro-batch in its step).
        """
        self._micro_batches += 1
        with contextlib.ExitStack() as cleanup:
            if self.needs_gradients:
                self._watch_gradients(cleanup, all_layers, factor)
            if self.kind in ("cosine", "resnorm"):
                self._watch_hidden_states(cleanup, attention_mask)
            yield
        self._add_squares(factor)

    def _add_squares(self, factor: float) -> None:
        """Fold the micro-batch's norms, gathered with one kernel per tensor, into the layers' sums of squares."""
        if not self._norms:
            return
        layers, norms = zip(*self._norms)
        squares = (torch.stack(norms) * factor).double() ** 2
        self._sums.index_add_(0, sent(torch.tensor(layers), self.device), squares)
        self._norms = []

    def _watch_gradients(self, cleanup: contextlib.ExitStack, all_layers: bool, factor: float) -> None:
        for layer, parameters in enumerate(self.table.layers):
            for position, (_, parameter) in enumerate(parameters):
                if not parameter.requires_grad:
                    if not all_layers:
                        continue
                    parameter.requires_grad_(True)
                    cleanup.callback(parameter.requires_grad_, False)
                    drop = parameter.register_post_accumulate_grad_hook(_drop_gradient)
                    cleanup.callback(drop.remove)
                self._scored.add(layer)
                handle = parameter.register_hook(self._gradient_hook(layer, position, factor))
                cleanup.callback(handle.remove)

    def _gradient_hook(self, layer: int, position: int, factor: float):
        """A hook that adds one parameter's gradient of this micro-batch and leaves the gradient as it is."""

        def add_norm(gradient: torch.Tensor) -> None:
            self._norms.append((layer, torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)))

        def add_gradient(gradient: torch.Tensor) -> None:
            scaled = gradient.detach().float() * factor
            known = self._gradients.get((layer, position))
            self._gradients[layer, position] = scaled if known is None else known.add_(scaled)

        return add_gradient if self.kind in ("global", "reference") else add_norm

    def _watch_hidden_states(self, cleanup: contextlib.ExitStack, attention_mask: torch.Tensor) -> None:
        def compare(layer: int):
            def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
                before = args[0] if args else kwargs["hidden_states"]
                with torch.no_grad():
                    if self.kind == "cosine":
                        after = output[0] if isinstance(output, tuple) else output
                        values = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
                    else:
                        values = before.float().square().mean(-1)
                    tokens = tokens_of(attention_mask, before)
                    self._token_sums[layer] += (values * tokens).sum().double()
                    self._tokens[layer] += tokens.sum().double()

            return hook

        for layer, module in enumerate(self.table.modules):
            if self.kind == "cosine":
                self._scored.add(layer)
            # First of all hooks: one behind the last layer pads its output.
            hook = module.register_forward_hook(compare(layer), with_kwargs=True, prepend=True)
            cleanup.callback(hook.remove)

    def reduce(self) -> list[float | None]:
        """Scores over all ranks since the last reset, one per layer; None for layers that were not scored.

        Collective: all ranks call it. The result is the same on all of them.
        """
        if self.kind == "weight":
            return list(self._weights)
        values = {
            "rms": self._rms,
            "cosine": self._token_mean,
            "global": self._global,
            "reference": self._reference,
            "resnorm": self._resnorm,
            "ratio": self._ratio,
        }[self.kind]()
        numbers = values.tolist()  # the one host read
        scored = self._scored
        self.reset()
        return [number if layer in scored else None for layer, number in enumerate(numbers)]

    def _rms(self) -> torch.Tensor:
        """sqrt( (1/M) sum_m ||g_l^(m)||^2 ), float64 [L]."""
        count = self._sums.new_tensor([float(self._micro_batches)])
        both = runtime.all_reduce(torch.cat([self._sums, count]))
        return (both[:-1] / both[-1]).sqrt()

    def _token_mean(self) -> torch.Tensor:
        """Mean over all tokens of all ranks of what the hooks took, float64 [L]."""
        both = runtime.all_reduce(torch.stack([self._token_sums, self._tokens]))
        return both[0] / both[1]

    def _resnorm(self) -> torch.Tensor:
        """rms / sqrt(mean square of a value of the layer's input over all tokens), float64 [L].

        What a LoRA's gradient owes to large inputs is taken out, after Layer Card (arXiv 2602.04019), which divides by
        the inputs' covariance (our reading: by its trace).
        """
        return self._rms() / self._token_mean().sqrt()

    def _ratio(self) -> torch.Tensor:
        """rms / norm of the layer's projection, float64 [L]: the inverse of LARS's trust ratio (You et al., 2017)."""
        scores = self._rms()
        return scores / scores.new_tensor(self._weights)

    def _global(self) -> torch.Tensor:
        """|| (1/M) sum_m g_l^(m) ||, float64 [L]; the gradients themselves are all-reduced."""
        keys = sorted(self._gradients)
        count = self._sums.new_tensor([float(self._micro_batches)], dtype=torch.float32)
        flat = runtime.all_reduce(torch.cat([*(self._gradients[key].flatten() for key in keys), count]))
        squares = torch.zeros_like(self._sums)
        for (layer, _), part in zip(keys, (flat[:-1] / flat[-1]).split([self._gradients[k].numel() for k in keys])):
            squares[layer] += torch.linalg.vector_norm(part, dtype=torch.float64) ** 2
        return squares.sqrt()

    def _reference(self) -> torch.Tensor:
        """sqrt( sum_p sqrt(||g_p||) ) of the rank's mean gradient, averaged over ranks, float64 [L]."""
        roots = torch.zeros_like(self._sums)
        for (layer, _), gradient in self._gradients.items():
            roots[layer] += torch.linalg.vector_norm(gradient / self._micro_batches, dtype=torch.float64).sqrt()
        return runtime.all_reduce(roots.sqrt()) / runtime.launched_world_size()


def _drop_gradient(parameter: torch.Tensor) -> None:
    """Runs when a frozen layer's gradient has been counted: free it, and freeze the parameter again."""
    parameter.grad = None
    parameter.requires_grad_(False)
