"""`python -m irtune validate`: every error of a configuration at once, and what the model would see."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from transformers.utils import logging as transformers_logging

from irtune.adapters.build import add_adapters
from irtune.adapters.guard import check_length, watch
from irtune.commands.common import show, show_json
from irtune.config import Config, load_config
from irtune.config.batch_size import for_ranks
from irtune.config.deepspeed_json import read_engine_json
from irtune.data import Corpus, Encoder, plan_batches, read_corpus
from irtune.distributed.runtime import read_world
from irtune.engine.deepspeed_private import unknown_zero_keys
from irtune.errors import ConfigError, IrtuneError
from irtune.evaluation.saved_run import check_will_load
from irtune.evaluation.start import start_from
from irtune.memory import describe, plan_run, shortage
from irtune.memory.measure import device_memory_bytes
from irtune.models import load_classifier
from irtune.models.classifier import load_tokenizer
from irtune.models.limits import check_tokens

SHOWN = 3
RARE = 20
HELP = """usage: python -m irtune validate --config FILE [--section.key value ...] [--ranks N] [--json]

Check a configuration without training: every error and warning at once, the batch arithmetic, the memory plan, and the
first three examples as the model will see them. The model is loaded, gets its adapters, and is checked on two texts of
the corpus. Exit status 0: it can run; 2: it cannot.

example: python -m irtune validate --config launch/recipes/iterater-smollm2.yaml --data.path corpus/
"""


def main(arguments: Sequence[str]) -> int:
    """Check the configuration that `arguments` describe."""
    if "-h" in arguments or "--help" in arguments:
        show(HELP)
        return 0
    as_json = "--json" in arguments
    rest = [argument for argument in arguments if argument != "--json"]
    ranks = 1
    if "--ranks" in rest:
        place = rest.index("--ranks")
        value = rest[place + 1] if place + 1 < len(rest) else ""
        if not re.fullmatch("[0-9]{1,6}", value) or int(value) < 1:
            raise ConfigError(f"--ranks is {value[:100]!r}; accepted: a whole number of at least 1")
        ranks = int(value)
        del rest[place : place + 2]
    found = validate(load_config(rest), ranks)
    show_json(found) if as_json else show(_text(found))
    return 0


def validate(config: Config, ranks: int) -> dict[str, Any]:
    """What a run on `ranks` ranks would do, in plain JSON types.

    Raises:
        ConfigError: with the errors of engine settings, corpus and tokenizer together.
    """
    problems: list[str] = []
    settings, engine_problems = read_engine_json(config, ranks)
    problems += engine_problems + unknown_zero_keys(settings)
    config = for_ranks(config, ranks)
    corpus = _tried(lambda: read_corpus(config.data), problems)
    tokenizer = _tried(lambda: load_tokenizer(config.model), problems)
    encoder = encoded = plan = None
    if corpus and tokenizer:
        encoder = _tried(lambda: Encoder(tokenizer, config.data, corpus.labels), problems)
    if corpus and encoder:
        encoded = _tried(lambda: {s: [encoder.encode(e) for e in rows] for s, rows in corpus.splits.items()}, problems)
    if encoded:
        lengths = [len(item["input_ids"]) for item in encoded["train"]]
        micro_batches = ranks * config.optim.gradient_accumulation_steps
        plan = _tried(lambda: plan_batches(lengths, config, micro_batches), problems)
    if corpus and encoded:
        _tried(lambda: _check_model(config, corpus, encoded), problems)
    if problems or not (corpus and tokenizer and encoded and plan):
        raise ConfigError(problems)
    steps = config.optim.max_steps or max(1, round(config.optim.epochs * plan.steps_per_epoch))
    device = read_world().device
    memory = plan_run(config, settings, ranks, device_memory_bytes(device), device=device.type, labels=corpus.labels)
    short = memory and shortage(memory)
    full = [len(item["input_ids"]) >= config.data.max_length for item in encoded["train"]]
    return {
        "warnings": _warnings(corpus, sum(full), steps, config) + ([short] if short else []),
        "examples": {split: len(rows) for split, rows in corpus.splits.items()},
        "labels": dict(Counter(corpus.labels[example.label] for example in corpus.splits["train"])),
        "batch": {
            "micro_batch_size": None if config.optim.micro_batch_tokens else config.optim.micro_batch_size,
            "micro_batch_tokens": config.optim.micro_batch_tokens,
            "gradient_accumulation_steps": config.optim.gradient_accumulation_steps,
            "ranks": ranks,
            "examples_per_step": plan.examples_per_step,
            "steps": steps,
            "steps_per_epoch": plan.steps_per_epoch,
        },
        "memory_plan": memory and describe(memory),
        "planned_memory_bytes": memory and memory.estimate.total,
        "zero_stage": settings["zero_optimization"]["stage"],
        "method": config.tuning.method,
        "adapter": config.adapter.type,
        "tokens": {"mean": sum(lengths) / len(lengths), "longest": max(lengths), "max_length": config.data.max_length},
        "first_examples": [
            {
                "id": example.id,
                "label": corpus.labels[example.label],
                "tokens": len(item["input_ids"]),
                "text": tokenizer.decode(item["input_ids"]),
            }
            for example, item in zip(corpus.splits["train"][:SHOWN], encoded["train"])
        ],
    }


def _check_model(config: Config, corpus: Corpus, encoded: dict[str, Any]) -> None:
    """Load the model, put adapters in and look at both, as a run does at its start.

    Raises:
        ConfigError, ModelError, RunError: for what a run would be refused for.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    classifier = load_classifier(config.model, corpus.labels)
    check_length(config, classifier)
    check_tokens(classifier, encoded.values())
    guard = watch(classifier, encoded["train"], patient=True)
    model, table = add_adapters(classifier, config.adapter)
    if guard is not None:
        guard.check(model, table, config.adapter)
    check_will_load(model)
    if config.model.start_from is not None:
        start_from(config.model.start_from, model, table, config.adapter, corpus.labels)


def _tried(build: Any, problems: list[str]) -> Any:
    try:
        return build()
    except IrtuneError as error:
        problems += error.problems if isinstance(error, ConfigError) else [str(error)]
        return None


def _warnings(corpus: Corpus, at_limit: int, steps: int, config: Config) -> list[str]:
    counts = Counter(corpus.labels[example.label] for example in corpus.splits["train"])
    rare = [f"{label} ({counts[label]})" for label in corpus.labels if counts[label] < RARE]
    warnings = []
    if rare:
        warnings.append(
            f"labels with fewer than {RARE} training examples: {', '.join(rare)}; see optim.loss class_balanced"
        )
    if at_limit:
        share = at_limit / len(corpus.splits["train"])
        warnings.append(f"{at_limit} training examples ({share:.1%}) reach data.max_length {config.data.max_length} "
                        "and may be shortened")  # fmt: skip
    if config.optim.warmup_steps >= steps:
        warnings.append(f"optim.warmup_steps ({config.optim.warmup_steps}) lasts for all {steps} steps")
    if config.tuning.method == "ir" and config.tuning.interval >= steps:
        warnings.append(f"tuning.interval ({config.tuning.interval}): layers are chosen only once in {steps} steps")
    return warnings


def _text(found: dict[str, Any]) -> str:
    batch = found["batch"]
    tokens = batch["micro_batch_tokens"]
    size = f"{tokens} tokens" if tokens else f"{batch['micro_batch_size']} examples"
    lines = [
        "the configuration can be run",
        *(f"warning: {line}" for line in found["warnings"]),
        f"corpus: {', '.join(f'{split} {count}' for split, count in found['examples'].items())} examples; "
        + ", ".join(f"{label} {count}" for label, count in found["labels"].items()),
        f"tokens: {found['tokens']['mean']:.0f} on average, {found['tokens']['longest']} at most",
        f"batch: {size} x {batch['gradient_accumulation_steps']} accumulation x {batch['ranks']} "
        f"rank(s) = {batch['examples_per_step']:,} examples per step, {batch['steps']} steps "
        f"({batch['steps_per_epoch']} per epoch)",
        f"method {found['method']}, adapter {found['adapter']}, ZeRO {found['zero_stage']}",
        *([found["memory_plan"]] if found["memory_plan"] else []),
    ]
    for example in found["first_examples"]:
        lines += ["", f"--- {example['id']}: {example['label']}, {example['tokens']} tokens", example["text"]]
    return "\n".join(lines)
