"""LoRA and its relatives through peft: low-rank updates beside the linear modules of every layer."""

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any

from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer, dora, layer
from torch import nn

from irtune.adapters.linear import AdapterLinear, add_in_product, compute_in_input_dtype
from irtune.adapters.targets import differences, kept_by_peft, module_targets, parameter_targets
from irtune.config.schema import AdapterConfig
from irtune.distributed.partitioned import whole
from irtune.errors import ConfigError
from irtune.models import Classifier
from irtune.models.anatomy import is_linear

log = logging.getLogger("irtune")


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


def _asked(model: nn.Module, settings: LoraConfig) -> list[str]:
    """Full names of the modules that `settings` target."""
    targets = settings.target_modules
    if isinstance(targets, str):
        return [name for name, module in model.named_modules() if is_linear(module) and re.fullmatch(targets, name)]
    return sorted(targets or ())


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
    modules = module_targets(classifier, adapter) if pattern is None else pattern
    parameters = parameter_targets(classifier, adapter)
    settings = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # peft divides by it: any number will do
        lora_dropout=adapter.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        modules_to_save=list(anatomy.head),
        **options,
    )
    settings = kept_by_peft(classifier.model, settings, named=adapter.target_modules != "all-linear")
    asked = [*_asked(classifier.model, settings), *parameters]
    if not asked:
        raise ConfigError(
            f"adapter.type {adapter.type}: no linear module of {type(classifier.model).__name__} can have an adapter; "
            "set adapter.target_parameters, or adapter.type to bitfit or none"
        )
    targets = settings.target_modules
    with _whole_where_read():
        model = get_peft_model(classifier.model, settings)
    settings.target_modules = targets  # of a list of 20 full names or more, peft keeps only their endings
    settings.modules_to_save = list(anatomy.head)  # to which peft adds what heads are called elsewhere
    difference = differences(model, asked)
    if difference is not None:
        log.warning("%s", difference)
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
