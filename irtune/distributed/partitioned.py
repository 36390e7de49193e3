"""Parameters that ZeRO 3 keeps in shares, one per rank: loading, gathering, running a model of them."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__
from deepspeed.utils import nvtx
from torch import nn
from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

from irtune.distributed import runtime


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


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter, whether it is partitioned or not."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def join_shares(share: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The whole tensor, of the shape of the partitioned `parameter`, of which each rank has its flat `share`.

    Collective.
    """
    shape = whole_shape(parameter)
    return torch.cat(runtime.all_gather(share.flatten()))[: shape.numel()].reshape(shape)


@contextlib.contextmanager
def whole(parameters: Iterable[torch.Tensor], *, write: bool = False) -> Iterator[None]:
    """Inside, `parameters` are whole; with `write`, what rank 0 makes of them stays. Collective if any is partitioned.

    Under an engine or before it.
    """
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None, enabled=bool(partitioned)):
        yield
        for parameter in partitioned if write else ():
            parameter.data = parameter.data.contiguous()  # it is sent as it lies in memory


@torch.no_grad()
def write_whole(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Give `parameter` the `values`, of its whole shape. Collective where it is partitioned."""
    with whole([parameter], write=True):
        parameter.data.copy_(values)


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


def used_by(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Let ZeRO 3 gather `parameters`, which belong to parts of `module`, for its forward and backward pass.

    By itself it gathers what belongs to a module whose own forward pass is called.
    """
    for parameter in parameters:
        deepspeed.zero.register_external_parameter(module, parameter)


def make_whole(modules: Sequence[nn.Module]) -> None:
    """Give `modules` ordinary parameters, whole on every rank, in place of partitioned ones. Collective."""
    for module in modules:
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                with whole([parameter]):
                    values = parameter.detach().clone()
                setattr(part, name, nn.Parameter(values, requires_grad=parameter.requires_grad))
