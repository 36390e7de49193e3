"""`python -m irtune doctor`: what this machine, or all nodes of a job, can do, and what is wrong with them."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from irtune.commands.common import add_json, add_ranks, parser, ranks, show, show_json, table
from irtune.distributed import environment, node_facts, runtime
from irtune.distributed.network import interfaces
from irtune.distributed.node_facts import NodeFacts
from irtune.distributed.runtime import World
from irtune.distributed.versions import versions

# What irtune sends: a score per layer at a selection, and the gradients of the layers that train at a step.
SIZES = {
    "scores of 32 layers": 32,
    "LoRA r 8 of 1 layer (8B model)": 655_360,
    "LoRA r 8 of 10 layers (8B model)": 6_553_600,
}
REPEATS, SECONDS = 20, 2.0  # at most, per size
SOCKETS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
START_SECONDS = 180.0
LAST_LINES = 3


def main(arguments: Sequence[str]) -> int:
    """Print what there is, and every problem; the exit status is 2 where there is one."""
    options = parser(
        "doctor",
        "Versions, accelerators, network interfaces, and the time of an all-reduce at the sizes irtune uses; then what "
        "is wrong, a sentence each (exit status 2). Started by torchrun or deepspeed it measures between all ranks of "
        "the job, else between processes of this machine.",
        "torchrun --nnodes 2 --nproc_per_node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m irtune doctor",
    )
    add_ranks(options, alone=2)
    add_json(options)
    options.add_argument("--local_rank", type=int, help="for deepspeed, which adds it")
    given = options.parse_args(list(arguments))
    if environment.variable("WORLD_SIZE", ""):
        with ranks() as world:
            found = examine(world)
        if not world.is_main:
            return 2 if found["problems"] else 0
    else:
        count = given.ranks or torch.cuda.device_count() or 2
        found = _of_ranks(count) if count > 1 else examine(runtime.read_world())
    show_json(found) if given.json else show(_text(found))
    return 2 if found["problems"] else 0


def _of_ranks(count: int) -> dict[str, Any]:
    """The same from `count` processes of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m",
               "irtune", "doctor", "--json"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS, stdin=subprocess.DEVNULL)
        text, said = done.stdout, done.stderr
    except subprocess.TimeoutExpired:
        text, said = "", f"no answer within {START_SECONDS:.0f} s"
    if "{" in text:
        return dict(json.loads(text[text.index("{") :]))
    found = examine(runtime.read_world())
    last = " / ".join(said.strip().splitlines()[-LAST_LINES:])
    found["problems"].append(f"{count} processes of this machine could not talk with each other: {last}")
    return found


def examine(world: World) -> dict[str, Any]:
    """Everything in plain JSON types, the same on all ranks. Collective; `problems` has a sentence each."""
    mine = NodeFacts(node=node_facts.node_name(), versions=versions(), digest="")
    runtime.barrier()
    facts = runtime.all_gather_object(NodeFacts(**vars(mine) | {"clock": time.time()}))
    here = {"node": node_facts.node_name(), "notes": _notes(world), "problems": _problems(),
            "interfaces": [vars(one) for one in interfaces()]}  # fmt: skip
    nodes = list({one["node"]: one for one in runtime.all_gather_object(here)}.values())
    several = len(nodes) > 1
    problems = node_facts.unequal_versions(facts)
    rows, wrong = _measure(world)
    problems += [f"{one['node']}: {text}" if several else text for one in nodes for text in one["problems"]]
    notes = [f"{one['node']}: {text}" if several else text for one in nodes for text in one["notes"]]
    clocks = node_facts.clock_difference(facts)
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "accelerators": _accelerators(),
        "backends": [name for name in ("nccl", "gloo") if getattr(dist, f"is_{name}_available")()],
        "used_backend": dist.get_backend() if dist.is_initialized() else None,
        "variables": {name: environment.variable(name, "") or None for name in (*SOCKETS, "OMP_NUM_THREADS")},
        "nodes": [{key: one[key] for key in ("node", "interfaces")} for one in nodes],
        "ranks": world.size,
        "all_reduce": rows,
        "notes": notes + ([clocks] if clocks else []),
        "suggestions": suggestions(_gpus(), _cpu_flags()),
        "problems": problems + wrong,
    }


def _accelerators() -> list[str]:
    found = []
    for number in range(torch.cuda.device_count()):
        one = torch.cuda.get_device_properties(number)
        formats = "bfloat16" if _computes_bfloat16(number) else "no bfloat16, no flash attention 2"
        found.append(f"{one.name}, {one.total_memory / 2**30:.0f} GiB, compute {one.major}.{one.minor}, {formats}")
    return found


def _gpus() -> list[tuple[int, bool]]:
    """Bytes of each GPU, and whether it computes in bfloat16."""
    numbers = range(torch.cuda.device_count())
    return [(torch.cuda.get_device_properties(n).total_memory, _computes_bfloat16(n)) for n in numbers]


def _computes_bfloat16(number: int) -> bool:
    """Whether a GPU computes in bfloat16; older ones emulate it, which torch counts as well."""
    return torch.cuda.get_device_properties(number).major >= 8


def _cpu_flags() -> set[str]:
    """What the processor can do, as Linux names it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return set(next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), []))


def suggestions(gpus: Sequence[tuple[int, bool]], cpu: Collection[str]) -> list[str]:
    """What a recipe should say on a machine with `gpus` (bytes, bfloat16) or else a processor with the flags `cpu`."""
    if not gpus:
        said = ["no GPU: models of up to about a billion parameters, such as --config quickstart"]
        if cpu and not {"avx512_bf16", "amx_bf16", "bf16"} & set(cpu):
            said.append("model.dtype float32: this processor does not compute in bfloat16")
        return said
    least = min(size for size, _ in gpus) / 2**30
    said = [] if all(fits for _, fits in gpus) else ["model.dtype float16: not every GPU computes in bfloat16"]
    if least < 22:
        said.append("8B models: model.quantization nf4 with model.gradient_checkpointing true")
    else:
        short = "true" if least < 38 else "false, which is faster"
        said.append(f"8B models: model.dtype bfloat16 with model.gradient_checkpointing {short}")
    if len(gpus) > 1:
        said.append(f"deepspeed --num_gpus {len(gpus)}; deepspeed zero3 divides weights that do not fit on one GPU")
    return said


def _measure(world: World) -> tuple[list[dict[str, Any]], list[str]]:
    """Seconds of an all-reduce for each of `SIZES`: the middle one of some; and what is wrong with the sums."""
    rows, problems = [], []
    if world.size == 1:
        return [], []
    for name, count in SIZES.items():
        tensor = torch.full((count,), 1.0, device=world.device)
        runtime.all_reduce(tensor)  # connections are made by the first
        if not bool((tensor == world.size).all()):
            problems.append(f"the sum of ones over {world.size} ranks is {tensor.min():g} to {tensor.max():g}")
        times: list[float] = []
        while len(times) < REPEATS and sum(times) < SECONDS:
            runtime.barrier()
            begin = time.perf_counter()
            runtime.all_reduce(tensor.fill_(1.0))
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            # The slowest rank's time, so that all stop at the same repeat.
            took = torch.tensor(time.perf_counter() - begin, dtype=torch.float64, device=world.device)
            times.append(max(float(other) for other in runtime.all_gather(took)))
        seconds, size = sorted(times)[len(times) // 2], 4 * count
        rows.append({"what": name, "bytes": size, "seconds": seconds, "bytes_per_second": size / seconds,
                     "bus_bytes_per_second": 2 * (world.size - 1) / world.size * size / seconds})  # fmt: skip
    return rows, problems


def _problems() -> list[str]:
    """What keeps irtune from working on this node."""
    problems = _unpinned()
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        build = "is built without CUDA" if torch.version.cuda is None else "cannot use the driver"
        problems.append(f"there is an NVIDIA driver, but torch {torch.__version__} {build}: training would use the CPU")
    names = [one.name for one in interfaces()]
    for variable in SOCKETS:
        wanted = environment.variable(variable, "")
        if not wanted or wanted.startswith("^"):
            continue
        exact = variable.startswith("GLOO") or wanted.startswith("=")
        for name in wanted.removeprefix("=").split(","):
            if not any(known == name if exact else known.startswith(name) for known in names):
                problems.append(f"{variable} is {wanted!r}, but the interfaces that are up are {', '.join(names)}")
    return problems


def _unpinned() -> list[str]:
    """Packages that are not those of requirements.txt, or of the installed package where that is not beside irtune."""
    file = Path(__file__).parents[2] / "requirements.txt"
    beside = file.is_file()
    source = file.name if beside else "irtune"
    problems = []
    for line in file.read_text(encoding="utf-8").splitlines() if beside else metadata.requires("irtune") or []:
        text = line.partition("#")[0].strip()
        wanted = Requirement(text) if text else None
        if wanted is None or (wanted.marker is not None and not wanted.marker.evaluate()):
            continue
        try:
            present = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            present = "missing"
        if present == "missing" or not wanted.specifier.contains(present.partition("+")[0], prereleases=True):
            problems.append(f"{wanted.name} is {present}, and {source} wants {wanted.specifier}")
    return problems


def _notes(world: World) -> list[str]:
    """What is worth knowing, but may be meant so."""
    notes = []
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = ""
    if (not address or address.startswith("127.")) and not environment.variable("GLOO_SOCKET_IFNAME", ""):
        notes.append(
            f"the host name {socket.gethostname()} resolves to {address or 'no address'}: with several nodes irtune "
            "takes the interface on the way to MASTER_ADDR; set GLOO_SOCKET_IFNAME for another one"
        )
    threads = torch.get_num_threads()
    here = environment.variable("LOCAL_WORLD_SIZE", environment.variable("LOCAL_SIZE", "1"))
    if world.device.type == "cpu" and int(here) * threads > (os.cpu_count() or 1):
        notes.append(
            f"{here} ranks x {threads} threads on {os.cpu_count()} cores: set OMP_NUM_THREADS to cores / ranks"
        )
    return notes


def _text(found: dict[str, Any]) -> str:
    lines = [", ".join(f"{name} {version}" for name, version in found["versions"].items())]
    lines.append(f"{found['platform']}, {found['cores']} cores")
    lines += [f"GPU {number}: {text}" for number, text in enumerate(found["accelerators"])] or ["no GPU"]
    used = f", {found['used_backend']} is used" if found["used_backend"] else ""
    lines.append(f"backends: {', '.join(found['backends'])}{used}")
    lines.append(", ".join(f"{name} {value or 'not set'}" for name, value in found["variables"].items()))
    for node in found["nodes"]:
        lines.append(f"{node['node']}:")
        for one in node["interfaces"]:
            speed = f", {one['speed']} Mbit/s" if one["speed"] else ""
            lines.append(f"  {one['name']}: {', '.join(one['addresses']) or 'no address'}{speed}")
    if found["all_reduce"]:
        cells = [[row["what"], f"{row['bytes']:,}", f"{row['seconds'] * 1e3:.3f}",
                  f"{row['bytes_per_second'] / 2**20:,.1f}", f"{row['bus_bytes_per_second'] / 2**20:,.1f}"]
                 for row in found["all_reduce"]]  # fmt: skip
        header = ["all-reduce over " + f"{found['ranks']} ranks", "bytes", "ms", "MiB/s", "on each link"]
        lines += ["", table(header, cells)]
    lines += ["", *(f"note: {text}" for text in found["notes"])]
    lines += [f"suggestion: {text}" for text in found["suggestions"]]
    lines += [f"problem: {text}" for text in found["problems"]] or ["nothing is wrong"]
    return "\n".join(lines)
