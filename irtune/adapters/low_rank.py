"""LoRA and its relatives through peft: low-rank updates beside the linear modules of every layer."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer, dora, layer
from torch import nn

from irtune.adapters.linear import AdapterLinear, add_in_product, compute_in_input_dtype
from irtune.config.schema import AdapterConfig
from irtune.distributed.partitioned import whole
from irtune.errors import ConfigError
from irtune.models import Classifier
from irtune.models.anatomy import linear_names


def wanted_modules(names: list[str], adapter: AdapterConfig) -> list[str]:
    """Those linear modules of a layer that `adapter.target_modules` asks for.

    Raises:
        ConfigError: for a target that matches no linear module of a layer; lists those that exist.
    """
    if adapter.target_modules == "all-linear":
        return names
    targets = adapter.target_modules

    def matches(name: str, target: str) -> bool:
        return name == target or name.endswith(f".{target}")

    unknown = [target for target in targets if not any(matches(name, target) for name in names)]
    if unknown or not targets:
        raise ConfigError(
            f"adapter.target_modules: {', '.join(map(repr, unknown)) or 'an empty list'} matches no linear module "
            f"of a layer; they are: {', '.join(names)}"
        )
    return [name for name in names if any(matches(name, target) for target in targets)]


def target_pattern(names: list[str], layers: str, numbers: str = r"\d+") -> str:
    """A regular expression for the full names of modules `names` in the layers whose number matches `numbers`.

    Full names, because a bare `dense` would also reach a pooler outside the layers.
    """
    return rf"{re.escape(layers)}\.({numbers})\.({'|'.join(re.escape(name) for name in names)})"


@contextlib.contextmanager
def _whole_where_read() -> Iterator[None]:
    """Inside, peft finds a weight whole, on all ranks, where it reads it (DoRA) or takes a part out of it (PiSSA).

    peft's own way depends on a setting of transformers that holds while a model is loaded only.
    """
    reads: Any = dora
    takes: Any = layer
    originals = takes.gather_params_ctx, reads.gather_params_ctx
    takes.gather_params_ctx = lambda weight: whole([weight], write=True)
    reads.gather_params_ctx = whole
    try:
        yield
    finally:
        takes.gather_params_ctx, reads.gather_params_ctx = originals


def add_low_rank(
    classifier: Classifier, adapter: AdapterConfig, *, pattern: str | None = None, **options: Any
) -> nn.Module:
    """Put adapters into all layers of `classifier.model` and make head and adapters the only trainable parameters.

    The update starts at zero (Hu et al. 2022): B is zero, so the model computes what it did before.

    Args:
        classifier: the pretrained model; it is changed.
        adapter: rank, scale, dropout, target modules, number format.
        pattern: full names of the modules that get an adapter, where not those of `adapter.target_modules`.
        options: further settings of peft's LoraConfig.
    """
    anatomy = classifier.anatomy
    if pattern is None:
        pattern = target_pattern(wanted_modules(linear_names(classifier.model, anatomy), adapter), anatomy.layers)
    settings = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # peft divides by it: any number will do
        lora_dropout=adapter.dropout,
        target_modules=pattern,
        modules_to_save=list(anatomy.head),
        **options,
    )
    with _whole_where_read():
        model = get_peft_model(classifier.model, settings)
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
    for module in model.modules():
        if isinstance(module, LoraLayer):
            add_in_product(module)
    return model
