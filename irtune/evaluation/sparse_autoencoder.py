"""Which features of a sparse autoencoder candidates share with a target (MONA, Ma et al. 2025).

The folder of one has cfg.json and sae.safetensors as EleutherAI's published ones have.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from irtune.distributed import runtime
from irtune.errors import RunError, one_line
from irtune.files import read_object, replacing, write_json

ACTIVE = 192  # features of a token, as in the paper
EXPANSION = 8  # features per dimension of a state; the paper's published one has 32
BATCH, STEPS = 512, 1000
RATE = 2e-4  # of Adam for 2^14 features; others by the inverse root of their number, as EleutherAI trains them
MAX_BYTES = 2**20
NAMES = {"encoder": "encoder.weight", "bias": "encoder.bias", "decoder": "W_dec", "center": "b_dec"}


@dataclass
class SparseAutoencoder:
    """fp32 tensors. encoder, decoder: [features, width]; bias: [features]; center: [width]."""

    encoder: torch.Tensor
    bias: torch.Tensor
    decoder: torch.Tensor
    center: torch.Tensor
    active: int = ACTIVE

    def features(self, states: torch.Tensor) -> torch.Tensor:
        """relu of the `active` largest of encoder (h - center) + bias, the others 0: [..., features]."""
        values = ((states.float() - self.center) @ self.encoder.T + self.bias).relu()
        kept = values.topk(min(self.active, values.shape[-1]), dim=-1)
        return torch.zeros_like(values).scatter(-1, kept.indices, kept.values)

    def unexplained(self, states: torch.Tensor) -> torch.Tensor:
        """Share of the variance of `states` [n, width] that the decoder does not give back."""
        states = states.float()
        error = states - self.center - self.features(states) @ self.decoder
        return error.square().sum() / (states - states.mean(0)).square().sum().clamp(min=1e-12)

    def tensors(self) -> dict[str, torch.Tensor]:
        """By their names in the file."""
        return {name: getattr(self, own) for own, name in NAMES.items()}


def train_autoencoder(states: torch.Tensor, *, seed: int = 0, steps: int = STEPS) -> tuple[SparseAutoencoder, float]:
    """An autoencoder of `states` [n, width], fp32, and the share of variance that it leaves unexplained. Collective:
    all ranks get that of rank 0.
    """
    width = states.shape[1]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(EXPANSION * width, width, generator=generator)
    rows = (rows / rows.norm(dim=1, keepdim=True)).to(states.device)
    bias, center = torch.zeros(len(rows), device=rows.device), states.mean(0)
    found = SparseAutoencoder(rows.clone(), bias, rows, center, min(ACTIVE, len(rows)))
    parameters = list(found.tensors().values())
    optimizer = torch.optim.Adam(parameters, lr=RATE / math.sqrt(len(rows) / 2**14))
    for parameter in parameters:
        parameter.requires_grad_(True)
    for _ in range(steps):
        chosen = torch.randint(len(states), (min(BATCH, len(states)),), generator=generator)
        optimizer.zero_grad()
        found.unexplained(states[chosen.to(states.device)]).backward()
        optimizer.step()
        with torch.no_grad():  # else features shrink while the decoder grows
            found.decoder /= found.decoder.norm(dim=1, keepdim=True).clamp(min=1e-12)
    for parameter in parameters:
        parameter.requires_grad_(False)
        if runtime.rank():
            parameter.zero_()
        runtime.all_reduce(parameter)
    return found, float(found.unexplained(states))


def similarity(features: torch.Tensor, prototype: torch.Tensor) -> torch.Tensor:
    """Sum of the lesser over sum of the larger values, [n], of `features` [n, f] and `prototype` [f], none negative."""
    larger = torch.maximum(features, prototype).sum(-1)
    return torch.minimum(features, prototype).sum(-1) / larger.clamp(min=1e-12)


def save_autoencoder(found: SparseAutoencoder, folder: Path, base: str) -> None:
    """Write the folder, complete or not at all. `base`: the model whose states it codes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as scratch:
        scratch.mkdir()
        features, width = found.encoder.shape
        write_json(scratch / "cfg.json", {"d_in": width, "expansion_factor": features // width, "num_latents": features,
                                          "k": found.active, "base_model": base})  # fmt: skip
        save_file({name: tensor.cpu().contiguous() for name, tensor in found.tensors().items()},
                  scratch / "sae.safetensors")  # fmt: skip


def load_autoencoder(folder: Path, width: int, base: str, device: torch.device) -> SparseAutoencoder:
    """The autoencoder of a folder.

    Raises:
        RunError: for files that cannot be read or do not fit together, and for one of another width or model.
    """
    settings: dict[str, Any] = read_object(folder / "cfg.json", MAX_BYTES, RunError)
    try:
        tensors = load_file(folder / "sae.safetensors")
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder / 'sae.safetensors'} cannot be read: {one_line(error)}") from error
    shapes = {name: tuple(tensors[name].shape) for name in NAMES.values() if name in tensors}
    features = shapes.get("encoder.bias", (0,))[0]
    own = shapes.get("b_dec", (0,))[0]
    wanted = {"encoder.weight": (features, own), "encoder.bias": (features,), "W_dec": (features, own), "b_dec": (own,)}
    active = settings.get("k")
    if shapes != wanted or not isinstance(active, int) or not 0 < active <= features:
        raise RunError(
            f"{folder} is not a sparse autoencoder with {', '.join(wanted)} of fitting shapes and k in cfg.json"
        )
    if own != width:
        raise RunError(f"--sae {folder} codes states of {own} dimensions, and those of the run have {width}")
    other = settings.get("base_model", base)
    if other != base:
        raise RunError(
            f"--sae {folder} is of the model {other}, and the run's base is {base}; train one with --train-sae"
        )
    parts = {item.name: tensors[NAMES[item.name]].float().to(device) for item in fields(SparseAutoencoder)
             if item.name in NAMES}  # fmt: skip
    return SparseAutoencoder(**parts, active=active)
