"""Quantised tiny models, and the plain ones that must compute the same."""

from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from irtune.config import ModelConfig
from irtune.models import Classifier, load_classifier
from irtune.models.quantization import is_quantized

LABELS = ["delighted teacher", "night-watch", "harbour"]  # words of the tiny vocabulary
BATCH = {
    "input_ids": torch.tensor([[4, 9, 11, 7, 5, 8], [6, 12, 10, 0, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
}


def load(folder: Path, quantization: str, dtype: str = "float32") -> Classifier:
    """A classifier with the head of seed 3, and padding in its batch."""
    torch.manual_seed(3)
    config = ModelConfig(name_or_path=str(folder), dtype=dtype, quantization=quantization)
    return load_classifier(config, LABELS)


def batch_for(model: nn.Module) -> dict[str, torch.Tensor]:
    return BATCH | {
        "input_ids": BATCH["input_ids"].masked_fill(BATCH["attention_mask"] == 0, model.config.pad_token_id)
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def rounded(module: nn.Module) -> torch.Tensor:
    """The weight that a quantised module stands for, [out, in], by hand from its bits."""
    weight = module.weight
    if not hasattr(weight, "quant_state"):
        scales = weight.SCB if module.state.SCB is None else module.state.SCB
        return weight.data.float() * scales[:, None] / 127
    state, packed = weight.quant_state, weight.data.contiguous().view(torch.uint8).flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    inner = state.state2  # the scales of 64 weights, of which 256 share a scale
    scales = inner.code[state.absmax.long()] * inner.absmax.repeat_interleave(256)[: state.absmax.numel()]
    scales = (scales + state.offset).repeat_interleave(64)[: codes.numel()]
    return (state.code[codes] * scales).view(state.shape).to(state.dtype)


@torch.no_grad()
def reference(folder: Path, quantized: Classifier, dtype: str) -> nn.Module:
    """The plain model with the rounded weights of `quantized`."""
    plain = load(folder, "none", dtype).model
    for name, module in quantized.model.named_modules():
        if is_quantized(module):
            target = plain.get_submodule(name)
            weight = rounded(module)
            target.weight.copy_(weight.T if isinstance(target, Conv1D) else weight)
    return plain
