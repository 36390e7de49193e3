"""What weights stand for, whatever holds them: packed, partitioned, or as they are."""

import math

import torch
from torch import nn


def elements(parameter: torch.Tensor) -> int:
    """Weights that `parameter` stands for: packed or partitioned ones have fewer numbers than weights."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return math.prod(state.shape)
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # of ZeRO 3's shares, that of the whole


def plain_weight(module: nn.Module) -> torch.Tensor:
    """The weight that a linear module computes with: its own, or the quantised one as floating-point numbers.

    Shape [out, in] (GPT-2's Conv1D: [in, out] while it is not quantised). Quantised ones are dequantised by each call.
    """
    dequantized = getattr(module, "dequantized_weight", None)  # of the modules of quantization.py
    return module.weight if dequantized is None else dequantized()  # type: ignore[return-value]
