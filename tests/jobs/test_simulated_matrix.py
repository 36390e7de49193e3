"""Every stage, number format, adapter type and method on the simulated CUDA device: each run ends.

tests/engine/test_simulated_cuda.py compares runs with the CPU's.
"""

import pytest

from irtune.config import load_config
from irtune.config.declarations import adapter_kinds, methods
from irtune.distributed import runtime
from irtune.train.run import run
from tests.support import ROOT
from tests.support.runs import bare
from tests.support.simulated.client import needs_compiler

pytestmark = [needs_compiler, pytest.mark.slow]
BF16, FP16 = ["--adapter.dtype", "model"], ["--adapter.dtype", "model", "--model.dtype", "float16"]
NF4, FULL = ["--model.quantization", "nf4"], ["--tuning.method", "full"]
BY_STAGE = {
    "bf16": BF16, "fp16": FP16, "nf4": NF4, "accumulation": ["--optim.gradient_accumulation_steps", "2"],
    "checkpointing": ["--model.gradient_checkpointing", "true"],
}  # fmt: skip
ADAPTERS = {
    "dora": [], "rslora": [], "pissa": [], "bottleneck": [], "prefix": [], "prompt": FULL, "none": BF16,
    "ltuning-prompt": FULL, "ltuning-prefix": [],
}  # fmt: skip
METHODS = ("full", "rst", "ist", "lisa", "cyclic", "grass", "spectrum", "topk")
CASES = {
    **{f"zero{n} {name}": (f"zero{n}", more) for n in (0, 1, 2, 3) for name, more in BY_STAGE.items()
       if (name, n) != ("nf4", 1)},
    **{f"offload{n} {name}": (f"zero{n}_offload", more) for n in (2, 3)
       for name, more in {"fp32": [], "bf16": BF16, "accumulation": BY_STAGE["accumulation"]}.items()},
    **{f"zero{n} {name}": (f"zero{n}", ["--adapter.type", name, *more]) for n in (2, 3)
       for name, more in ADAPTERS.items()
       if (name, n) not in (("rslora", 3), ("prompt", 3), ("bottleneck", 3), ("ltuning-prompt", 3))},
    **{f"method {name}": ("zero2", ["--tuning.method", name]) for name in METHODS},
    "zero3 ist": ("zero3", ["--tuning.method", "ist"]),
    **{f"score {name}": ("zero2", ["--tuning.score", name]) for name in ("global", "reference", "weight", "cosine")},
    "preset reference": ("zero2", ["--tuning.preset", "reference"]),
    "loss class_balanced": ("zero2", ["--optim.loss", "class_balanced", "--optim.label_smoothing", "0.1"]),
    "loss focal": ("zero2", ["--optim.loss", "focal"]),
    "deterministic": ("zero2", ["--run.deterministic", "true"]),
    "micro_batch_tokens": ("zero2", ["--optim.micro_batch_tokens", "400"]),
    "padding_free": ("zero2", ["--data.padding_free", "true", "--model.dtype", "float32"]),
    "kept outputs": ("zero2", ["--tuning.method", "fixed", "--tuning.layers", "3-5",
                               "--tuning.keep_frozen_outputs", "true"]),
    "int8": ("zero2", ["--model.quantization", "int8"]),
}  # fmt: skip
TWO_RANKS = ("zero0 bf16", "zero1 accumulation", "zero2 nf4", "zero3 bf16", "zero3 accumulation", "offload2 bf16",
             "offload3 fp32", "method ist", "zero3 none", "zero2 ltuning-prefix")  # fmt: skip

NEEDED = {"fixed": ["--tuning.layers", "1,3"]} | {
    name: ["--adapter.size", size] for name, size in
    {"c3a": "20", "fourierft": "20", "waveft": "20", "oft": "8", "road": "8"}.items()
}  # fmt: skip


def options(llama, corpus, engine: str, more: list[str]) -> list[str]:
    """Of train.py, for a short run; without its folder."""
    return [
        "--model.name_or_path", str(llama), "--data.path", str(corpus), "--data.max_length", "64", "--adapter.r", "4",
        "--deepspeed", str(ROOT / f"ds_configs/{engine}.json"), "--optim.max_steps", "6", "--tuning.interval", "2",
        "--run.log_every", "3", "--run.eval_every", "6", "--optim.micro_batch_size", "4", "--run.timeout_seconds", "60",
        *more,
    ]  # fmt: skip


def train(gpu, llama, corpus, folder, name: str, ranks: int):
    return gpu.run(options(llama, corpus, *CASES[name]), folder, ranks)


def train_one_after_another(cases):
    """What became of each configuration, given as options of train.py, in one process: steps made, or the error."""
    seen, runtime.stop = [], lambda: None  # DeepSpeed keeps to the process group of a process's first engine
    for arguments in cases:
        try:
            with bare():
                seen.append(run(load_config(arguments))["steps"])
        except Exception as error:
            seen.append(f"{type(error).__name__}: {error}")
    return seen


@pytest.mark.parametrize("name", CASES)
def test_it_ends(gpu, llama, corpus, tmp_path, name):
    assert train(gpu, llama, corpus, tmp_path, name, 1).results["steps"] == 6


def test_a_whole_run_ends_with_its_memory_plan_and_pictures(gpu, llama, corpus, tmp_path):
    results = gpu.run(options(llama, corpus, "zero2", BF16), tmp_path, whole=True).results
    assert results["planned_memory_bytes"] > 0 and results["parked_state_bytes"] > 0


@pytest.mark.parametrize("name", TWO_RANKS)
def test_it_ends_on_two_ranks(gpu, llama, corpus, tmp_path, name):
    assert train(gpu, llama, corpus, tmp_path, name, 2).results["world_size"] == 2


@pytest.mark.timeout(900)
def test_every_adapter_type_and_method_ends(gpu, llama, corpus, tmp_path):
    cases = {name: ["--adapter.type", name, *NEEDED.get(name, [])] for name in adapter_kinds()}
    cases |= {f"method {name}": ["--tuning.method", name, *NEEDED.get(name, [])] for name in methods()}
    short = ["--optim.max_steps", "2", "--tuning.interval", "1", "--run.eval_every", "2"]
    given = [[*options(llama, corpus, "zero2", [*more, *short]), f"--run.output_dir={tmp_path / str(number)}"]
             for number, more in enumerate(cases.values())]  # fmt: skip
    ended = dict(zip(cases, gpu.call(train_one_after_another, tmp_path, given).results, strict=True))
    assert {name: found for name, found in ended.items() if found != 2} == {}
