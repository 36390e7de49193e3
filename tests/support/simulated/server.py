"""Runs of irtune on the simulated device, forked from one process that has imported everything.

python -m tests.support.simulated.server    reads a job per line of standard input, JSON: ranks, port, folder, and
    either arguments (of train.py) and whole (with plan and pictures), or call (MODULE:FUNCTION) and given (what it
    takes). Each rank writes FOLDER/rank_N.json: error or null, results, and waits, which has [what, where, how often]
    for each place where the host would have waited for a GPU. A line is printed per job.
"""

import collections
import contextlib
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

# bitsandbytes would compile for a GPU that no compiler knows.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ |= {"DS_ACCELERATOR": "cuda", "DS_BUILD_OPS": "0", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

from tests.support.simulated import device  # isort: skip  # before torch
import torch

from tests.support.simulated import nccl  # noqa: F401  # isort: skip  # replaces NCCL

import irtune.train.run
import tests.support.preload  # noqa: F401
from irtune.config import load_config
from tests.support.runs import bare

torch.set_num_threads(1)


def _run(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """One rank of a job."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"]),
                   "LOCAL_WORLD_SIZE": str(job["ranks"]), "LOCAL_SIZE": str(job["ranks"]),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"]),
                   "FAKE_CUDA_DEVICES": str(job["ranks"])}  # fmt: skip
    device.waits.clear()
    if "call" in job:
        module, name = job["call"].split(":")
        results = getattr(importlib.import_module(module), name)(*job["given"])
    else:
        with contextlib.nullcontext() if job["whole"] else bare():
            results = irtune.train.run.run(load_config(job["arguments"]))
    found = collections.Counter(device.waits)
    return {"error": None, "results": results, "waits": [[*key, count] for key, count in found.items()]}


def _child(job: dict[str, Any], rank: int) -> None:
    """A forked rank: writes what it has to say and ends."""
    out = os.open(f"{job['folder']}/rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)  # after a fork torch makes its pool anew, which fails where two threads ask for it at once
    try:
        said = _run(job, rank)
    except BaseException:
        said = {"error": traceback.format_exc(), "results": None, "waits": []}
    Path(job["folder"], f"rank_{rank}.json").write_text(json.dumps(said), encoding="utf-8")
    os._exit(0)


def main() -> None:
    """Serve jobs until standard input ends."""
    for line in sys.stdin:
        job = json.loads(line)
        children = []
        for rank in range(job["ranks"]):
            child = os.fork()
            if not child:
                _child(job, rank)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        sys.stdout.write("done\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
