"""Supervised contrastive loss: texts with one label are drawn together, others apart (Khosla et al., NeurIPS 2020)."""

from typing import Any

import torch
from torch import nn

from irtune.adapters import LayerTable

TEMPERATURE = 0.1


def supervised_contrastive(states: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean over anchors i of -mean_p log(exp(z_i z_p / t) / sum_(a != i) exp(z_i z_a / t)); 0 without any anchor.

    z are the normalised `states` [batch, width], p the other examples with i's label, labels int64 [batch]. Examples
    whose label no other has are not anchors.
    """
    z = nn.functional.normalize(states.float(), dim=-1)
    alone = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logs = (z @ z.T / temperature).masked_fill(alone, -torch.inf).log_softmax(-1).masked_fill(alone, 0.0)
    positive = (labels[:, None] == labels[None, :]) & ~alone
    count = positive.sum(-1)
    each = -(logs * positive).sum(-1) / count.clamp(min=1)
    return each.sum() / (count > 0).sum().clamp(min=1)


class Contrast:
    """Adds the contrastive loss of a micro-batch, times `weight`, on what the last linear module of the head reads."""

    def __init__(self, model: nn.Module, table: LayerTable, weight: float):
        self.weight = weight
        owners = [model.get_submodule(name.rpartition(".")[0]) for name, _ in table.head]
        settings: Any = next(part.config for part in model.modules() if hasattr(part, "config"))
        head = [part for part in owners if isinstance(part, nn.Linear) and part.out_features == settings.num_labels]
        self._read: torch.Tensor | None = None
        head[-1].register_forward_pre_hook(self._note)

    def _note(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._read = inputs[0]

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The term of the batch that has just gone forward; a scalar in fp32."""
        states, self._read = self._read, None
        assert states is not None, "no forward pass came before"
        if states.dim() == 3:  # of every token: decoders choose the last one's logits afterwards
            mask = batch["attention_mask"]
            extra = states.shape[1] - mask.shape[1]  # soft tokens before the text
            last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(-1) + extra
            states = states[torch.arange(len(states), device=mask.device), last]
        return self.weight * supervised_contrastive(states, batch["labels"], TEMPERATURE)
