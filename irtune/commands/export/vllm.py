"""What vLLM says to an exported adapter: the command that serves it, or why it cannot.

vLLM reads peft's files with a loader of its own, which knows less. The rules here are those of vLLM 0.33.0, in
vllm/lora: peft_helper.py (settings), utils.py (names of weights), lora_model.py and model_manager.py (heads).
"""

import json
import shlex
from pathlib import Path
from typing import Any

from safetensors import safe_open

from irtune.config import Config
from irtune.tasks import task_of

VERSION = "0.33.0"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank accepts
HEAD = "score"  # of decoders, which vLLM gives a head itself; an encoder's base has none that it could replace
MERGED = "a merged export (--merge) can be served"
NAME = "irtune"  # of the adapter, in requests


def refusal(config: Config, folder: Path, *, merged: bool) -> str | None:
    """Why vLLM cannot serve the export in `folder`, or None where it can if it has the architecture."""
    if config.model.pooling != "class":
        return (
            f"model.pooling {config.model.pooling} has a head of irtune's own; train with model.pooling class, which "
            "in a decoder reads the last token, to serve it with vLLM"
        )
    if merged:
        return None
    record = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if record.get("peft_type") != "LORA":
        return f"adapter.type {config.adapter.type} is not one of LoRA's that vLLM has; {MERGED} where it can be merged"
    kind = "dora" if record.get("use_dora") else record.get("init_lora_weights")
    if isinstance(kind, str):
        return f"vLLM does not load adapter.type {kind}; {MERGED}"
    if record.get("target_parameters"):
        return f"adapter.target_parameters is not among what vLLM loads in peft's layout; {MERGED}"
    if record["r"] > RANKS[-1]:
        return f"adapter.r is {record['r']}, and vLLM takes ranks up to {RANKS[-1]}; {MERGED}"
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as weights:
        names = [name.removeprefix("base_model.model.") for name in weights.keys()]  # noqa: SIM118  (not a mapping)
    heads = {name.rpartition(".")[0] for name in names if ".lora_" not in name}
    if heads != {HEAD}:
        return f"its head is {', '.join(sorted(heads))}, and vLLM gives a base without one only {HEAD!r}; {MERGED}"
    return None


def section(config: Config, labels: list[str], folder: Path, *, merged: bool) -> str:
    """The card's paragraph about how vLLM serves the export in `folder`."""
    return (
        f"If vLLM ({VERSION} was looked at) has the architecture{'' if merged else ' and LoRA for it'}:\n\n"
        f"```bash\n{command(config, labels, folder, merged=merged)}\n```\n\n"
        f'POST /classify takes {{"model": "{"THIS_FOLDER" if merged else NAME}", "input": [IDS]}}, where IDS are the '
        "token ids of a text as the code above makes them; `probs` are in the order of the labels: "
        f"{', '.join(labels)}."
    )


def command(config: Config, labels: list[str], folder: Path, *, merged: bool) -> str:
    """How vLLM serves the export in `folder`."""
    if merged:  # its config.json says the rest
        return "vllm serve THIS_FOLDER --runner pooling --convert classify"
    record: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    head = {"num_labels": len(labels), "problem_type": task_of(config.data).problem_type}
    return " ".join([
        f"vllm serve {shlex.quote(config.model.name_or_path)} --runner pooling --convert classify",
        f"--hf-overrides {shlex.quote(json.dumps(head))} --dtype {config.model.dtype}",
        f"--enable-lora --max-lora-rank {next(rank for rank in RANKS if rank >= record['r'])}",
        f"--lora-modules {NAME}=THIS_FOLDER",
    ])  # fmt: skip
