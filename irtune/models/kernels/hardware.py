"""What this machine has not got: GPUs of other generations, compilers."""

import logging
import shutil

import torch

from irtune.config import ModelConfig
from irtune.distributed import environment

log = logging.getLogger("irtune")
AMPERE = (8, 0)  # the first generation with bf16 products, and the oldest of flash attention 2
TURING = (7, 5)  # the first with int8 products


def check_gpu(model: ModelConfig, device: torch.device) -> list[str]:
    """What of `model` the GPU `device` cannot do, in sentences for the user; warns of what it does slowly."""
    capability, oldest = torch.cuda.get_device_capability(device), _oldest_kernels()
    here = f"this one ({torch.cuda.get_device_name(device)}) has {capability[0]}.{capability[1]}"
    problems = []
    if capability < oldest:
        problems.append(f"this build of torch is for compute capability {oldest[0]}.{oldest[1]} or newer; {here}")
    if model.attn_implementation == "flash_attention_2" and capability < AMPERE:
        what = "model.attn_implementation flash_attention_2"
        problems.append(f"{what} needs a GPU of compute capability 8.0 or newer; {here}: use sdpa")
    if model.quantization == "int8" and capability < TURING:
        what = "model.quantization int8"
        problems.append(f"{what} needs a GPU of compute capability 7.5 or newer; {here}: use nf4 or none")
    if model.dtype == "bfloat16" and capability < AMPERE:
        log.warning(
            "model.dtype bfloat16 is fast on GPUs of compute capability 8.0 or newer; %s and emulates it. float16 with "
            "adapter.dtype model, or float32, is faster here",
            here,
        )
    return problems


def _oldest_kernels() -> tuple[int, int]:
    """The lowest compute capability that this build of torch is for; (0, 0) where it does not tell."""
    names = [name.partition("_")[2].rstrip("af") for name in torch.cuda.get_arch_list()]
    return min(((int(name[:-1]), int(name[-1])) for name in names if name.isdigit()), default=(0, 0))


def missing_compiler(*, on_cpu: bool) -> str | None:
    """The compiler that torch.compile needs and this machine lacks: of C++ for a CPU, of C for a GPU's launchers."""
    names = [environment.variable("CXX", "g++")] if on_cpu else [environment.variable("CC", "gcc"), "clang"]
    return None if any(map(shutil.which, names)) else names[0]
