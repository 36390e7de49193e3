"""Quantised base weights through bitsandbytes. The only file that uses it, imported where a base is quantised.

nf4: 4 bits per weight in blocks of 64, the blocks' scales in 8 bits (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).
int8: 8 bits per weight, a scale per output, and activations in 8 bits but for outliers (LLM.int8(), Dettmers et al.
2022, arXiv 2208.07339; bitsandbytes does the latter on CPUs in evaluation only).
Linear modules of the layers are quantised and nothing else: embeddings, norms, biases and what lies outside the layers
keep model.dtype.
"""

import copy
import importlib
import math
import re
from collections.abc import Iterable
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora import dora
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from irtune.models.weights import plain_weight


def loading_options(kind: str, dtype: torch.dtype, device: torch.device, kept: Iterable[str]) -> dict[str, Any]:
    """Options of `from_pretrained` that quantise weights one by one as they are read, straight to `device`.

    Args:
        kind: nf4 or int8.
        dtype: format of the computation and of all that is not quantised.
        device: where this rank computes.
        kept: full names of the linear modules that are not quantised.
    """
    skip = [f"^{re.escape(name)}$" for name in kept]  # a bare name would also stand for names that end with it
    if kind == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            # Bits are stored as numbers of the other constants' format: ZeRO 3 gathers together what has one format.
            bnb_4bit_quant_storage=dtype,
            llm_int8_skip_modules=skip,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return {"quantization_config": config, "device_map": {"": device}}


def settle(model: nn.Module) -> None:
    """Let the quantised modules of a freshly loaded model compute as `Linear4bit` and `Linear8bit` do."""
    # DoRA and HiRA read whole weights. peft's way of reading gives wrong ones (see `_plain_4bit`) and, on CPUs,
    # replaces the module's parameter by a copy without scales and without what ZeRO 3 has noted on it.
    dora.dequantize_module_weight = _module_weight  # type: ignore[assignment]
    importlib.import_module("peft.tuners.hira.bnb").dequantize_bnb_weight = _bnb_weight  # type: ignore[attr-defined]
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.__class__ = Linear4bit
        elif isinstance(module, bnb.nn.Linear8bitLt):
            module.__class__ = Linear8bit


def _module_weight(module: nn.Module) -> torch.Tensor:
    return plain_weight(module) if is_quantized(module) else dequantize_module_weight(module)


def _bnb_weight(weight: Any, state: Any = None) -> torch.Tensor:
    return _plain_4bit(weight) if isinstance(weight, bnb.nn.Params4bit) else dequantize_bnb_weight(weight, state=state)


class _Product(torch.autograd.Function):
    """The product of a quantised module, which keeps nothing for the backward pass.

    bitsandbytes' own keeps a view of the packed weights, and with it, under ZeRO 3, the whole gathered base until the
    backward pass; and, of int8, the input. The module's weights are there again when its backward pass comes.
    """

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, module: "Linear4bit | Linear8bit") -> torch.Tensor:
        """[..., in] -> [..., out]."""
        ctx.module = module
        return module.product(input)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """[..., out] -> [..., in]. Weights and biases of quantised modules are constants."""
        return gradients[0] @ plain_weight(ctx.module).to(gradients[0].dtype), None


class Linear4bit(bnb.nn.Linear4bit):
    """A linear module with nf4 weights that computes in `compute_dtype`, the same in training and in evaluation.

    On CPUs with bf16 instructions bitsandbytes' own repacks its weights in evaluation, for products in bf16, into a
    layout that training and ZeRO 3 then read wrongly.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out] in the input's dtype."""
        return _Product.apply(input.to(self.compute_dtype), self).to(input.dtype)

    def product(self, input: torch.Tensor) -> torch.Tensor:
        """W input + b without gradients."""
        weight: Any = self.weight
        bias = None if self.bias is None else self.bias.to(input.dtype)
        if input.device.type == "cpu":
            return nn.functional.linear(input, plain_weight(self).to(input.dtype), bias)
        return bnb.matmul_4bit(input, weight.data, bias=bias, quant_state=weight.quant_state)

    def dequantized_weight(self) -> torch.Tensor:
        """W, [out, in]."""
        return _plain_4bit(self.weight)


class Linear8bit(bnb.nn.Linear8bitLt):
    """A linear module with int8 weights that computes in the number format of its input."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out] in the input's dtype."""
        return _Product.apply(input, self)

    def product(self, input: torch.Tensor) -> torch.Tensor:
        """W input + b without gradients."""
        return super().forward(input)

    def dequantized_weight(self) -> torch.Tensor:
        """W, [out, in]."""
        weight: Any = self.weight
        scales = weight.SCB if self.state.SCB is None else self.state.SCB  # the first product moves them
        return bnb.functional.int8_vectorwise_dequant(weight.data, scales)


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` holds quantised weights itself."""
    return isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)


def _plain_4bit(weight: Any) -> torch.Tensor:
    # As one row: of rows that end inside a block, bitsandbytes 0.50.2 takes the wrong scales on CPUs with AVX-512
    # (in_features a multiple of 16 but not of 64: 37 % wrong instead of 9 % rounding).
    row = copy.copy(weight.quant_state)
    row.shape = torch.Size([math.prod(row.shape)])
    return bnb.functional.dequantize_4bit(weight.data, row).view(weight.quant_state.shape)


@torch.no_grad()
def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Give `model` plain modules with the weights that its quantised ones compute with, all in `dtype`."""
    for name, module in list(model.named_modules()):
        if is_quantized(module):
            model.set_submodule(name, _plain(module))
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = False  # type: ignore[assignment]
    model.to(dtype)


def _plain(module: Any) -> nn.Module:
    """The module that `module` was before it was quantised, with the rounded weights."""
    weight = plain_weight(module)
    with torch.device("meta"):
        if module.source_cls is Conv1D:
            plain: Any = Conv1D(module.out_features, module.in_features)
            weight = weight.T.contiguous()
        else:
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = module.bias
    return plain.train(module.training)
