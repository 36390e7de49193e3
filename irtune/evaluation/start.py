"""The start of a run from another run's adapter and head, `model.start_from`."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from irtune.adapters import LayerTable, adapter_traits
from irtune.config.schema import AdapterConfig
from irtune.distributed.partitioned import whole_shape, write_whole
from irtune.errors import ConfigError, RunError
from irtune.evaluation.saved_run import ADAPTER_FILES, DRAWN, adapter_folder, is_merged, is_peft_adapter, read_object
from irtune.models.pooling import HEAD_NAME, pooling_of

log = logging.getLogger("irtune")
# Settings of peft that change what the same values compute, and the key of irtune that sets them.
SCALES = {"r": "r", "lora_alpha": "alpha", "use_rslora": "type", "use_dora": "type", "init_lora_weights": "type",
          "alpha": "alpha", "randlora_alpha": "alpha", "scaling": "scale"}  # fmt: skip

# Keys of adapter that change what the same values compute, in irtune's own format.
FACTORS = ("alpha", "scale", "activation", "placement", "prompt_lr", "label_head")


def start_from(place: str, model: nn.Module, table: LayerTable, adapter: AdapterConfig, labels: Sequence[str]) -> None:
    """Give fresh adapters and a fresh head the values that another run learnt, in place.

    The head's rows follow the names of the labels; where the labels are others, or not known, its rows start anew, and
    with another pooling or kind of head all of it. Collective where parameters are partitioned.

    Args:
        place: folder of a run, or of an adapter, also of one that plain peft has written.
        model: with its adapters, under no engine yet.
        table: of the model.
        adapter: of this run.
        labels: of this run's corpus.

    Raises:
        ConfigError: when the adapter there is another than this run's; names the key to change.
        RunError: when there is no adapter, or one with settings of peft that irtune does not know.
    """
    if adapter_traits(adapter).pretrained:
        raise ConfigError(
            f"model.start_from does not go with adapter.type {adapter.type}, which trains the model's own weights; "
            "export that run with --merge and set model.name_or_path to the exported folder"
        )
    given = Path(place).expanduser()
    if is_merged(given):
        raise ConfigError(
            f"model.start_from: {given} holds a merged model and no adapter; set model.name_or_path to it, and leave "
            "model.start_from out"
        )
    folder = adapter_folder(given)
    peft = is_peft_adapter(folder, given, values=True)
    record = read_object(folder / ADAPTER_FILES[0])
    _compare(folder, record, model, adapter, peft)
    try:
        tensors = load_file(folder / ADAPTER_FILES[1])
    except (OSError, SafetensorError) as error:
        raise RunError(f"model.start_from: {folder / ADAPTER_FILES[1]} cannot be read") from error
    names = {name: _name_in_file(name, tensors) if peft else name for name, _ in table.all()}
    for name, parameter in (item for layer in table.layers for item in layer):
        saved = tensors.get(names[name])
        shape = whole_shape(parameter)
        if saved is None or saved.shape != shape:
            found = "is not there" if saved is None else f"has shape {tuple(saved.shape)} there"
            raise ConfigError(
                f"model.start_from: {names[name]} {found} and {tuple(shape)} here; set model.name_or_path "
                f"and the section adapter as they were for {folder}"
            )
        write_whole(parameter, saved)
    for name, tensor in table.decided():
        if name in tensors and tensors[name].shape == tensor.shape:
            tensor.copy_(tensors[name])
    pooling = pooling_of(model)
    if record.get("pooling") != (pooling and pooling._asdict()):  # what the head there read, this one does not
        tensors = {name: tensor for name, tensor in tensors.items() if HEAD_NAME not in name}
    _copy_head(given, folder, record, {names[name]: parameter for name, parameter in table.head}, tensors, labels)
    log.info("adapters and head start from %s", folder)


def _compare(folder: Path, record: Mapping[str, Any], model: nn.Module, adapter: AdapterConfig, peft: bool) -> None:
    """Raise a ConfigError where the adapter of `folder` computes something else with the same values."""
    if not peft:
        there = record["adapter"]["type"] if isinstance(record.get("adapter"), dict) else None
        if there != adapter.type:
            raise ConfigError(f"model.start_from: {folder} has adapter.type {there}, not {adapter.type}")
        settings = vars(AdapterConfig()) | record["adapter"]
        for key in FACTORS:
            if settings[key] != getattr(adapter, key):
                raise ConfigError(
                    f"model.start_from: {folder} has adapter.{key} {settings[key]!r}, not {getattr(adapter, key)!r}; "
                    f"set adapter.{key} as it was there"
                )
        return
    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"model.start_from: {folder} holds low-rank updates; set adapter.type as it was there, not {adapter.type}"
        )
    here: Any = model.peft_config["default"]
    if record["peft_type"] != here.peft_type:
        raise ConfigError(
            f"model.start_from: {folder} holds an adapter of peft's type {record['peft_type']}, and adapter.type "
            f"{adapter.type} is of {here.peft_type.value}; set adapter.type as it was there"
        )
    for name, key in SCALES.items():
        drawn = name == "init_lora_weights" and record.get(name) in DRAWN and getattr(here, name) in DRAWN
        if hasattr(here, name) and not drawn and record.get(name) != getattr(here, name):
            raise ConfigError(
                f"model.start_from: {folder} has {name} {record.get(name)!r} where adapter.{key} makes it "
                f"{getattr(here, name)!r}; set adapter.{key} as it was there"
            )


def _name_in_file(name: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """What peft calls a parameter in its file: without the adapter's name."""
    plain = name.replace(".modules_to_save.default.", ".").replace(".default.", ".").removesuffix(".default")
    return plain if plain in tensors else plain.removesuffix(".weight") if ".lora_magnitude" in plain else plain


def _copy_head(
    given: Path,
    folder: Path,
    record: Mapping[str, Any],
    head: Mapping[str, nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
    labels: Sequence[str],
) -> None:
    """Copy what lies outside the layers; rows that stand for labels by the labels' names."""
    before = _labels(given, record)
    rows = len(before) if before else len(labels)
    order = [before.index(label) for label in labels] if before and sorted(before) == sorted(labels) else None
    anew = False
    pairs = record.get("adapter", {}).get("label_head") == "entailment"  # whose two rows stand for no label
    for name, parameter in head.items():
        saved = tensors.get(name)
        by_label = saved is not None and saved.dim() > 0 and saved.shape[0] == rows and not pairs
        if by_label and order is not None:
            saved = saved[order]  # type: ignore[index]
        if saved is None or saved.shape != whole_shape(parameter) or (by_label and order is None):
            anew = True
        else:
            write_whole(parameter, saved)
    if anew:
        if not before:
            why = "for labels that are not known"
        elif order is None:
            why = f"for other labels ({', '.join(before)})"
        else:
            why = "of another model.pooling or model.head"
        log.info("the head of %s is %s: it starts anew", folder, why)


def _labels(given: Path, record: Mapping[str, Any]) -> list[str]:
    """Labels of a run, or of an adapter of irtune's own format; none where nothing says."""
    if isinstance(record.get("labels"), list):
        return [str(label) for label in record["labels"]]
    file = given / "results.json"
    results = read_object(file) if file.is_file() else {}
    dev = results.get("dev")
    return list(dev["per_class"]) if isinstance(dev, dict) and isinstance(dev.get("per_class"), dict) else []
