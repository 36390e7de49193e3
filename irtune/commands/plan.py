"""`python -m irtune plan`: what a configuration needs on N GPUs, per ZeRO stage and format of the base."""

import dataclasses
import re
from collections.abc import Sequence

from irtune.commands.common import show, show_json, table
from irtune.config import load_config
from irtune.config.batch_size import accumulation, longest_micro_batch, with_accumulation
from irtune.config.declarations import adapter_kinds
from irtune.config.deepspeed_json import read_engine_json
from irtune.errors import ConfigError
from irtune.memory import Estimate, count, estimate

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
HELP = """usage: python -m irtune plan --config FILE [--gpus N] [--zero S] [--gpu-memory 80GiB] [--json]
       [--section.key value ...]

What a run needs per rank: base weights, adapters, gradients, optimizer state (of the layers that train, and of all),
buffers, activations, host memory, bytes sent per step; what fits into --gpu-memory, and the largest micro-batch that
does. One line per ZeRO stage (--zero: one of them) and format of the base; sizes of buckets and offload are those of
the DeepSpeed file. No weights are loaded, and for presets nothing is downloaded. The model may also be
meta-llama/Llama-3.1-70B.

example: python -m irtune plan --config launch/recipes/llama3.1-8b-iterater.yaml --gpus 8 --gpu-memory 80GiB
"""


def main(arguments: Sequence[str]) -> int:
    """Print the plan."""
    if "-h" in arguments or "--help" in arguments:
        show(HELP)
        return 0
    own, rest = _own_options(arguments)
    problems = []
    gpus = own.get("--gpus", "1")
    if not re.fullmatch("[0-9]{1,6}", gpus) or int(gpus) < 1:
        problems.append(f"--gpus is {gpus[:100]!r}; accepted: a whole number of at least 1")
    stage = own.get("--zero")
    if stage is not None and stage not in ("0", "1", "2", "3"):
        problems.append(f"--zero is {stage!r}; accepted: 0, 1, 2, 3")
    memory = None
    if "--gpu-memory" in own:
        match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{0,9})?)\s*([A-Za-z]*)", own["--gpu-memory"])
        if match is None or match[2] not in UNITS:
            problems.append(f"--gpu-memory is {own['--gpu-memory']!r}; accepted: a number with a unit, such as 80GiB")
        else:
            memory = float(match[1]) * UNITS[match[2]]
    if not any(argument.startswith("--data.path") for argument in rest):
        rest.append("--data.path=corpus")  # nothing is read
    if problems:
        raise ConfigError(problems)
    config = load_config(rest)
    problems = accumulation(config.optim, int(gpus))[1]
    if problems:
        raise ConfigError(problems)
    config = with_accumulation(config, int(gpus))
    zero = read_engine_json(config, int(gpus))[0]["zero_optimization"]
    parts, plain = count(config), adapter_kinds()[config.adapter.type].needs_plain_base
    rows = [
        estimate(parts, config, stage=s, quantization=q, world=int(gpus), memory=memory, zero=zero)
        for q in ("none", "nf4", "int8")
        for s in (range(4) if stage is None else [int(stage)])
        if not (s == 3 and q == "int8") and not (q != "none" and plain)
    ]
    if "--json" in arguments:
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


def _own_options(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    own: dict[str, str] = {}
    rest: list[str] = []
    queue = [argument for argument in arguments if argument != "--json"]
    while queue:
        name, equals, value = queue.pop(0).partition("=")
        if name not in ("--gpus", "--zero", "--gpu-memory"):
            rest.append(name + equals + value)
            continue
        if not equals and not queue:
            raise ConfigError(f"option {name} needs a value")
        own[name] = value if equals else queue.pop(0)
    return own, rest


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
