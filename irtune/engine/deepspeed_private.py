"""What irtune knows of DeepSpeed's inside: the names that engine.py and update.py build on, the keys of its JSON, and
two of its habits.

Beside engine.py, the only file that imports deepspeed.
"""

import contextlib
import difflib
import reprlib
import types
from collections.abc import Iterator, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from pydantic import ValidationError
from torch import nn

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
def asking_torch_for_memory() -> Iterator[None]:
    """Inside, DeepSpeed takes a GPU's free memory from torch, what torch's cache holds included.

    By itself it asks NVML, and reads CUDA_VISIBLE_DEVICES as numbers: a ValueError for UUIDs and names of MIG parts.
    """
    with contextlib.ExitStack() as undo:
        accelerator = get_accelerator()
        if accelerator.device_name() == "cuda":
            free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            _replace(undo, accelerator, "available_memory", lambda device_index=None: free)
        yield


@contextlib.contextmanager
def initializing() -> Iterator[None]:
    """Inside, `deepspeed.initialize` may be called: `asking_torch_for_memory`, and without DeepCompile.

    irtune does not use it, and to register its passes on a GPU is to import torch's compiler.
    """
    with asking_torch_for_memory(), contextlib.ExitStack() as undo:
        _replace(undo, deepspeed.runtime.engine, "is_deepcompile_supported", lambda: False)
        yield


@contextlib.contextmanager
def rebuilding(engine: Any, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, the old optimizer may be destroyed and `engine._configure_optimizer` called, at a fraction of the cost.

    What a rebuild of ZeRO 3 would do and need not (1.0 s of 1.1 s for 32 layers):
    - run the garbage collector over every object of the process. Nothing waits to be collected: irtune frees the old
      optimizer by cutting its references;
    - take its hooks off all modules and put them on again. They know nothing of the optimizer, so the old ones stay.
      Only their record of the order in which parameters are used is thrown away, since another selection has another;
    - gather each trained parameter, one by one, to put a hook on it. The hook needs no values.

    And what a rebuild under any stage would do on a GPU: give all cached memory back to the driver, once per layer, so
    that the next steps ask for it again; and compare a layer's size with what the driver calls free, which is next to
    nothing where the cache holds the rest, and then move the layer through host memory.

    Args:
        engine: DeepSpeed's, with the optimizer that is to be replaced.
        trained: the parameters of the new optimizer.
    """
    with contextlib.ExitStack() as undo:
        _replace(undo, zero_utils, "gc", types.SimpleNamespace(collect=lambda: 0))
        _replace(undo, engine, "_check_for_duplicates", lambda optimizer: None)  # irtune's groups have none
        accelerator = get_accelerator()
        _replace(undo, accelerator, "empty_cache", lambda: None)
        undo.enter_context(asking_torch_for_memory())
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
