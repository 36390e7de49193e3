"""`python -m irtune plan`: what a configuration needs on N GPUs, per ZeRO stage and format of the base."""

import argparse
import dataclasses
import re
from collections.abc import Sequence

from irtune.commands.common import add_json, at_least, parser, show, show_json, table
from irtune.config import load_config
from irtune.config.batch_size import accumulation, longest_micro_batch, with_accumulation
from irtune.config.declarations import adapter_kinds
from irtune.config.deepspeed_json import read_engine_json
from irtune.errors import ConfigError
from irtune.memory import Estimate, count, estimate

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def main(arguments: Sequence[str]) -> int:
    """Print the plan."""
    options = parser(
        "plan",
        "What a run needs per rank: base weights, adapters, gradients, optimizer state (of the layers that train, and "
        "of all), buffers, activations, host memory, bytes sent per step; what fits into --gpu-memory, and the largest "
        "micro-batch that does. One line per ZeRO stage and format of the base; sizes of buckets and offload are those "
        "of the DeepSpeed file. No weights are loaded, and for presets nothing is downloaded (but a tokenizer for "
        "L-Tuning). The model may also be meta-llama/Llama-3.1-70B.",
        "python -m irtune plan --config launch/recipes/llama3.1-8b-iterater.yaml --gpus 8 --gpu-memory 80GiB",
        trainer=True,
    )
    options.add_argument("--gpus", type=at_least(1), default=1, metavar="N", help="ranks, a GPU each (default 1)")
    options.add_argument("--zero", type=at_least(0, 3), metavar="S", help="only this ZeRO stage, 0 to 3")
    options.add_argument("--gpu-memory", type=_bytes, metavar="80GiB", help="memory of a GPU")
    add_json(options)
    given, rest = options.parse_known_args(list(arguments))
    gpus, stage = given.gpus, given.zero
    if not any(argument.startswith("--data.path") for argument in rest):
        rest.append("--data.path=corpus")  # nothing is read
    config = load_config(rest)
    problems = accumulation(config.optim, gpus)[1]
    if problems:
        raise ConfigError(problems)
    config = with_accumulation(config, gpus)
    zero = read_engine_json(config, gpus)[0]["zero_optimization"]
    kind = adapter_kinds()[config.adapter.type]
    parts, plain = count(config), kind.needs_plain_base
    rows = [
        estimate(parts, config, stage=s, quantization=q, world=gpus, memory=given.gpu_memory, zero=zero)
        for q in ("none", "nf4", "int8")
        for s in (range(4) if stage is None else [stage])
        if not (s == 3 and (q == "int8" or kind.whole_weights)) and not (q != "none" and plain)
    ]
    if given.json:
        show_json([dataclasses.asdict(row) for row in rows])
        return 0
    elements = sum(map(sum, parts.layers))
    lowest = f", layer {min(parts.selected)} the lowest" if parts.selected else ""
    show(
        f"{config.model.name_or_path}: {len(parts.layers)} layers, {parts.constant:,} constant weights, "
        f"{elements:,} trainable in layers, {sum(parts.head):,} in the head\n"
        f"{gpus} rank(s), {longest_micro_batch(config)} examples of {config.data.max_length} tokens per rank; "
        f"{len(parts.selected)} layers train at a time{lowest}; figures are MiB per rank"
    )
    for sentence in parts.assumed:
        show(f"assumed: {sentence}")
    show(f"\n{_table(rows)}")
    return 0


def _bytes(text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{0,9})?)\s*([A-Za-z]*)", text)
    if match is None or match[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"{text[:100]!r}; accepted: a number with a unit, such as 80GiB")
    return float(match[1]) * UNITS[match[2]]


def _table(rows: Sequence[Estimate]) -> str:
    def mib(value: int) -> str:
        return f"{value / 2**20:,.0f}" if value >= 10 * 2**20 else f"{value / 2**20:,.2f}"

    header = ["ZeRO, base", "base", "adapters", "gradients", "optimizer", "(all layers)", "buffers", "activations",
              "total",
              "host", "sent/step", "fits", "largest micro-batch"]  # fmt: skip
    lines = []
    for row in rows:
        values = (row.base, row.adapters, row.gradients, row.optimizer, row.optimizer_full, row.buffers,
                  row.activations, row.total, row.host, row.sent_per_step)  # fmt: skip
        fits = "" if row.fits is None else "yes" if row.fits else "no"
        largest = "" if row.largest_micro_batch is None else str(row.largest_micro_batch)
        lines.append([f"{row.stage}, {row.quantization}", *map(mib, values), fits, largest])
    return table(header, lines)
