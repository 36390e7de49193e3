"""What vLLM 0.33.0 asks of an adapter's folder before it serves it, by the rules of its own loader (vllm/lora:
peft_helper.py, utils.py, lora_model.py, model_manager.py), which needs an installed vLLM. Not its code."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "score", "embed_tokens"}
PREFIX = "base_model.model."
# Settings that must be off, and starts that leave the base's weights as they are.
OFF = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
HEADS = ("score", "classifier")


class RefusedError(Exception):
    """vLLM would not load it."""


class Served(NamedTuple):
    """Updates by module, already scaled, [out, in]; weight [labels, width] and bias of the head."""

    updates: dict[str, torch.Tensor]
    weight: torch.Tensor
    bias: torch.Tensor | None


def load(folder: Path, *, most_rank: int, labels: int, width: int, modules: set[str]) -> Served:
    """The adapter in `folder`, for a model with linear `modules` and a head `score` from `width` to `labels`."""
    record = json.loads((folder / "adapter_config.json").read_text())
    scale = _scale(record, most_rank)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    heads: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        *path, owner, last = name.removeprefix(PREFIX).split(".")
        if owner in ("lora_A", "lora_B") and last == "weight":
            if path[-1] not in modules:
                raise RefusedError(f"unexpected module {name}")
            factors.setdefault(".".join(path), {})[owner] = tensor
        elif owner in HEADS and last in ("weight", "bias"):
            if owner not in (record["modules_to_save"] or ()):
                raise RefusedError(f"{name} is not in modules_to_save")
            heads.setdefault(owner, {})[last] = tensor
        else:
            raise RefusedError(f"{name} is unsupported LoRA weight")
    if list(heads) != ["score"] or "weight" not in heads["score"]:
        raise RefusedError(f"heads {list(heads)}, and the model's is score")
    weight, bias = heads["score"]["weight"], heads["score"].get("bias")
    if weight.ndim != 2 or not 1 <= len(weight) <= labels or weight.shape[1] != width:
        raise RefusedError(f"a head of shape {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RefusedError(f"a bias of shape {tuple(bias.shape)}")
    updates = {name: scale * pair["lora_B"].float() @ pair["lora_A"].float() for name, pair in factors.items()}
    return Served(updates, weight, bias)


def _scale(record: dict, most_rank: int) -> float:
    """The factor of the update, from adapter_config.json."""
    missing = {"r", "lora_alpha", "target_modules"} - record.keys()
    wrong = [name for name in OFF if record.get(name)]
    wrong += [name for name in record.get("modules_to_save") or () if name not in HEADS]
    start = record.get("init_lora_weights")
    wrong += [start] if isinstance(start, str) and start not in STARTS else []
    if missing or wrong:
        raise RefusedError(f"missing {missing}, not supported {wrong}")
    if not 0 < record["r"] <= most_rank or record.get("bias", "none") != "none":
        raise RefusedError(f"rank {record['r']} of {most_rank}, or a bias")
    assert not record["rank_pattern"] and not record["alpha_pattern"]
    return record["lora_alpha"] / (math.sqrt(record["r"]) if record.get("use_rslora") else record["r"])
