"""Which modules and weights of the layers get a low-rank update, and how peft is told so that it does that and no more.

peft (0.21) rewrites a configuration for some mixture-of-experts models: names that their experts had in older files
(up_proj, w1) become names of weights, in whatever part of the model. So its own conversion is tried on a copy; where it
would change anything, modules are named one by one and those with such a name are left to adapter.target_parameters.
"""

import copy
import logging
import re
from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from irtune.adapters.trainable import layer_list
from irtune.config.schema import AdapterConfig
from irtune.distributed.partitioned import is_partitioned, runnable
from irtune.errors import ConfigError
from irtune.models import Classifier
from irtune.models.anatomy import is_linear, linear_names, weight_names
from irtune.models.kernels import without_flash_on_cpu
from irtune.models.limits import cannot_read

log = logging.getLogger("irtune")
TOKENS = 16  # of the text by which is found out which modules are called


def wanted_modules(names: list[str], adapter: AdapterConfig, weights: Iterable[str] = ()) -> list[str]:
    """Those linear modules of a layer that `adapter.target_modules` asks for.

    Args:
        names: of the linear modules of a layer.
        adapter: with the targets.
        weights: names of what `adapter.target_parameters` could ask for, which an error lists.

    Raises:
        ConfigError: for a target that matches no linear module of a layer; lists those that exist.
    """
    if adapter.target_modules == "all-linear":
        return names
    targets = adapter.target_modules
    unknown = [target for target in targets if not any(_matches(name, target) for name in names)]
    if unknown or (not targets and not adapter.target_parameters):
        others = f"; adapter.target_parameters can name {', '.join(weights)}" if weights else ""
        raise ConfigError(
            f"adapter.target_modules: {', '.join(map(repr, unknown)) or 'an empty list'} matches no linear module "
            f"of a layer; they are: {', '.join(names)}{others}"
        )
    return [name for name in names if any(_matches(name, target) for target in targets)]


def target_pattern(names: list[str], layers: str, numbers: str = r"\d+") -> str:
    """A regular expression for the full names of modules `names` in the layers whose number matches `numbers`.

    Full names, because a bare `dense` would also reach a pooler outside the layers.
    """
    return rf"{re.escape(layers)}\.({numbers})\.({'|'.join(re.escape(name) for name in names)})"


def module_targets(classifier: Classifier, adapter: AdapterConfig) -> str | list[str]:
    """What peft's `target_modules` is for `adapter`: a pattern of full names, or an empty list.

    Raises:
        ConfigError: for a target that does not exist, or that the model does not call.
    """
    model, anatomy = classifier.model, classifier.anatomy
    names = linear_names(model, anatomy)
    wanted = wanted_modules(names, adapter, weight_names(model, anatomy))
    idle = [name for name in _never_called(classifier, names) if name in wanted]
    if idle:
        reason = f"{type(model).__name__} reads the weights of {', '.join(idle)} and never calls them"
        if adapter.target_modules != "all-linear":
            raise ConfigError(f"adapter.target_modules: {reason}, so an adapter beside them would do nothing")
        log.warning("%s: they get no adapter", reason)
        wanted = [name for name in wanted if name not in idle]
    stacks = weight_names(model, anatomy, dims=(3,))
    if stacks and adapter.target_modules == "all-linear" and not adapter.target_parameters:
        log.warning(
            "%s: %s are not linear modules and get no adapter; adapter.target_parameters can name them",
            type(model).__name__,
            ", ".join(stacks),
        )
    return target_pattern(wanted, anatomy.layers) if wanted else []


def parameter_targets(classifier: Classifier, adapter: AdapterConfig) -> list[str]:
    """Full names of the weights that `adapter.target_parameters` asks for.

    Raises:
        ConfigError: for a name that matches none; lists those that exist.
    """
    model, anatomy = classifier.model, classifier.anatomy
    known = weight_names(model, anatomy)
    linear = [f"{name}.weight" for name in linear_names(model, anatomy)]
    unknown = [t for t in adapter.target_parameters if not any(_matches(name, t) for name in (*known, *linear))]
    if unknown:
        raise ConfigError(
            f"adapter.target_parameters: {', '.join(map(repr, unknown))} matches no weight of a layer; beside the "
            f"weights of linear modules there are: {', '.join(known) or 'none'}"
        )
    inside = re.compile(rf"{re.escape(anatomy.layers)}\.\d+\.(.+)")
    return [
        name
        for name, _ in model.named_parameters()
        if (match := inside.fullmatch(name)) and any(_matches(match[1], t) for t in adapter.target_parameters)
    ]


def kept_by_peft(model: nn.Module, settings: LoraConfig, *, named: bool) -> LoraConfig:
    """`settings`, or the same targets in a form that peft does not rewrite for this model.

    Raises:
        ConfigError: when targets were `named` by the user and peft cannot be kept from rewriting them.
    """
    if not _rewrites(model, settings) or not isinstance(settings.target_modules, str):
        return settings
    pattern = re.compile(settings.target_modules)
    full = [name for name, module in model.named_modules() if is_linear(module) and pattern.fullmatch(name)]
    lost = [name for name in full if _rewrites(model, _with_modules(settings, [name]))]
    kept = [name for name in full if name not in lost]
    if lost:
        short = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in lost})
        reason = (
            f"peft would turn the modules {', '.join(short)} of {type(model).__name__} into its experts; "
            f"adapter.target_parameters can name {', '.join(f'{name}.weight' for name in short)}"
        )
        if named:
            raise ConfigError(f"adapter.target_modules: {reason}")
        log.warning("%s: they get no adapter", reason)
    return _with_modules(settings, kept)


def _with_modules(settings: LoraConfig, modules: list[str]) -> LoraConfig:
    """`settings` with other target modules."""
    other = copy.deepcopy(settings)
    other.target_modules = modules
    return other


def differences(model: Any, asked: Iterable[str]) -> str | None:
    """One line about what peft targeted beside or instead of `asked`, full names; None where it did as asked."""
    found = {*model.base_model.targeted_module_names, *model.base_model.targeted_parameter_names}
    more, less = sorted(found - set(asked)), sorted(set(asked) - found)
    parts = [f"{len(names)} {what} ({names[0]} first)" for names, what in ((more, "more"), (less, "fewer")) if names]
    return f"peft put adapters elsewhere than asked: {' and '.join(parts)}" if parts else None


def _rewrites(model: nn.Module, settings: LoraConfig) -> bool:
    """Whether peft's conversion would change what `settings` target; some targets it refuses."""
    trial = copy.deepcopy(settings)
    try:
        convert_peft_config_for_transformers(trial, model=model, conversions=None)
    except ValueError:
        return True

    def content(config: LoraConfig) -> tuple[Any, ...]:
        targets = config.target_modules
        plain = targets if isinstance(targets, str) else frozenset(targets or ())
        return plain, frozenset(config.target_parameters or ()), config.rank_pattern, config.alpha_pattern

    return content(trial) != content(settings)


def _never_called(classifier: Classifier, names: list[str]) -> list[str]:
    """Those linear modules of a layer, by name, that no layer calls when the model reads a text.

    Of modules in a list, such as experts, one that is called speaks for all. Collective where weights are partitioned.
    """
    model: Any = classifier.model
    if any(parameter.is_meta for parameter in model.parameters()):
        return []
    called: set[str] = set()

    def note(name: str) -> Any:
        return lambda *_: called.add(name)

    handles = []
    for layer in layer_list(classifier):
        for name, module in layer.named_modules():
            if name in names:
                handles.append(module.register_forward_pre_hook(note(_group(name))))
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), without_flash_on_cpu(model), runnable(model, layer_list(classifier)):
            ids = torch.arange(TOKENS, device=model.device).remainder(model.get_input_embeddings().num_embeddings)
            model(input_ids=ids.unsqueeze(0), attention_mask=torch.ones_like(ids).unsqueeze(0))
    except RuntimeError as error:
        if not any(is_partitioned(parameter) for parameter in model.parameters()):
            raise cannot_read(model, error) from error
        return []  # an embedding that is read, not called, is not whole without an engine
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return [name for name in names if _group(name) not in called]


def _group(name: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", name)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
