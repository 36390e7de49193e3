"""Linear modules of what trains, in fp32 beside a body of lower precision."""

import torch
from torch import nn


class CastLinear(nn.Linear):
    """A linear module whose fp32 parameters compute in the number format of the input.

    So the head learns in fp32 over a lower-precision body, and a model that peft loads back, with the head in the
    body's format, computes the same numbers.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out] in the input's dtype."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.weight.to(input.dtype), bias)


class AdapterLinear(CastLinear):
    """A factor of an update: trains in the number format of the input, evaluates in its own, as peft does.

    In training, products in the base's bf16 take half of the time of fp32 ones, and no second copy of the input is
    kept. In evaluation, the model then computes the same numbers as one that peft has loaded back.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], in the input's dtype while training, in the weight's otherwise."""
        return super().forward(input if self.training else input.to(self.weight.dtype))


def compute_in_input_dtype(module: nn.Module, kind: type[CastLinear] = CastLinear) -> None:
    """Make every plain linear module in `module` one of `kind`; parameters and their names stay."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = kind
