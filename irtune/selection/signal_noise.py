"""Signal-to-noise ratios of weight matrices (Spectrum, Hartford et al. 2024, arXiv 2406.06623)."""

import math

import torch
from torch import nn

from irtune.distributed.partitioned import whole
from irtune.models.anatomy import Anatomy, is_linear
from irtune.models.weights import plain_weight


def signal_to_noise(weight: torch.Tensor) -> float:
    """Sum of the singular values of `weight` [rows, columns] above the noise threshold over that of those below it.

    Noise is taken to follow the Marchenko-Pastur law: sigma = IQR(S) / 1.349, threshold = sigma (1 + sqrt(beta)) with
    beta = smaller / larger dimension. The ratio is divided by the largest singular value. Infinite when nothing is
    below the threshold, 0 for a matrix of zeros.
    """
    singular = torch.linalg.svdvals(weight.detach().float())
    if float(singular[0]) == 0:
        return 0.0
    low, high = torch.quantile(singular, torch.tensor([0.25, 0.75], device=singular.device)).tolist()
    sigma = (high - low) / 1.349
    threshold = sigma * (1 + math.sqrt(min(weight.shape) / max(weight.shape)))
    noise = float(singular[singular <= threshold].sum())
    signal = float(singular[singular > threshold].sum())
    return (signal / noise if noise else math.inf) / float(singular[0])


def layer_ratios(model: nn.Module, anatomy: Anatomy) -> dict[str, list[float]]:
    """The L ratios of each linear module of a layer, for example `self_attn.q_proj`; layers without it have 0.

    Of a quantised base, they are those of the rounded weights, with which the model computes. Collective where weights
    are partitioned, which are gathered one at a time.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ratios: dict[str, list[float]] = {}
    for number, layer in enumerate(model.get_submodule(anatomy.layers).children()):
        for name, module in layer.named_modules():
            if is_linear(module):
                values = ratios.setdefault(name, [0.0] * anatomy.num_layers)
                with whole(module.parameters(recurse=False)):
                    values[number] = signal_to_noise(plain_weight(module).to(device))
    return ratios
