"""`python -m irtune validate`: every error of a configuration at once, and what the model would see."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irtune.adapters.build import add_adapters, leave_out_padding
from irtune.adapters.guard import check_length, watch
from irtune.commands.common import add_json, at_least, parser, show, show_json
from irtune.config import Config, load_config
from irtune.config.batch_size import with_accumulation
from irtune.config.checks import needed_mask
from irtune.config.declarations import methods
from irtune.config.deepspeed_json import read_engine_json
from irtune.config.warmup import warmup_length
from irtune.console import quiet_transformers
from irtune.data import BatchSampler, Corpus, Encoded, Encoder, build_sampler, read_corpus, read_synonyms, total_steps
from irtune.distributed.runtime import read_world
from irtune.engine.deepspeed_private import unknown_zero_keys
from irtune.engine.losses import class_weights
from irtune.errors import ConfigError, IrtuneError
from irtune.evaluation.round_trip import check_round_trip
from irtune.evaluation.saved_run import check_will_load
from irtune.evaluation.start import start_from
from irtune.memory import describe, estimate_memory, shortage
from irtune.memory.measure import device_memory_bytes
from irtune.models import RunFacts, load_classifier
from irtune.models.classifier import load_tokenizer
from irtune.models.head_words import start_from_words
from irtune.models.limits import check_tokens
from irtune.models.pooling import check_pooling
from irtune.tasks import SINGLE_LABEL
from irtune.tracking.writers import check_installed

SHOWN = 3
RARE = 20


def main(arguments: Sequence[str]) -> int:
    """Check the configuration that `arguments` describe."""
    options = parser(
        "validate",
        "Check a configuration without training: every error and warning at once, the batch arithmetic, the memory "
        "plan, and the first three examples as the model will see them. Where all else is right, the base model is "
        "loaded and tried on two texts. Exit status 0: it can run; 2: it cannot.",
        "python -m irtune validate --config launch/recipes/iterater-smollm2.yaml --data.path corpus/",
        trainer=True,
    )
    options.add_argument("--ranks", type=at_least(1), default=1, help="of the run (default 1)")
    add_json(options)
    given, trainer = options.parse_known_args(list(arguments))
    found = validate(load_config(trainer), given.ranks)
    show_json(found) if given.json else show(_text(found))
    return 0


@dataclass(frozen=True)
class _Inputs:
    """What a run on some ranks would read, for `config` with its accumulation steps."""

    config: Config
    settings: dict[str, Any]
    corpus: Corpus
    tokenizer: Any
    encoded: Encoded
    sampler: BatchSampler


def validate(config: Config, ranks: int) -> dict[str, Any]:
    """What a run on `ranks` ranks would do, in plain JSON types.

    Raises:
        ConfigError: with the errors of engine settings, corpus and tokenizer together.
    """
    inputs = _read(config, ranks)
    config, corpus, sampler = inputs.config, inputs.corpus, inputs.sampler
    steps, lengths = total_steps(config.optim, sampler), sampler.lengths
    device = read_world().device
    memory = estimate_memory(
        config, inputs.settings, ranks, device_memory_bytes(device), device=device.type, labels=corpus.labels
    )
    short = memory and shortage(memory)
    at_limit = sum(length >= config.data.max_length for length in lengths)
    return {
        "warnings": _warnings(corpus, at_limit, steps, config) + ([short] if short else []),
        "examples": {split: len(rows) for split, rows in corpus.splits.items()},
        "labels": dict(_label_counts(corpus)),
        "batch": {
            "micro_batch_size": None if config.optim.micro_batch_tokens else config.optim.micro_batch_size,
            "micro_batch_tokens": config.optim.micro_batch_tokens,
            "gradient_accumulation_steps": config.optim.gradient_accumulation_steps,
            "ranks": ranks,
            "examples_per_step": sampler.examples_per_step,
            "steps": steps,
            "steps_per_epoch": sampler.steps_per_epoch,
        },
        "memory_plan": memory and describe(memory),
        "planned_memory_bytes": memory and memory.estimate.total,
        "zero_stage": inputs.settings["zero_optimization"]["stage"],
        "method": config.tuning.method,
        "adapter": config.adapter.type,
        "tokens": {"mean": sum(lengths) / len(lengths), "longest": max(lengths), "max_length": config.data.max_length},
        "first_examples": [
            {
                "id": example.id,
                "label": corpus.task.shown(example.label, corpus.labels),
                "tokens": len(item["input_ids"]),
                "edit_tokens": sum(item["edit_mask"]) if "edit_mask" in item else None,
                "text": inputs.tokenizer.decode(item["input_ids"]),
            }
            for example, item in zip(corpus.splits["train"][:SHOWN], inputs.encoded["train"])
        ],
    }


def _read(config: Config, ranks: int) -> _Inputs:
    """Read all that can be read, and try the model where nothing is wrong so far."""
    settings, problems = read_engine_json(config, ranks)
    problems += unknown_zero_keys(settings)
    config = with_accumulation(config, ranks)

    def tried(build: Callable[..., Any], *needed: Any) -> Any:
        """What `build` makes of what it needs; None, with the reason in `problems`, where it cannot or some lacks."""
        try:
            return None if any(item is None for item in needed) else build(*needed)
        except IrtuneError as error:
            problems.extend(error.problems if isinstance(error, ConfigError) else [str(error)])
            return None

    tried(lambda: check_installed(config.run.trackers))

    corpus = tried(lambda: read_corpus(config.data))
    tried(lambda corpus: class_weights(config.optim, corpus.labels), corpus)
    if config.data.synonyms is not None:
        tried(lambda: read_synonyms(Path(str(config.data.synonyms)).expanduser()))
    tokenizer = tried(lambda: load_tokenizer(config.model))
    tried(lambda tokenizer: check_pooling(config.model, tokenizer), tokenizer)
    mask = needed_mask(config.model)
    encoder = tried(lambda c, t: Encoder(t, config.data, c.labels, mask=mask), corpus, tokenizer)
    encoded = tried(lambda corpus, encoder: encoder.encode_corpus(corpus), corpus, encoder)
    micro_batches = ranks * config.optim.gradient_accumulation_steps
    sampler = tried(lambda encoded: build_sampler(encoded["train"], config, micro_batches), encoded)
    if not problems:
        tried(lambda: _check_model(config, corpus, encoded))
    if problems:
        raise ConfigError(problems)
    return _Inputs(config, settings, corpus, tokenizer, encoded, sampler)


def _check_model(config: Config, corpus: Corpus, encoded: dict[str, Any]) -> None:
    """Load the model, put adapters in and look at both, as a run does at its start.

    Raises:
        ConfigError, ModelError, RunError: for what a run would be refused for.
    """
    quiet_transformers()
    classifier = load_classifier(config.model, corpus.labels, problem_type=corpus.task.problem_type)
    if config.model.head_init is not None:
        start_from_words(classifier, config.model, corpus.labels)
    classifier.run = RunFacts.of(config)
    check_length(config, classifier)
    check_tokens(classifier, encoded.values())
    guard = watch(classifier, encoded["train"], patient=True)
    model, table = add_adapters(classifier, config.adapter)
    packed = leave_out_padding(config, classifier, table)
    if guard is not None:
        guard.check(model, table, config.adapter)
        if packed:
            guard.allows_packing(model, insist=config.data.padding_free is True)
    check_will_load(model)
    if config.model.start_from is not None:
        start_from(config.model.start_from, model, table, config.adapter, corpus.labels)
    check_round_trip(config, model, table, classifier, corpus.labels, encoded["train"])


def _label_counts(corpus: Corpus) -> Counter[str]:
    """Training examples of each label."""
    numbers = corpus.task.numbers
    return Counter(corpus.labels[n] for example in corpus.splits["train"] for n in numbers(example.label))


def _warnings(corpus: Corpus, at_limit: int, steps: int, config: Config) -> list[str]:
    counts = _label_counts(corpus)
    rare = [f"{label} ({counts[label]})" for label in corpus.labels if counts[label] < RARE]
    warnings = []
    if rare:
        warnings.append(
            f"labels with fewer than {RARE} training examples: {', '.join(rare)}"
            + ("; see optim.loss class_balanced" if corpus.task is SINGLE_LABEL else "")
        )
    if at_limit:
        share = at_limit / len(corpus.splits["train"])
        warnings.append(f"{at_limit} training examples ({share:.1%}) reach data.max_length {config.data.max_length} "
                        f"and may be shortened{', their context first' if config.data.context else ''}")  # fmt: skip
    if warmup_length(config.optim, steps) >= steps:
        given = "warmup_steps" if config.optim.warmup_fraction is None else "warmup_fraction"
        warnings.append(f"optim.{given} ({getattr(config.optim, given)}) lasts for all {steps} steps")
    if methods()[config.tuning.method].repeats and config.tuning.interval >= steps:
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
        size = f"{example['tokens']} tokens"
        if example["edit_tokens"] is not None:
            size += f", {example['edit_tokens']} of them in edits"
        lines += ["", f"--- {example['id']}: {example['label']}, {size}", example["text"]]
    return "\n".join(lines)
