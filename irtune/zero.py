"""What irtune knows of DeepSpeed's inside: the names that engine.py and update.py build on, the keys of its JSON, and
two of its habits.

Beside engine.py, the only file that imports deepspeed.
"""

import contextlib
import difflib
import reprlib
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import nvtx
from pydantic import ValidationError
from torch import nn
from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

PRIVATE = {
    deepspeed.DeepSpeedEngine: ("_configure_optimizer", "_backward_post_hook"),
    DeepSpeedZeroOptimizer: (
        "_get_preflattened_grad_partition",
        "_release_preflattened_grad_buffers",
        "free_grad_in_param_list",
    ),
}


def unknown_zero_keys(settings: dict[str, Any]) -> list[str]:
    """One sentence for each key of the zero_optimization section that this DeepSpeed does not know."""
    fields = DeepSpeedZeroConfig.model_fields
    known = {*fields, *(field.alias for field in fields.values() if isinstance(field.alias, str))}
    problems = []
    for key in settings.get("zero_optimization", {}):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            problems.append(f"deepspeed: unknown key zero_optimization.{key}{hint}")
    if problems:
        return problems
    try:
        DeepSpeedZeroConfig(**settings.get("zero_optimization", {}))
    except ValidationError as error:
        for found in error.errors():
            key = ".".join(map(str, found["loc"]))
            problems.append(f"deepspeed: zero_optimization.{key} is {reprlib.repr(found['input'])}: {found['msg']}")
    return problems


def check_version() -> None:
    """Raise when this DeepSpeed lacks what re-selection is built on."""
    missing = [name for owner, names in PRIVATE.items() for name in names if not hasattr(owner, name)]
    if missing:
        raise RuntimeError(f"deepspeed {deepspeed.__version__} has no {', '.join(missing)}; irtune is built on 0.19.8")


@contextlib.contextmanager
def rebuilding(engine: Any, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, the old optimizer may be destroyed and `engine._configure_optimizer` called, at a fraction of the cost.

    What a rebuild of ZeRO 3 would do and need not (1.0 s of 1.1 s for 32 layers):
    - run the garbage collector over every object of the process. Nothing waits to be collected: irtune frees the old
      optimizer by cutting its references;
    - take its hooks off all modules and put them on again. They know nothing of the optimizer, so the old ones stay.
      Only their record of the order in which parameters are used is thrown away, since another selection has another;
    - gather each trained parameter, one by one, to put a hook on it. The hook needs no values.

    Args:
        engine: DeepSpeed's, with the optimizer that is to be replaced.
        trained: the parameters of the new optimizer.
    """
    with contextlib.ExitStack() as undo:
        _replace(undo, zero_utils, "gc", types.SimpleNamespace(collect=lambda: 0))
        _replace(undo, engine, "_check_for_duplicates", lambda optimizer: None)  # irtune's groups have none
        if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
            offload = engine.optimizer.parameter_offload
            engine.optimizer.parameter_offload = types.SimpleNamespace(destroy=lambda: None)
            if not offload.get_param_coordinator().is_invalid_trace():
                offload.get_param_coordinator()._invalidate_trace()
            _replace(undo, DeepSpeedZeroOptimizer_Stage3, "initialize_ds_offload", lambda *_, **__: offload)
            for parameter in trained:
                for name in ("all_gather", "partition"):
                    _replace(undo, parameter, name, lambda *_, **__: None)
        yield


def can_update_on_device(optimizer: Any) -> bool:
    """Whether irtune does the update of DeepSpeed's `optimizer` (update.py): under ZeRO 1 and 2.

    Not where gradients lie in host memory, nor in fp16, whose loss scale follows what the host has read.
    """
    return type(optimizer) is DeepSpeedZeroOptimizer and not optimizer.cpu_offload and optimizer.dtype != torch.float16


def _replace(undo: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until `undo` unwinds."""
    if name in vars(owner):
        undo.callback(setattr, owner, name, vars(owner)[name])
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)


def join_deepspeed() -> None:
    """Let DeepSpeed use the process group that is there."""
    # On CPUs it would compile a shared-memory all-reduce, behind a lock that a killed build never releases.
    __compatible_ops__["deepspeed_shm_comm"] = False
    nvtx.enable_nvtx = False  # marks for a profiler: 20,000 calls in a step of ZeRO 3
    deepspeed.init_distributed(verbose=False)


@contextlib.contextmanager
def sharded_loading(zero: dict[str, Any], dtype: torch.dtype) -> Iterator[None]:
    """Inside, `from_pretrained` leaves each rank its share of every weight as soon as it is read (zero.Init).

    Rank 0 maps the files and hands out what it reads. Collective: all ranks load the same model.

    Args:
        zero: the section zero_optimization of stage 3.
        dtype: format of the weights.
    """
    join_deepspeed()
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    holder = HfDeepSpeedConfig(settings)  # transformers keeps a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del holder


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether ZeRO 3 keeps `parameter` in shares, one per rank; then its own data may be empty."""
    return hasattr(parameter, "ds_tensor")


def is_sharded(model: nn.Module) -> bool:
    """Whether `model` was loaded inside `sharded_loading`."""
    return any(is_partitioned(parameter) for parameter in model.parameters())


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter, whether it is partitioned or not."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@contextlib.contextmanager
def whole(parameters: Iterable[nn.Parameter], *, write: bool = False) -> Iterator[None]:
    """Inside, `parameters` are whole; with `write`, what rank 0 makes of them stays. Collective if any is partitioned.

    Under an engine or before it.
    """
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None, enabled=bool(partitioned)):
        yield
        for parameter in partitioned if write else ():
            parameter.data = parameter.data.contiguous()  # it is sent as it lies in memory


@contextlib.contextmanager
def runnable(model: nn.Module, units: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, `model` can be called without an engine: weights are whole while they are used. Collective.

    Args:
        model: a model from `sharded_loading`, or any other, which stays as it is.
        units: modules, its layers, whose weights are gathered together. Elsewhere each module's own are.
    """
    inside = {part for unit in units for part in unit.modules()}
    groups = [(unit, list(unit.parameters())) for unit in units]
    groups += [(part, list(part.parameters(recurse=False))) for part in model.modules() if part not in inside]
    with contextlib.ExitStack() as undo:
        for module, parameters in groups:
            if any(is_partitioned(parameter) for parameter in parameters):
                _gather_in_forward(module, parameters, undo)
        yield


def _gather_in_forward(module: nn.Module, parameters: list[nn.Parameter], undo: contextlib.ExitStack) -> None:
    held = contextlib.ExitStack()

    def before(*_: Any) -> None:
        held.enter_context(whole(parameters))

    def after(*_: Any) -> None:
        held.close()

    undo.callback(module.register_forward_pre_hook(before).remove)
    undo.callback(module.register_forward_hook(after, always_call=True).remove)


def make_whole(modules: Sequence[nn.Module]) -> None:
    """Give `modules` ordinary parameters, whole on every rank, in place of partitioned ones. Collective."""
    for module in modules:
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                with whole([parameter]):
                    values = parameter.detach().clone()
                setattr(part, name, nn.Parameter(values, requires_grad=parameter.requires_grad))
