"""The adapter folder of a run: peft's format where peft has the type, else the same two files with irtune's own types.

adapter_config.json        irtune_version, adapter (its section of the configuration), run (see RunFacts), labels,
                           pooling (model.pooling and model.head, where the head is irtune's)
adapter_model.safetensors  parameters by name; of type none, only layers that were ever trained
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from irtune import __version__
from irtune.adapters.build import add_adapters
from irtune.config.schema import AdapterConfig
from irtune.errors import CheckpointError
from irtune.models import Classifier, RunFacts
from irtune.models.pooling import Pooling, pooling_of

UNKNOWN = RunFacts()
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_adapter(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    adapter: AdapterConfig,
    labels: list[str],
    pooling: Pooling | None = None,
    run: RunFacts = UNKNOWN,
) -> None:
    """Write adapters and head of a type, or with a head, that peft does not have."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    record = {"irtune_version": __version__, "adapter": vars(adapter), "run": vars(run), "labels": labels}
    if pooling is not None:
        record["pooling"] = pooling._asdict()
    (folder / CONFIG).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_adapter(classifier: Classifier, folder: Path) -> nn.Module:
    """Put the adapters of a folder that `write_adapter` wrote into a freshly loaded base; returns the model to call.

    Its forward pass takes a batch (input_ids, attention_mask) and returns an object with `logits` [batch, classes].

    Raises:
        CheckpointError: when a file is missing, damaged or of peft's format, or does not fit the base.
    """
    try:
        record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} holds no readable adapter: {error}") from error
    if "irtune_version" not in record:
        raise CheckpointError(f"{folder} holds an adapter in peft's format; load it with peft.PeftModel")
    pooling = pooling_of(classifier.model)
    if record.get("pooling") != (pooling and pooling._asdict()):
        wanted = Pooling(**(record.get("pooling") or {"kind": "class", "head": "linear"}))
        raise CheckpointError(
            f"{folder} was trained with model.pooling {wanted.kind} and model.head {wanted.head}; load the base with "
            f"ModelConfig(pooling={wanted.kind!r}, head={wanted.head!r})"
        )
    classifier.run = RunFacts(**record.get("run", {}))
    model, table = add_adapters(classifier, AdapterConfig(**record["adapter"]))
    parameters = dict([*table.all(), *table.decided()])
    wrong = [
        name for name, tensor in tensors.items() if name not in parameters or parameters[name].shape != tensor.shape
    ]
    if wrong:
        raise CheckpointError(f"{folder}: {wrong[0]} does not fit this base model ({len(wrong)} such parameters)")
    for name, tensor in tensors.items():
        parameters[name].data.copy_(tensor)
    return model.eval()
