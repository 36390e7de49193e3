"""Types of peft that live in layers, all built here; each has a file in kinds/ that says which settings it takes.

Their parameters lie in dictionaries of a module that replaces the linear one, and are used by its forward pass.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig, TaskType, get_peft_model
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from irtune.adapters.linear import compute_in_input_dtype
from irtune.adapters.targets import module_targets
from irtune.config.schema import AdapterConfig
from irtune.distributed.partitioned import used_by
from irtune.errors import ConfigError, one_line
from irtune.models import Classifier

# Settings of peft that a model's shape may not allow -> the key that sets them.
KEYS = {"r": "adapter.r"} | dict.fromkeys(
    ("group_size", "n_frequency", "boft_block_size", "oft_block_size"), "adapter.size"
)


def add_from_peft(
    classifier: Classifier,
    adapter: AdapterConfig,
    settings: Callable[..., PeftConfig],
    *,
    pattern: str | list[str] | None = None,
    **options: Any,
) -> nn.Module:
    """Put adapters of one of peft's types into all layers; they and the head become all that trains.

    Args:
        classifier: the pretrained model; it is changed.
        adapter: target modules and number format.
        settings: the type's class of settings.
        pattern: full names of the modules that get an adapter, where not those of `adapter.target_modules`.
        options: the type's settings.

    Raises:
        ConfigError: when peft has no such adapter for one of the modules.
    """
    model: Any = classifier.model
    frozen = next(p.dtype for p in model.parameters() if p.is_floating_point())
    config: Any = settings(
        task_type=TaskType.SEQ_CLS,
        target_modules=module_targets(classifier, adapter) if pattern is None else pattern,
        modules_to_save=list(classifier.anatomy.head),
        **options,
    )
    try:  # its own conversion to fp32 would make constants trainable; its warnings are about what is meant here
        with warnings.catch_warnings(action="ignore"):
            adapted: Any = get_peft_model(model, config, autocast_adapter_dtype=False)
    except (ValueError, TypeError, NotImplementedError) as error:
        keys = [*(KEYS[name] for name in options if name in KEYS), "adapter.target_modules"]
        raise ConfigError(
            f"adapter.type {adapter.type} does not fit {type(model).__name__}: {one_line(error)}; change "
            f"{', '.join(keys)}, or set adapter.type to lora"
        ) from error
    config.modules_to_save = list(classifier.anatomy.head)  # to which peft adds what heads are called elsewhere
    dtype = torch.float32 if adapter.dtype == "float32" else frozen
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    for name, part in adapted.named_modules():
        if isinstance(part, BufferDict):  # norms, random matrices
            part.update({key: tensor.to(dtype) for key, tensor in part.items()})
        elif isinstance(part, nn.Module) and isinstance(part, BaseTunerLayer):
            used_by(part, part.parameters())
        elif name.endswith("modules_to_save.default") and dtype == torch.float32:
            compute_in_input_dtype(part)
    return adapted
