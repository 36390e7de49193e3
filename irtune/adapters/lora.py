"""LoRA and its relatives through peft: low-rank updates beside the linear modules of every layer."""

import re

import torch
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from irtune.config.schema import AdapterConfig
from irtune.errors import ConfigError
from irtune.models import AdapterLinear, Classifier, compute_in_input_dtype, linear_names


def target_pattern(names: list[str], adapter: AdapterConfig, layers: str) -> str:
    """A regular expression for the full names of the modules that get an adapter.

    Full names, because a bare `dense` would also reach a pooler outside the layers.

    Raises:
        ConfigError: for a target that matches no linear module of a layer; lists those that exist.
    """
    if adapter.target_modules == "all-linear":
        wanted = names
    else:
        unknown = [
            target for target in adapter.target_modules
            if not any(name == target or name.endswith(f".{target}") for name in names)
        ]  # fmt: skip
        if unknown or not adapter.target_modules:
            raise ConfigError(
                f"adapter.target_modules: {', '.join(map(repr, unknown)) or 'an empty list'} matches no linear module "
                f"of a layer; they are: {', '.join(names)}"
            )
        wanted = [n for n in names if any(n == t or n.endswith(f".{t}") for t in adapter.target_modules)]
    return rf"{re.escape(layers)}\.\d+\.({'|'.join(re.escape(name) for name in wanted)})"


def add_lora(classifier: Classifier, adapter: AdapterConfig) -> nn.Module:
    """Put adapters into all layers of `classifier.model` and make head and adapters the only trainable parameters.

    The update starts at zero (Hu et al. 2022): B is zero, so the model computes what it did before.
    """
    anatomy = classifier.anatomy
    pattern = target_pattern(linear_names(classifier.model, anatomy), adapter, anatomy.layers)
    model = get_peft_model(
        classifier.model,
        LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=adapter.r,
            lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # peft divides by it: any number will do
            lora_dropout=adapter.dropout,
            use_dora=adapter.type == "dora",
            use_rslora=adapter.type == "rslora",
            target_modules=pattern,
            modules_to_save=list(anatomy.head),
        ),
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if adapter.dtype == "float32":
        for parameter in trained:
            parameter.data = parameter.data.float()
        for name, module in model.named_modules():
            if name.endswith("modules_to_save.default"):
                compute_in_input_dtype(module)
            elif isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = False  # each factor sees to that
                compute_in_input_dtype(module.lora_A, AdapterLinear)
                compute_in_input_dtype(module.lora_B, AdapterLinear)
    else:
        dtype = next(p.dtype for p in classifier.model.parameters() if not p.requires_grad and p.is_floating_point())
        for parameter in trained:
            parameter.data = parameter.data.to(dtype)
    _check_one_dtype(trained)
    return model


def _check_one_dtype(parameters: list[nn.Parameter]) -> None:
    dtypes: set[torch.dtype] = {parameter.dtype for parameter in parameters}
    assert len(dtypes) == 1, f"adapters and head must share one dtype, not {dtypes}"
