"""What benchmarks/speed writes: JSON, a table and a picture."""

import json
import os
import platform
import re
import statistics
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.turns import Turn
from irtune.config import Config
from irtune.distributed.runtime import World
from irtune.train.setup import RunSetup

RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "accelerate")
PAIRS = ("a/c", "a/d", "a/b", "a/e", "a/f", "a/g", "b/c", "b/d", "b/e", "b/g", "e/c", "c/d", "h/a")
NAMES = {
    "a": "irtune ir",
    "b": "irtune full",
    "c": "Trainer + peft",
    "d": "Trainer + peft,\nall padded",
    "e": "bare loop",
    "f": "matrix products\nof a",
    "g": "Trainer + peft,\neager attention",
    "h": "irtune ir,\npadding-free",
}


def setting(job: dict[str, Any], config: Config, world: World, setup: RunSetup) -> dict[str, Any]:
    """Where and on what the figures were measured; no path of the machine."""
    on_gpu = world.device.type == "cuda"
    optim, adapter = config.optim, config.adapter
    own = [argument for argument in job["arguments"] if not re.search(r"[/\\]", argument)]
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _processor(),
        "cores": os.cpu_count(),
        "threads": job["threads"],
        "ranks": world.size,
        "model": Path(config.model.name_or_path).name,
        "dtype": config.model.dtype,
        "quantization": config.model.quantization,
        "adapter": {"type": adapter.type, "r": adapter.r, "dropout": adapter.dropout,
                    "targets": adapter.target_modules},
        "corpus": {
            "name": Path(config.data.path).name,
            "examples": len(setup.data.encoded["train"]),
            "mean_tokens": statistics.mean(setup.data.sampler.lengths),
            "max_length": config.data.max_length,
        },
        "batch": {"micro": optim.micro_batch_size, "accumulation": optim.gradient_accumulation_steps,
                  "global": optim.micro_batch_size * optim.gradient_accumulation_steps * world.size},
        "arguments": own,
        "steps": job["steps"],
        "warm_up": job["warm_up"],
        "order": job["sides"],
        "versions": {package: metadata.version(package) for package in PACKAGES},
    }  # fmt: skip


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8")) if info.is_file() else []
    return names[0] if names else platform.processor()


def summary(letter: str, turns: list[Turn], peak: int | None) -> dict[str, Any]:
    """Medians over the rounds of a side, and its rounds."""
    rounds = [
        {
            "examples_per_second": turn.examples / sum(turn.seconds),
            "tokens_per_second": turn.tokens / sum(turn.seconds),
            "seconds_per_step": sum(turn.seconds) / len(turn.seconds),
            "steps": len(turn.seconds),
            "examples": turn.examples,
            "tokens": turn.tokens,
            "padding_share": 1 - turn.tokens / turn.padded_tokens,
            "cpu_share": turn.cpu_seconds / sum(turn.seconds) / torch.get_num_threads() or None,
            "step_seconds": [round(seconds, 5) for seconds in turn.seconds],
            "losses": turn.losses,
            **({"digests": turn.digests} if turn.digests else {}),
            **({"selected": turn.selected} if letter in "ah" else {}),
        }
        for turn in turns
    ]
    return {"name": NAMES[letter].replace("\n", " "), "peak_memory_bytes": peak, "rounds": rounds} | _medians(rounds)


def _medians(rounds: list[dict[str, Any]]) -> dict[str, float]:
    names = ("examples_per_second", "tokens_per_second", "seconds_per_step", "padding_share")
    return {name: statistics.median(entry[name] for entry in rounds) for name in names}


def ratios(sides: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Ratios of the sides' median examples/s, and the ratios of single rounds: their median, lowest and highest.

    A round's turns take steps of like lengths one after the other, so its ratio is free of what changes by round.
    """
    found = {}
    for pair in PAIRS:
        first, second = (sides.get(letter) for letter in pair.split("/"))
        if first and second:
            rates = [[entry["examples_per_second"] for entry in side["rounds"]] for side in (first, second)]
            each = [one / other for one, other in zip(*rates)]
            found[pair] = {
                "ratio": first["examples_per_second"] / second["examples_per_second"],
                "median_of_rounds": statistics.median(each),
                "low": min(each),
                "high": max(each),
            }
    return found


def output_file(wanted: str | None, device: str, ranks: int, on_gpu: bool) -> Path:
    """Where the results go: `wanted`, or by the device and the number of ranks."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia ")) if on_gpu else "cpu"
    several = f"-{ranks}-ranks" if ranks > 1 else ""
    return Path(wanted) if wanted else RESULTS / f"speed-{name}{several}.json"


def write(result: dict[str, Any], wanted: str | None) -> None:
    """Write JSON and picture, and print the table."""
    file = output_file(wanted, result["device"], result["ranks"], torch.cuda.is_available())
    result["ratios"] = ratios(result["sides"])
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found.group().split()), text)  # a list of numbers a line
    file.write_text(text + "\n", encoding="utf-8")
    picture(result, file.with_suffix(".png"))
    sys.stdout.write(f"\n{table(result)}\n\nwritten to {file}\n")


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown. CPU share: of the threads' time in the most disturbed round of a side."""
    lines = ["| side | examples/s | rounds | tokens/s | s per step | padding | peak memory (MiB) | CPU share |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for letter, side in result["sides"].items():
        rates = [entry["examples_per_second"] for entry in side["rounds"]]
        peak = side["peak_memory_bytes"]
        shares = [entry["cpu_share"] for entry in side["rounds"] if entry["cpu_share"]]
        lines.append(
            f"| {letter}: {side['name']} | {side['examples_per_second']:.2f} | {min(rates):.2f} to {max(rates):.2f} | "
            f"{side['tokens_per_second']:.0f} | {side['seconds_per_step']:.3f} | {side['padding_share']:.1%} | "
            f"{f'{peak / 2**20:,.0f}' if peak else ''} | {f'{min(shares):.0%}' if shares else ''} |"
        )
    lines += ["", "| ratio | of medians | median of rounds | rounds |", "|---|---|---|---|"]
    for pair, entry in result["ratios"].items():
        rounds = f"{entry['median_of_rounds']:.3f} | {entry['low']:.3f} to {entry['high']:.3f}"
        lines.append(f"| {pair} | {entry['ratio']:.3f} | {rounds} |")
    lines.append("")
    if result["matrix"]:
        lines.append(_matrix_line(result["matrix"]))
    if result["selection"]:
        lines.append(f"selection: {result['selection']['share_of_step_time']:.2%} of step time")
    for letter, entry in result["evaluation"].items():
        lines.append(
            f"evaluation, {letter}: {entry['examples_per_second']:.2f} examples/s in batches of {entry['batch_size']}"
        )
    starts = [f"{seconds:.1f} s" if seconds else "failed" for seconds in result["start_seconds"]]
    lines += [f"start to first step: {', '.join(starts)}"] if starts else []
    for letter, rows in result["profile"].items():
        lines += ["", f"| operation of {letter} | ms per step | share | calls per step |", "|---|---|---|---|"]
        lines += [
            f"| {row['operation']} | {row['milliseconds_per_step']:.1f} | {row['share']:.1%} | "
            f"{row['calls_per_step']:.0f} |"
            for row in rows
        ]
    return "\n".join(lines)


def _matrix_line(matrix: dict[str, Any]) -> str:
    """How fast the products of a's steps went, alone and within a."""
    alone, within = (statistics.median(matrix[name]) for name in ("flops_per_second", "flops_per_second_of_a"))
    large = matrix["large_product_flops_per_second"]
    return (
        f"matrix products: {alone / 1e9:,.0f} GFLOP/s alone, {within / 1e9:,.0f} within a ({within / large:.0%} of one "
        f"large product's {large / 1e9:,.0f})"
    )


def picture(result: dict[str, Any], file: Path) -> None:
    """Bars of examples per second, with the spread of the rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sides = result["sides"]
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.4 * len(sides)), 4.5), dpi=120)
    for place, (letter, side) in enumerate(sides.items()):
        rates = [entry["examples_per_second"] for entry in side["rounds"]]
        middle = side["examples_per_second"]
        colour = {"a": "#1f6fb4", "b": "#5fa2d9", "f": "#cccccc"}.get(letter, "#8c8c8c")
        axes.bar(place, middle, width=0.7, color=colour)
        axes.errorbar(place, middle, [[middle - min(rates)], [max(rates) - middle]], color="black", capsize=4)
        axes.text(place + 0.05, max(rates), f" {middle:.2f}", ha="left", va="bottom", fontsize=9)
    axes.set_xticks(range(len(sides)), [f"{letter}: {NAMES[letter]}" for letter in sides], fontsize=8)
    axes.set_ylabel("training examples per second")
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    batch, corpus = result["batch"]["global"], result["corpus"]["name"]
    axes.set_title(
        f"{result['model']}, {corpus}, batch {batch}, {result['ranks']} rank(s) x {result['threads']} thread(s), "
        f"{result['device']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
