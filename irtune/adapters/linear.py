"""Linear modules of what trains, in fp32 beside a body of lower precision."""

from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import nn

from irtune.distributed.partitioned import is_partitioned


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


class UpdateLinear(AdapterLinear):
    """The second factor of a low-rank update, which can add its product to what the pretrained module computed."""

    def forward(self, input: torch.Tensor, onto: torch.Tensor | None = None, scaling: float = 1.0) -> torch.Tensor:
        """[..., r] -> [..., out]; with `onto` [tokens, out], `onto` + `scaling` * product, written over it if possible.

        One pass over memory where multiplying and adding take three, and in the backward pass none where they take one.
        """
        if onto is None:
            return super().forward(input)
        weight = self.weight.to(input.dtype).t()
        if is_partitioned(self.weight):  # ZeRO 3's hooks hand on views that autograd lets nobody write to
            return torch.addmm(onto, input, weight, alpha=scaling)
        return onto.addmm_(input, weight, alpha=scaling)


class LoraLinear(lora.Linear):
    """peft's LoRA module, W x + s B A x, whose training step adds the update in the product with B.

    Evaluation is peft's own, so that a model which peft has loaded back computes the same numbers.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        if not self.training or self.disable_adapters or self.merged or self.lora_variant or args or kwargs:
            return super().forward(x, *args, **kwargs)
        flat = x.reshape(-1, x.shape[-1])  # a product onto a view would copy its gradient
        result = self.base_layer(flat)
        for name in self.active_adapters:
            narrow = self.lora_A[name](self.lora_dropout[name](flat))
            result = self.lora_B[name](narrow, onto=result, scaling=self.scaling[name])
        return result.view(*x.shape[:-1], -1)


def add_in_product(module: lora.LoraLayer) -> None:
    """Let a plain LoRA module of peft add its update in the product with B; parameters and their names stay."""
    if type(module) is lora.Linear and not module.lora_variant and not any(module.lora_bias.values()):
        module.__class__ = LoraLinear
        for factor in module.lora_B.values():
            factor.__class__ = UpdateLinear


def compute_in_input_dtype(module: nn.Module, kind: type[CastLinear] = CastLinear) -> None:
    """Make every plain linear module in `module` one of `kind`; parameters and their names stay."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = kind
