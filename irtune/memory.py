"""What a run needed, measured."""

import resource
import sys

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory of this process so far: allocated on the GPU, or resident in the host for a CPU run."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_host_memory_bytes()


def peak_host_memory_bytes() -> int:
    """Highest resident host memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux
