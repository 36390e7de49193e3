"""Speed of irtune beside other trainers, and beside the limit that matrix products set, in turns on one machine.

    IRTUNE_DATA=FOLDER python -m benchmarks.speed                     # the quick start's model on IteraTeR; CPU or GPU
    python -m benchmarks.speed --ranks 2 --sides abc --adapter.r 32   # irtune's options follow
    python -m benchmarks.speed --shape llama3.1-8b --tokens 256 --optim.micro_batch_size 16   # random weights; a GPU
    python -m benchmarks.speed --quick                                # a small model, for the benchmark's own sake

Sides: a irtune ir, b irtune full, c transformers Trainer + peft at its best, d the same with every example padded to
data.max_length, e a bare PyTorch loop over b's batches, f the matrix products of a's steps alone. All are built once
and take turns; a turn makes steps that stand for an epoch (its batches at even quantiles of length). g, if it is asked
for: c with transformers' eager attention, the fastest for short texts on a CPU and the slowest on a GPU. h, likewise:
a without padding (data.padding_free), in random batches, whose steps a turn chooses by their tokens. Results go to
benchmarks/results/speed-DEVICE.json, with a picture beside it, and a table to standard output. benchmarks/README.md
says how to read them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SIDES = "abcdefgh"


def main() -> int:
    """Prepare what is measured and measure it in processes of its own, with the right number of threads."""
    options, overrides = _options()
    if options.worker:
        from benchmarks.speed.worker import work

        return work(options)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            arguments = _arguments(options, overrides, Path(options.scratch or scratch))
        except ValueError as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
        threads = str(options.threads or max(1, len(os.sched_getaffinity(0)) // options.ranks))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "DS_BUILD_OPS": "0", "TQDM_DISABLE": "1"}
        path = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        environment |= {"PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error"}
        # transformers' Trainer takes every GPU that it sees.
        gpus = ",".join(map(str, range(options.ranks)))
        environment["CUDA_VISIBLE_DEVICES"] = (
            "" if options.device == "cpu" else environment.get("CUDA_VISIBLE_DEVICES", gpus)
        )
        launch = [sys.executable]
        if options.ranks > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}"]
        output = options.output and str(Path(options.output).resolve())
        job = {**vars(options), "arguments": arguments, "folder": scratch, "threads": int(threads), "output": output}
        job["start"] = [_start(launch, arguments, folder / f"start{n}", environment) for n in range(options.starts)]
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        command = [*launch, __file__, "--worker", str(folder / "job.json")]
        return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


def _options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = os.environ.get("IRTUNE_CACHE", "~/.cache/irtune")
    data = os.environ.get("IRTUNE_DATA")
    add = parser.add_argument
    add("--model", default=f"{cache}/SmolLM2-135M-Instruct", help="folder or hub id; default: the quick start's model")
    add("--shape", help="instead: a model of random weights: llama3.1-8b, llama3.2-1b or small")
    add("--tokens", type=int, default=0, help="with --shape: length of every text; default: the synthetic corpus")
    add("--recipe", default="benchmarks/speed/recipe.yaml", help="irtune's options for all sides")
    add("--data", default=data and f"{data}/iterater", help="the corpus; default: IteraTeR in IRTUNE_DATA")
    add("--ranks", type=int, default=1)
    add("--threads", type=int, help="per rank; default: the machine's cores, shared out")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is a GPU")
    add("--steps", type=int, default=10, help="timed steps of a turn")
    add("--warm-up", type=int, default=2, help="steps before them")
    add("--rounds", type=int, default=3)
    add("--sides", default="abcdef", help="in the order of their turns; f replays a's steps and comes after it")
    add("--evaluated", type=int, default=96, help="examples of an evaluation; 0: none")
    add("--starts", type=int, default=2, help="times that start to first step is measured")
    add("--profile", default="", help="sides to profile after the rounds, for example abc")
    add("--one-at-a-time", action="store_true", help="build a side anew for each turn, where memory holds only one")
    add("--quick", action="store_true", help="a small model and few steps: checks the benchmark, measures nothing")
    add("--output", help="the JSON file")
    add("--scratch", help="folder for the model of --shape, kept; default: a temporary one")
    add("--worker", help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args()
    if options.quick:
        options.shape, options.tokens, options.steps, options.warm_up = "small", 0, 4, 1
        options.rounds, options.evaluated, options.starts = min(options.rounds, 2), 16, min(options.starts, 1)
    unknown = set(options.sides) - set(SIDES)
    if unknown or ("f" in options.sides and "a" not in options.sides.partition("f")[0]):
        parser.error(f"--sides is {options.sides!r}; accepted: some of abcdefgh, f only after a")
    return options, overrides


def _arguments(options: argparse.Namespace, overrides: list[str], folder: Path) -> list[str]:
    """irtune's arguments for all sides: model, corpus, recipe, and the same learning rate in every step.

    Raises:
        ValueError: when there is no such device, model or corpus.
    """
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--device is cuda, and there is no GPU; accepted: cpu")
    recipe, model, data = options.recipe, Path(options.model).expanduser(), options.data
    if options.shape:
        from benchmarks.speed.inputs import write_inputs

        recipe = "launch/recipes/quickstart.yaml"
        model, data = write_inputs(folder, options.shape, options.tokens, options.device)
    elif not model.exists() and str(options.model).startswith(("/", "~", ".")):
        raise ValueError(f"--model: there is no folder {model}; bash launch/quickstart.sh makes the default one")
    if data is None or not Path(data).exists():
        raise ValueError(f"--data is {data}; accepted: a corpus (default: iterater in the folder IRTUNE_DATA)")
    length = ["--data.max_length", str(options.tokens)] if options.tokens else []
    return [
        *("--config", str(ROOT / recipe), "--deepspeed", str(ROOT / "ds_configs" / "zero2.json")),
        *("--model.name_or_path", str(model.resolve() if model.exists() else options.model)),
        *("--data.path", str(Path(data).resolve()), *length),
        *("--data.prompt", "tagged", "--model.pooling", "class"),  # as Trainer + peft reads a pair
        *("--optim.schedule", "constant", "--optim.warmup_steps", "0", "--optim.max_steps", "1000000"),
        *("--run.eval_every", "1000000", *(("--run.log_every", "1") if options.quick else ()), *overrides),
    ]


def _start(launch: list[str], arguments: list[str], folder: Path, environment: dict[str, str]) -> float | None:
    """Seconds from the start of train.py to the end of its first step; None where it ends before."""
    extra = ["--run.output_dir", str(folder), "--run.log_every", "1"]
    started = time.perf_counter()
    child = subprocess.Popen(
        [*launch, "train.py", *arguments, *extra],
        env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        while child.poll() is None:
            records = folder / "metrics.jsonl"
            if records.is_file() and '"train"' in records.read_text(encoding="utf-8"):
                return time.perf_counter() - started
            time.sleep(0.01)
        sys.stderr.write((child.stderr.read() if child.stderr else b"").decode()[-2000:])
        return None
    finally:
        child.terminate()
        child.communicate()


if __name__ == "__main__":
    sys.exit(main())
