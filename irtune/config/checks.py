"""Checks of a whole configuration. Nothing is loaded here; every problem is returned.

What one key accepts stands at the key, in schema.py; here are the rules about several keys. Those of an adapter type or
a method stand in its declaration.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

from irtune.config.declarations import Declaration, adapter_kinds, methods
from irtune.config.keys import declared_limit, known_keys, value_of
from irtune.config.schema import Config, DataConfig, ModelConfig
from irtune.config.tasks import task_problems
from irtune.config.template import template_problems

# Keys of zero_optimization by which ZeRO 3 rounds weights that it stores or sends.
ROUNDING = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")


def needed_mask(model: ModelConfig) -> Literal["edit_mask", "side_mask"] | None:
    """What the head must be told of each token: whether it belongs to a marked edit, or to which text of a pair."""
    if model.head == "cross":
        return "side_mask"
    return "edit_mask" if "edit" in model.pooling else None


def check_config(config: Config) -> list[str]:
    """Return one sentence per problem in `config`; an empty list means that it can be tried."""
    return [
        *_check_limits(config),
        *_check_data(config),
        *_check_loss(config),
        *task_problems(config),
        *_check_declared(config, "adapter.type", adapter_kinds()),
        *_check_declared(config, "tuning.method", methods()),
        *_check_model(config),
        *_check_adapter(config),
        *_check_tuning(config),
        *_check_batch(config),
        *_check_run(config),
    ]


def _check_limits(config: Config) -> list[str]:
    """Each key on its own. None is never out of range: the key's type says whether it may be None."""
    found = ((key, declared_limit(key), value_of(config, key)) for key in known_keys())
    return [
        limit.complaint(key, value)
        for key, limit, value in found
        if limit is not None and value is not None and not limit.allows(value)
    ]


def _check_data(config: Config) -> list[str]:
    data = config.data
    problems = []
    if data.path is None and data.train is None:
        problems.append("no corpus: set data.path (file, folder or hub id) or data.train")
    if isinstance(data.labels, dict):
        strange = [name for pair in data.labels.items() for name in pair if not isinstance(name, str)]
        if strange:
            problems.append(
                f"data.labels: {strange[0]!r} is not text (YAML reads yes, no, on and off as truth values); put labels "
                "in quotes"
            )
            return problems
    names = list(data.labels.values()) if isinstance(data.labels, dict) else data.labels
    if isinstance(data.labels, list) and len(set(data.labels)) != len(data.labels):
        problems.append(f"data.labels names a label twice: {data.labels}")
    if names is not None and len(set(names)) < 2:
        problems.append(f"data.labels has {len(set(names))} label(s); at least 2 are needed: {names}")
    if data.prompt == "diff" and data.after is None:
        problems.append("data.prompt diff compares two texts, but data.after is null; use plain, or name the column")
    if data.context_words is not None and data.prompt != "diff":
        problems.append(f"data.context_words goes with data.prompt diff, not {data.prompt}; remove it")
    columns = [column for column in (data.before, data.after, data.label, data.context) if column is not None]
    if len(set(columns)) != len(columns):
        problems.append(
            f"data.before, data.after, data.label and data.context must be different columns, not {columns}"
        )
    if data.synonyms is not None and data.augment == "none":
        problems.append("data.synonyms goes with data.augment eda; remove it, or set data.augment")
    if data.weight is not None and data.weight in columns:
        problems.append(f"data.weight is {data.weight!r}, a column that is a text or the label already")
    if data.id == data.context:
        problems.append(f"data.id is {data.id!r}, the column of data.context already")
    if data.template is not None:
        if data.prompt not in (DataConfig.prompt, "tagged"):  # the default, and what it was when older runs were made
            problems.append(f"data.template takes the place of data.prompt {data.prompt}; remove one of the two")
        problems += template_problems(data.template, pair=data.after is not None, context=data.context is not None)
    return problems


def _check_loss(config: Config) -> list[str]:
    """Weights of classes and the warm-up: what can be said without the corpus."""
    optim, problems = config.optim, []
    if optim.warmup_fraction is not None and optim.warmup_steps:
        problems.append(
            f"optim.warmup_fraction {optim.warmup_fraction} and optim.warmup_steps {optim.warmup_steps} both set "
            "the warm-up; remove one of the two"
        )
    weights = optim.class_weights
    if weights is None:
        return problems
    named = weights if isinstance(weights, dict) else dict(enumerate(weights))
    wrong = [f"{name}: {value}" for name, value in named.items() if not 0 <= value < math.inf]
    if wrong:
        problems.append(f"optim.class_weights holds {', '.join(wrong[:5])}; accepted: numbers of at least 0")
    elif isinstance(weights, list) and not any(weights):  # labels that a map does not name have 1
        problems.append("optim.class_weights has no weight above 0: nothing would be learnt")
    if optim.loss == "class_balanced":
        problems.append("optim.class_weights and optim.loss class_balanced both weigh classes; leave one of them out")
    return problems


def _check_declared(config: Config, option: str, known: Mapping[str, Declaration]) -> list[str]:
    """What the chosen adapter type or method says of other keys, and keys that only others take."""
    chosen = known.get(value_of(config, option))
    if chosen is None:  # refused already
        return []
    problems = []
    for key in sorted({key for other in known.values() for key in other.keys} - set(chosen.keys)):
        if value_of(config, key) != value_of(Config(), key):
            owners = " or ".join(name for name, other in known.items() if key in other.keys)
            problems.append(f"{key} goes with {option} {owners}, not {chosen.name}; remove it")
    for key, (wanted, reason) in chosen.needs.items():
        if value_of(config, key) != wanted:
            problems.append(f"{option} {chosen.name} {reason}: it needs {key} {wanted}, not {value_of(config, key)}")
    for values, sentence in chosen.refuses:
        if all(_matches(config, key, value) for key, value in values.items()):
            problems.append(sentence)
    return problems


def _matches(config: Config, key: str, value: Any) -> bool:
    """Whether a key has `value`, or for `...` any value but its default."""
    return value_of(config, key) != value_of(Config(), key) if value is ... else value_of(config, key) == value


def check_engine(config: Config, zero: dict[str, Any], path: object) -> list[str]:
    """Problems of `config` with the zero_optimization section of the DeepSpeed file `path`."""
    format_, problems = config.model.quantization, []
    is_3, lower = zero["stage"] == 3, "--deepspeed to a file with stage 0, 1 or 2"
    if format_ == "int8" and is_3:
        problems.append(
            f"model.quantization int8 does not go with zero_optimization.stage 3 in {path}: every rank would keep the "
            f"whole base; set model.quantization to nf4, or {lower}"
        )
    if format_ == "nf4" and is_3:
        problems += [
            f"{path}: zero_optimization.{key} would round the packed weights of model.quantization nf4, whose bits are "
            "not numbers; remove it"
            for key in ROUNDING
            if zero.get(key)
        ]
    if config.model.compile and is_3:
        problems.append(
            f"model.compile does not go with zero_optimization.stage 3 in {path}, whose hooks gather weights inside "
            f"every layer; set model.compile to false, or {lower}"
        )
    if config.model.compile and format_ != "none":
        problems.append(
            f"model.compile does not go with model.quantization {format_}, whose products cannot be compiled; set one "
            "of the two back"
        )
    if config.adapter.target_parameters and is_3:
        problems.append(
            f"adapter.target_parameters does not go with zero_optimization.stage 3 in {path}, which keeps weights in "
            f"shares; set {lower}"
        )
    kind = adapter_kinds().get(config.adapter.type)
    if kind is not None and kind.whole_weights and is_3:
        problems.append(
            f"adapter.type {kind.name} needs whole weights, which zero_optimization.stage 3 in {path} keeps in shares; "
            f"set {lower}, or adapter.type to lora"
        )
    return problems


def _check_model(config: Config) -> list[str]:
    problems = []
    kind, name, format_ = adapter_kinds().get(config.adapter.type), config.adapter.type, config.model.quantization
    if kind is not None and kind.unquantised and format_ != "none":
        problems.append(
            f"adapter.type {name} is not there for a base of model.quantization {format_}; set model.quantization to "
            "none, or adapter.type to lora"
        )
    elif kind is not None and kind.needs_plain_base and format_ != "none":
        does = "decomposes" if kind.decomposes else "trains parameters of"
        problems.append(
            f"adapter.type {name} {does} the base, which model.quantization {format_} makes constant and inexact; set "
            "model.quantization to none, or adapter.type to lora"
        )
    if config.adapter.dtype == "float32" and config.model.dtype == "float16":
        problems.append(
            "adapter.dtype float32 needs model.dtype float32 or bfloat16; with float16 set adapter.dtype to model"
        )
    if needed_mask(config.model) == "edit_mask" and (config.data.prompt != "diff" or config.data.template is not None):
        prompt = f"data.prompt {config.data.prompt}" if config.data.template is None else "data.template"
        pair = "data.prompt to diff without a template, or " if config.data.after is not None else ""
        problems.append(
            f"model.pooling {config.model.pooling} reads the marked edits, and {prompt} marks none; set {pair}"
            "model.pooling to class, last, cls or mean"
        )
    if config.model.head_init is not None:
        problems += _check_head_init(config.model)
    kind = adapter_kinds().get(config.adapter.type)
    if config.model.restart_layers and kind is not None and not kind.pretrained:
        problems.append(
            f"model.restart_layers {config.model.restart_layers}: random weights would never train under adapter.type "
            f"{config.adapter.type}; set adapter.type to none, or model.restart_layers to 0"
        )
    if config.model.restart_layers and config.model.start_from is not None:
        problems.append(
            "model.restart_layers and model.start_from both set the start of the layers; remove one of the two"
        )
    if config.model.head == "cross":
        problems += _check_cross(config)
    elif config.model.head != "linear" and config.model.pooling == "class":
        problems.append(
            f"model.head {config.model.head} goes with every model.pooling but class, whose head is the model's own"
        )
    return problems


def _check_cross(config: Config) -> list[str]:
    """What the head cross, which compares the two texts of a pair, does not go with."""
    data, pooling = config.data, config.model.pooling
    if data.after is None:
        return ["model.head cross compares two texts, but data.after is null; set model.head to linear or mlp"]
    problems = []
    if data.prompt != "tagged" or data.template is not None:
        prompt = f"data.prompt {data.prompt}" if data.template is None else "data.template"
        problems.append(
            f"model.head cross compares the texts of a pair in its tagged form, and {prompt} is set; set data.prompt "
            "to tagged without a template, or model.head to linear or mlp"
        )
    if pooling not in ("mean", "last"):
        problems.append(
            f"model.head cross pools each text by itself, which model.pooling {pooling} does not; accepted: mean, last"
        )
    return problems


def _check_head_init(model: ModelConfig) -> list[str]:
    """What else decides where the head starts, or what it reads."""
    problems = []
    if model.pooling not in ("class", "last"):
        problems.append(
            f"model.head_init makes a head that reads the last token, and model.pooling is {model.pooling}; set "
            "model.pooling to last or class"
        )
    if model.head != "linear":
        problems.append(
            f"model.head_init makes a linear head, and model.head is {model.head}; set model.head to linear"
        )
    if model.start_from is not None:
        problems.append("model.head_init and model.start_from both set the start of the head; remove one of the two")
    return problems


def _check_adapter(config: Config) -> list[str]:
    kind, name = adapter_kinds().get(config.adapter.type), config.adapter.type
    if kind is None:
        return []
    problems = []
    if config.optim.micro_batch_tokens is not None and kind.extra_tokens is not None:
        problems.append(
            f"optim.micro_batch_tokens does not count the embeddings that adapter.type {name} puts before every text; "
            "remove it"
        )
    if kind.own_weights and config.adapter.dtype == "float32" and config.model.dtype != "float32":
        problems.append(
            f"adapter.type {name} trains the model's own parameters, which are {config.model.dtype}; set "
            "adapter.dtype to model (fp32 masters are kept) or model.dtype to float32"
        )
    method = methods().get(config.tuning.method)
    weighs = method is not None and "tuning.cost_weight" in method.keys and config.tuning.cost_weight
    if weighs and (kind.below or config.adapter.embeddings):
        what = "adapter.embeddings" if config.adapter.embeddings else f"adapter.type {name}"
        problems.append(
            f"tuning.cost_weight has no effect with {what}: the backward pass goes through all layers anyway; leave it "
            "out"
        )
    return problems


def _check_tuning(config: Config) -> list[str]:
    tuning = config.tuning
    method = methods().get(tuning.method)
    problems = []
    if tuning.min_fraction > tuning.max_fraction:
        problems.append(
            f"tuning.min_fraction ({tuning.min_fraction}) is above tuning.max_fraction ({tuning.max_fraction})"
        )
    if method is not None and tuning.budget is not None and not method.takes_budget:
        problems.append(f"tuning.budget has no meaning for tuning.method {tuning.method}; remove it")
    if tuning.score in ("weight", "cosine") and tuning.scores == "stale":
        problems.append(
            f"tuning.scores stale has no meaning for tuning.score {tuning.score}, which frozen layers have too; "
            "use fresh"
        )
    return problems + _check_frozen_outputs(config)


def _check_frozen_outputs(config: Config) -> list[str]:
    if not config.tuning.keep_frozen_outputs:
        return []
    changing = {
        "model.compile": (config.model.compile, False),
        "data.augment": (config.data.augment, "none"),
        "optim.rdrop": (config.optim.rdrop, 0.0),
    }
    problems = [
        f"tuning.keep_frozen_outputs does not go together with {key} {value}; remove one of the two"
        for key, (value, off) in changing.items()
        if value != off
    ]
    method = methods().get(config.tuning.method)
    if method is not None and method.repeats:
        once = sorted(name for name, other in methods().items() if not other.repeats)
        problems.append(
            "tuning.keep_frozen_outputs needs a tuning.method that chooses layers once "
            f"({', '.join(once)}), not {method.name}"
        )
    return problems


def _check_batch(config: Config) -> list[str]:
    optim, longest = config.optim, config.data.max_length
    problems = []
    if optim.micro_batch_tokens is not None and config.data.augment != "none":
        problems.append(
            "data.augment changes the number of tokens that optim.micro_batch_tokens counts; remove one of the two"
        )
    if optim.micro_batch_tokens is not None and optim.micro_batch_tokens < longest:
        problems.append(
            f"optim.micro_batch_tokens is {optim.micro_batch_tokens}; accepted: at least data.max_length, {longest}"
        )
    if optim.micro_batch_tokens is not None and config.data.padding_free is True:
        problems.append(
            f"optim.micro_batch_tokens {optim.micro_batch_tokens} puts texts of like lengths together to be padded, "
            "and data.padding_free does without padding; remove one of the two"
        )
    if optim.micro_batch_tokens is not None and optim.global_batch_size is not None:
        problems.append(
            f"optim.global_batch_size {optim.global_batch_size} counts examples, but optim.micro_batch_tokens "
            f"{optim.micro_batch_tokens} puts varying numbers of them into a micro-batch; remove one of the two"
        )
    return problems


def _check_run(config: Config) -> list[str]:
    run = config.run
    if run.average and run.save_every:
        return [
            f"run.average {run.average} needs the checkpoint of each evaluation, and run.save_every {run.save_every} "
            "sets other steps; remove one of the two"
        ]
    return []
