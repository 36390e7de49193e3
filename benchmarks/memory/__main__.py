"""Peak memory of IR-Tuning, of LoRA in all layers, and of transformers Trainer + peft, beside irtune's plan.

    python -m benchmarks.memory                        # with a GPU: a Llama 3.1 8B of random weights, 16 x 256 tokens
    python -m benchmarks.memory --device cpu           # a small model, tensors counted one by one; minutes
    python -m benchmarks.memory --only "ir, nf4"       # cases whose name begins so; with --exact: that is so

Each case runs in a process of its own. Results go to benchmarks/results/memory-DEVICE.json, where cases that are not
run again keep their last result, and a table to standard output. On a GPU, bytes are those of torch's allocator: what
the CUDA context takes is not in them. The peak is that of training and of an evaluation batch; loading_peak is that of
what comes before. The model is written once to --scratch (16 GB for the 8B shape) and loaded as a user's would be.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MARK = "RESULT "
MIB = 2**20
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes")


def main() -> int:
    """Run all cases, or, called by itself, one of them."""
    options = _options()
    if options.case:
        return _one(json.loads(options.case), Path(options.scratch), options.device)
    import torch

    from benchmarks.memory.cases import Case, save_model

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device != "cpu"
    shape, rows, length = ("llama3.1-8b", 16, 256) if on_gpu else ("small", 4, 64)
    shape, rows, length = options.shape or shape, options.rows or rows, options.tokens or length
    cases = [
        Case(system, quantization, checkpointing, rows, length)
        for quantization, checkpointing, system in itertools.product(
            ("none", "nf4"), (False, True), ("ir", "full", "trainer", "lean")
        )
        if not (system == "lean" and quantization == "none" and not on_gpu)
    ]
    cases = [case for case in cases if (case.name if options.exact else case.name[: len(options.only)]) == options.only]
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().removeprefix("nvidia ")) if on_gpu else "cpu"
    file = Path(options.output or ROOT / "benchmarks" / "results" / f"memory-{name}.json")
    known = {row["case"]: row for row in json.loads(file.read_text())["cases"]} if file.is_file() else {}
    with tempfile.TemporaryDirectory() as own:
        folder = Path(options.scratch or own) / shape
        if not (folder / "config.json").is_file():
            save_model(folder, shape, device)
        if on_gpu:
            torch.cuda.empty_cache()
        for case in cases:
            known[case.name] = _measured(case, folder, device)
            peak = known[case.name].get("peak")
            sys.stdout.write(f"{case.name}: {f'{peak / MIB:,.1f} MiB' if peak else 'failed'}\n")
            sys.stdout.flush()
    versions = {package: metadata.version(package) for package in PACKAGES}
    setting = {"device": name, "shape": shape, "rows": rows, "length": length, "versions": versions}
    file.parent.mkdir(parents=True, exist_ok=True)
    rows_of_json = ",\n  ".join(json.dumps(row) for row in known.values())  # a case a line
    file.write_text(f'{json.dumps(setting, indent=1)[:-2]},\n "cases": [\n  {rows_of_json}\n ]\n}}\n', encoding="utf-8")
    sys.stdout.write(f"\n{table(list(known.values()))}\n\nwritten to {file}\n")
    return 0 if all("peak" in row for row in known.values()) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is a GPU")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--exact", action="store_true", help="only the case of exactly this name")
    parser.add_argument("--shape", help="llama3.1-8b, llama3.2-1b or small; default: the first on a GPU, else the last")
    parser.add_argument("--rows", type=int, help="texts of a micro-batch")
    parser.add_argument("--tokens", type=int, help="of each text")
    parser.add_argument("--output", help="the JSON file")
    parser.add_argument("--scratch", help="folder for the model, kept; default: a temporary one")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def _measured(case: Any, folder: Path, device: str) -> dict[str, Any]:
    """The result of one case from a child process; its last words where it fails."""
    values = json.dumps(vars(case))
    command = [sys.executable, __file__, "--case", values, "--scratch", str(folder), "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        sys.stderr.write(done.stderr[-2000:])
        return {"case": case.name, "error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return json.loads(lines[-1].removeprefix(MARK))


def _one(values: dict[str, Any], folder: Path, device: str) -> int:
    from benchmarks.memory.cases import Case, measure

    sys.stdout.write(MARK + json.dumps(measure(folder, Case(**values), device)) + "\n")
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """MiB by case, with the plan's error and the share of the Trainer's peak, as Markdown."""
    peaks = {row["case"]: row["peak"] for row in rows if "peak" in row}
    lines = ["| case | weights | activations | peak | planned | measured / planned | share of trainer | of lean |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        if "peak" not in row:
            lines.append(f"| {row['case']} | {row['error']} | | | | | | |")
            continue
        planned = row.get("planned_peak")
        beside = [peaks.get(row["case"].replace(row["system"], other, 1)) for other in ("trainer", "lean")]
        cells = [
            row["case"],
            *(f"{row[name] / MIB:,.1f}" for name in ("weights", "activations", "peak")),
            f"{planned / MIB:,.1f}" if planned else "",
            f"{row['peak'] / planned:.1%}" if planned else "",
            *(f"{row['peak'] / other:.0%}" if other else "" for other in beside),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
