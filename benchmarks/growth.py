"""How the cost of a step and of a selection grows with layers, tokens and ranks.

    python benchmarks/growth.py

Models of random weights (hidden size 256), a quarter of the layers trained, the lowest of them in the middle, so that
the share of the backward pass is the same everywhere. Results go to benchmarks/results/growth-cpu.json and as a table
to standard output. The bytes that a step sends are counted by tests/jobs/test_traffic.py.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
ROWS, STEPS, SELECTIONS = 4, 5, 6


@dataclasses.dataclass(frozen=True)
class Point:
    """One measurement: ranks, ZeRO stage, layers, and tokens of each of the ROWS examples of a micro-batch."""

    ranks: int
    stage: int
    layers: int
    tokens: int


POINTS = [
    *(Point(1, 2, layers, 128) for layers in (6, 12, 24, 48)),
    *(Point(1, 2, 12, tokens) for tokens in (64, 256, 512, 1024)),
    *(Point(ranks, 2, 12, 128) for ranks in (2, 4)),
    *(Point(2, stage, layers, 64) for stage in (0, 2, 3) for layers in (12, 32, 48)),
]


def main() -> int:
    """Measure every point, the points of one number of ranks in one group of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "growth-cpu.json"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return _work(options.worker)
    found: list[dict[str, Any]] = []
    for ranks in sorted({point.ranks for point in POINTS}):
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_BUILD_OPS": "0", "PYTHONPATH": str(ROOT)}
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            command = [sys.executable, *launch, str(Path(__file__).resolve()), "--worker", folder]
            subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
            found += json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
    result = {"rows": ROWS, "threads_per_rank": 1, "cores": os.cpu_count(), "points": found}
    Path(options.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(found))
    return 0


def table(found: list[dict[str, Any]]) -> str:
    """The points as a table in Markdown."""
    lines = [
        "| ranks | ZeRO | layers | tokens | ms per step | ms per selection |",
        "|---|---|---|---|---|---|",
        *(
            f"| {p['ranks']} | {p['stage']} | {p['layers']} | {p['tokens']} | {1e3 * p['step']:.0f} | "
            f"{1e3 * p['selection']:.0f} |"
            for p in found
        ),
    ]
    return "\n".join(lines) + "\n"


def _work(folder: Path) -> int:
    from irtune.distributed import runtime

    world = runtime.read_world()
    runtime.start(world, 300)
    found = [_measured(point, folder) for point in POINTS if point.ranks == world.size]
    if world.is_main:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    runtime.barrier()
    runtime.stop()
    return 0


def _measured(point: Point, folder: Path) -> dict[str, Any]:
    """Median seconds of a step, and of a selection that changes half of the trained layers."""
    from irtune.train.layer_selection import verify_selection

    engine = _engine(point, folder)
    first, second = _selections(point.layers)
    engine.reselect(first)
    batches = _batches(point.tokens)
    steps, selections = [], []
    for number in range(STEPS + SELECTIONS + 1):
        started = time.perf_counter()
        engine.forward_backward(next(batches))
        engine.step(1e-3)
        if number > SELECTIONS:
            steps.append(time.perf_counter() - started)
            continue
        started = time.perf_counter()
        chosen = second if engine.selected == first else first
        verify_selection(chosen, point.layers, engine.device)
        engine.reselect(chosen)
        selections.append(time.perf_counter() - started)
    engine.close()
    medians = {"step": statistics.median(steps), "selection": statistics.median(selections[1:])}
    return dataclasses.asdict(point) | medians


def _selections(layers: int) -> tuple[list[int], list[int]]:
    """Two sets of a quarter of the layers with the middle one as the lowest; half of the layers are in both."""
    upper, count = list(range(layers // 2, layers)), layers // 4
    shared = upper[: max(1, count // 2)]
    rest = upper[len(shared) :]
    more = max(1, count - len(shared))
    return shared + rest[:more], shared + rest[-more:]


def _engine(point: Point, folder: Path):
    from benchmarks.memory.cases import SHAPES, save_model
    from irtune.adapters.build import add_adapters
    from irtune.config import AdapterConfig, ModelConfig, OptimConfig
    from irtune.distributed import runtime
    from irtune.engine import Engine
    from irtune.models import load_classifier

    name = f"layers-{point.layers}"
    SHAPES[name] = SHAPES["small"] | {"num_hidden_layers": point.layers}
    model = folder / name
    if runtime.rank() == 0 and not model.exists():
        save_model(model, name, "cpu")
    runtime.barrier()
    runtime.seed_everything(0, deterministic=False)
    classifier = load_classifier(ModelConfig(name_or_path=str(model), dtype="bfloat16"), ["a", "b"])
    network, layers = add_adapters(classifier, AdapterConfig())
    settings = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": point.stage, "reduce_bucket_size": 1_000_000},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    engine = Engine(network, layers, OptimConfig(), settings)
    engine.module.train()
    return engine


def _batches(tokens: int) -> Iterator[dict[str, Any]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    while True:
        ids = torch.randint(4, 1000, (ROWS, tokens), generator=generator)
        labels = torch.randint(0, 2, (ROWS,), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


if __name__ == "__main__":
    sys.exit(main())
