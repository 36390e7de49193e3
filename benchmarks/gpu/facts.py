"""What a machine with a GPU is, whether all packages work together on it, and its ceilings.

python -m benchmarks.gpu.facts

Starts irtune's process group, sends every number format that irtune sends, and measures bf16 products, copies on the
device, copies to pinned memory and what it takes to pin memory. Writes JSON to standard output, last.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from importlib import metadata

import torch

import irtune.train.run  # noqa: F401  all of irtune, DeepSpeed with it
from irtune.distributed import runtime
from irtune.engine.deepspeed_private import check_version

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "peft", "accelerate", "bitsandbytes", "datasets",
            "huggingface_hub", "jsonargparse", "pydantic", "liger-kernel", "flash-attn", "torchmetrics", "tensorboard",
            "numpy")  # fmt: skip
SENT = (torch.float64, torch.float32, torch.uint8, torch.int64, torch.bfloat16)


def version(name: str) -> str:
    """A package's version, or that it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def seconds(call: Callable[[], object], count: int) -> float:
    """Of one call, when the device has ended it."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / count


def ceilings(size: int, megabytes: int) -> dict[str, float]:
    """Products of `size` x `size` matrices per second, and bytes per second of copies of some megabytes."""
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    x, y = (torch.empty(megabytes * 2**20, dtype=torch.uint8, device="cuda") for _ in range(2))
    host = torch.empty(megabytes * 2**18, dtype=torch.uint8, pin_memory=True)
    found = {
        "bf16_flops_per_second": 2 * size**3 / seconds(lambda: torch.mm(a, b), 20),
        "copy_bytes_per_second": 2 * x.nbytes / seconds(lambda: y.copy_(x), 10),
        "to_pinned_bytes_per_second": host.nbytes / seconds(lambda: host.copy_(x[: host.nbytes], non_blocking=True), 3),
    }
    began = time.perf_counter()
    torch.empty_like(host, pin_memory=True)
    return found | {"pin_bytes_per_second": host.nbytes / (time.perf_counter() - began)}


def main() -> int:
    """Look at the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=8192, help="rows and columns of the matrices")
    parser.add_argument("--megabytes", type=int, default=2048, help="of a copy on the device")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("error: there is no GPU that torch can use\n")
        return 2
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    sys.stdout.write(
        f"{name}, compute capability {capability}, torch {torch.__version__} for CUDA {torch.version.cuda}\n"
    )
    sys.stdout.write("; ".join(f"{package} {version(package)}" for package in PACKAGES) + "\n")
    check_version()
    world = runtime.read_world()
    runtime.start(world, 60)
    for dtype in SENT:
        torch.distributed.all_reduce(torch.ones(3, device=world.device).to(dtype))
    sys.stdout.write(f"device {world.device}, backend {torch.distributed.get_backend()}\n")
    runtime.stop()
    found = ceilings(given.size, given.megabytes)
    sys.stdout.write(json.dumps({key: float(f"{value:.3g}") for key, value in found.items()}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
