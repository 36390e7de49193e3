"""What irtune knows of DeepSpeed's inside: the names it builds on, the keys of its JSON, and two of its habits.

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
from deepspeed.ops import __compatible_ops__
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError
from torch import nn
from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

PRIVATE = ("_configure_optimizer", "_backward_post_hook")


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
    missing = [name for name in PRIVATE if not hasattr(deepspeed.DeepSpeedEngine, name)]
    if missing:
        raise RuntimeError(f"deepspeed {deepspeed.__version__} has no {', '.join(missing)}; irtune is built on 0.19.8")


class SkippingAdamW(torch.optim.AdamW):
    """AdamW whose steps can be left out, for ZeRO 0, where nothing stands between it and the engine."""

    skips = False

    def step(self, closure: Any = None) -> Any:
        """As torch.optim.AdamW; nothing while `skips` is set."""
        return None if self.skips else super().step(closure)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Keep ZeRO 3 from running the garbage collector while it lays out its buffer.

    It would scan every object of the process at every selection, for about half of a rebuild's time. Nothing waits
    to be collected here: the engine frees the old optimizer by cutting its references.
    """
    original = zero_utils.gc
    zero_utils.gc = types.SimpleNamespace(collect=lambda: 0)
    try:
        yield
    finally:
        zero_utils.gc = original


def join_deepspeed() -> None:
    """Let DeepSpeed use the process group that is there."""
    # On CPUs it would compile a shared-memory all-reduce, behind a lock that a killed build never releases.
    __compatible_ops__["deepspeed_shm_comm"] = False
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


def make_whole(modules: Sequence[nn.Module]) -> None:
    """Give `modules` ordinary parameters, whole on every rank, in place of partitioned ones. Collective."""
    for module in modules:
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                with deepspeed.zero.GatheredParameters([parameter]):
                    whole = parameter.detach().clone()
                setattr(part, name, nn.Parameter(whole, requires_grad=parameter.requires_grad))
