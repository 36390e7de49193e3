"""Many small irtune runs on one GPU, several at a time, each compared with what it must equal.

    python -m benchmarks.gpu.check FOLDER [--workers 8] [--seconds 125] [--only NAME ...]

All have the same model of random weights, corpus and seed. Every run must end; selections and losses of fp32 must be
the CPU's; those of ZeRO 0 to 3 and of offload must equal each other, and so must a resumed run and one that was never
stopped. Says of each case what came of it and writes FOLDER/check.json. Exit status 1: one is not as wanted.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed.inputs import write_inputs

ROOT = Path(__file__).resolve().parents[2]
FP32, LOW, FP16 = ["--model.dtype", "float32"], ["--adapter.dtype", "model"], ["--model.dtype", "float16"]
CHECKPOINTING = ["--model.gradient_checkpointing", "true"]
OWN = ["--adapter.type", "none", *LOW]


def zero(name: object, *more: str) -> list[str]:
    """Options for ds_configs/zeroNAME.json, and more of them."""
    return ["--deepspeed", f"ds_configs/zero{name}.json", *more]


@dataclass(frozen=True)
class Case:
    """A run of irtune: its options, the case that it must equal ("": none) and how far apart losses may be.

    cpu: on the CPU. then: stopped half-way, as a scheduler does, and resumed with these options.
    """

    options: list[str]
    equals: str = ""
    tolerance: float = 0.0
    cpu: bool = False
    then: list[str] | None = None


CASES = {  # the most telling first
    "cpu fp32": Case(zero(2, *FP32), cpu=True),
    "fp32 zero2": Case(zero(2, *FP32), "cpu fp32", 2e-3),
    "bf16 zero2": Case(zero(2)),
    "bf16 zero0": Case(zero(0), "bf16 zero2", 2e-2),
    "bf16 zero1": Case(zero(1), "bf16 zero2", 1e-6),
    "bf16 zero3": Case(zero(3), "bf16 zero2", 2e-2),
    "zero2 offload": Case(zero("2_offload"), "bf16 zero2", 2e-2),
    "zero3 offload": Case(zero("3_offload"), "bf16 zero3", 2e-2),
    "nf4 zero2": Case(zero(2, "--model.quantization", "nf4")),
    "nf4 zero3": Case(zero(3, "--model.quantization", "nf4"), "nf4 zero2", 2e-2),
    "cpu nf4": Case(zero(2, "--model.quantization", "nf4"), "nf4 zero2", 5e-2, cpu=True),
    "int8 zero2": Case(zero(2, "--model.quantization", "int8")),
    "masters zero0": Case(zero(0, *LOW)),
    "masters zero1": Case(zero(1, *LOW), "masters zero2", 2e-2),
    "masters zero2": Case(zero(2, *LOW)),
    "masters zero3": Case(zero(3, *LOW), "masters zero2", 2e-2),
    "fp16 zero2": Case(zero(2, *LOW, *FP16)),
    "fp16 zero3": Case(zero(3, *LOW, *FP16)),
    "fp16 zero0": Case(zero(0, *LOW, *FP16)),
    "resume zero2": Case(zero(2), "bf16 zero2", 1e-3, then=zero(2)),
    "resume into zero3": Case(zero(2), "bf16 zero2", 2e-2, then=zero(3)),
    "checkpointing": Case(zero(2, *CHECKPOINTING), "bf16 zero2", 2e-2),
    "checkpointing zero3": Case(zero(3, *CHECKPOINTING), "bf16 zero2", 2e-2),
    "compile": Case(zero(2, "--model.compile", "true"), "bf16 zero2", 5e-2),
    "fused kernels": Case(zero(2, "--model.fused_kernels", "true"), "bf16 zero2", 5e-2),
    "deterministic 1": Case(zero(2, "--run.deterministic", "true")),
    "deterministic 2": Case(zero(2, "--run.deterministic", "true"), "deterministic 1"),
    "accumulation": Case(zero(2, "--optim.micro_batch_size", "2", "--optim.gradient_accumulation_steps", "2"),
                         "bf16 zero2", 5e-2),
    "dora": Case(zero(2, "--adapter.type", "dora")),
    "own weights": Case(zero(2, *OWN)),
    "own weights zero3": Case(zero(3, *OWN), "own weights", 5e-2),
    "prefix": Case(zero(2, "--adapter.type", "prefix")),
    "bottleneck": Case(zero(2, "--adapter.type", "bottleneck")),
    "ist": Case(zero(2, "--tuning.method", "ist")),
    "reference scores": Case(zero(2, "--tuning.preset", "reference")),
    "global scores": Case(zero(2, "--tuning.score", "global")),
    "cosine scores": Case(zero(2, "--tuning.score", "cosine")),
    "spectrum": Case(zero(2, "--tuning.method", "spectrum")),
}  # fmt: skip


def common(model: Path, data: Path) -> list[str]:
    """Options of all cases: a run of nine steps and three selections."""
    return [
        *("--config", "launch/recipes/quickstart.yaml", "--model.name_or_path", str(model), "--data.path", str(data)),
        *("--optim.max_steps", "9", "--tuning.interval", "3", "--run.log_every", "1", "--run.eval_every", "9"),
        *("--optim.micro_batch_size", "4", "--optim.warmup_steps", "2"),
        *("--data.padding_free", "false"),  # by itself it is on on CPUs, and then batches are others
    ]  # fmt: skip


class Runs:
    """Makes the runs of cases below a folder, until a deadline (time.time())."""

    def __init__(self, folder: Path, deadline: float):
        self.folder, self.deadline = folder, deadline
        self.common = common(*write_inputs(folder / "inputs", "small", 0, "cpu"))

    def place(self, name: str) -> Path:
        """The run folder of a case."""
        return self.folder / "runs" / name.replace(" ", "-")

    def make(self, name: str) -> tuple[str | None, float]:
        """What went wrong with a case, if anything, and its seconds."""
        case, began = CASES[name], time.time()
        if began > self.deadline - 10:
            return "not begun", 0.0
        shutil.rmtree(self.place(name), ignore_errors=True)
        error = None if case.then is None else self._stop_half_way(name)
        return error or self._train(name), time.time() - began

    def _command(self, name: str, options: list[str]) -> list[str]:
        return [sys.executable, "train.py", *self.common, "--run.output_dir", str(self.place(name)), *options]

    def _train(self, name: str) -> str | None:
        case = CASES[name]
        environment = os.environ | {"OMP_NUM_THREADS": "2", "TQDM_DISABLE": "1"}
        if case.cpu:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        command, left = self._command(name, case.then or case.options), max(5.0, self.deadline - time.time())
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=left, check=False
            )
        except subprocess.TimeoutExpired:
            return "no time left"
        if done.returncode == 0:
            return None
        (self.folder / f"{self.place(name).name}.err").write_text((done.stdout + done.stderr)[-20000:])
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line]
        return (lines or done.stderr.splitlines() or ["?"])[-1][:300]

    def _stop_half_way(self, name: str) -> str | None:
        command, latest = self._command(name, [*CASES[name].options, "--run.save_every", "1"]), self.place(name)
        latest = latest / "checkpoints" / "latest"
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while child.poll() is None and time.time() < self.deadline and not latest.exists():
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        child.wait(60)
        return None if latest.exists() else "no checkpoint"

    def seen(self, name: str) -> tuple[dict[int, float], list[list[int]]]:
        """Losses by step, and selections."""
        rows = map(json.loads, (self.place(name) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        chosen = map(json.loads, (self.place(name) / "selection.jsonl").read_text(encoding="utf-8").splitlines())
        return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}, [one["selected"] for one in chosen]


def row_of(runs: Runs, name: str, error: str | None, seconds: float, ended: set[str]) -> dict[str, Any]:
    """What came of a case; good where it ended and equals the case that it must equal, if that ended."""
    row: dict[str, Any] = {"case": name, "error": error, "seconds": round(seconds, 1), "good": error is None}
    if error is not None:
        return row
    losses, chosen = runs.seen(name)
    row |= {"losses": losses, "selected": chosen}
    other = CASES[name].equals
    if other in ended:
        theirs, others = runs.seen(other)
        apart = max(abs(losses[step] - theirs[step]) for step in losses.keys() & theirs.keys())
        good = chosen == others and apart <= CASES[name].tolerance
        row |= {"equals": other, "same_selections": chosen == others, "loss_apart": apart, "good": good}
    return row


def verdict(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    text = row["error"] or "ends"
    if "equals" in row:
        text = f"{'as' if row['good'] else 'DIFFERS from'} {row['equals']} (loss {row['loss_apart']:.1e}, "
        text += f"selections {'equal' if row['same_selections'] else 'NOT equal'})"
    return f"{row['case']:20s} {row['seconds']:5.0f} s  {text}"


def main() -> int:
    """Run the cases and say what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=8, help="runs at a time")
    parser.add_argument("--seconds", type=float, default=150, help="for all of them")
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES), metavar="NAME")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    runs = Runs(given.folder.resolve(), time.time() + given.seconds)
    with ThreadPoolExecutor(given.workers) as pool:
        found = dict(zip(given.only, pool.map(runs.make, given.only)))
    ended = {name for name, (error, _) in found.items() if error is None}
    rows = [row_of(runs, name, *outcome, ended) for name, outcome in found.items()]
    (runs.folder / "check.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    bad = sum(not row["good"] for row in rows)
    sys.stdout.write("\n".join([*map(verdict, rows), f"{len(rows)} cases, {bad} not as wanted", ""]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
