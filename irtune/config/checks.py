"""Checks that need more than one value's type. Nothing is loaded here; every problem is returned."""

import difflib
import math
from pathlib import Path
from typing import Any

from irtune.config.schema import AdapterConfig, Config

MAX_SPLITS = 8
LARGEST = 2**16  # rank or width of an adapter; wider ones are typing errors that would fill the memory
# An adapter type is a file: to add one, nothing has to be registered anywhere.
_KINDS = Path(__file__).parents[1] / "adapters" / "kinds"
ADAPTER_TYPES = sorted(file.stem.replace("_", "-") for file in _KINDS.glob("[!_]*.py"))
OWN_WEIGHTS = ("none", "bitfit", "spafit")
# What needs the base's weights as numbers that can be trained or taken apart.
PLAIN_BASE = (*OWN_WEIGHTS, "pissa")
# Keys of zero_optimization by which ZeRO 3 rounds weights that it stores or sends.
ROUNDING = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")
OUTSIDE_LAYERS = ("prompt", "ltuning-prompt")


def check_config(config: Config) -> list[str]:
    """Return one sentence per problem in `config`; an empty list means that it can be tried."""
    return [*_check_numbers(config), *_check_data(config), *_check_combinations(config)]


def _check_numbers(config: Config) -> list[str]:
    optim, tuning, run, adapter, data = config.optim, config.tuning, config.run, config.adapter, config.data
    rules: list[tuple[str, float, bool, str]] = [
        ("model.name_or_path", 0, bool(config.model.name_or_path.strip()), "a folder, a hub id or a preset"),
        ("adapter.r", adapter.r, 1 <= adapter.r <= LARGEST, f"1 to {LARGEST}"),
        ("adapter.alpha", adapter.alpha, 0 < adapter.alpha < math.inf, "a number above 0"),
        ("adapter.dropout", adapter.dropout, 0 <= adapter.dropout < 1, "a number from 0 to below 1"),
        ("data.length_bucket", data.length_bucket, data.length_bucket >= 1, "a whole number of at least 1"),
        ("data.max_length", data.max_length, data.max_length >= 16, "a whole number of at least 16"),
        ("tuning.num_splits", tuning.num_splits, 1 <= tuning.num_splits <= MAX_SPLITS, f"1 to {MAX_SPLITS}"),
        ("tuning.interval", tuning.interval, tuning.interval >= 1, "a whole number of at least 1"),
        ("tuning.min_fraction", tuning.min_fraction, 0 <= tuning.min_fraction <= 1, "a number from 0 to 1"),
        ("tuning.max_fraction", tuning.max_fraction, 0 < tuning.max_fraction <= 1, "a number above 0, at most 1"),
        ("tuning.cost_weight", tuning.cost_weight, 0 <= tuning.cost_weight < math.inf, "a number of at least 0"),
        ("tuning.ema", tuning.ema, 0 <= tuning.ema < 1, "a number from 0 to below 1"),
        ("tuning.temperature", tuning.temperature, 0 < tuning.temperature < math.inf, "a number above 0"),
        ("tuning.max_bad_scores", tuning.max_bad_scores, tuning.max_bad_scores >= 1, "at least 1"),
        ("optim.lr", optim.lr, 0 < optim.lr < math.inf, "a number above 0"),
        ("optim.weight_decay", optim.weight_decay, 0 <= optim.weight_decay < math.inf, "a number of at least 0"),
        ("optim.eps", optim.eps, 0 < optim.eps < 1, "a number between 0 and 1"),
        ("optim.warmup_steps", optim.warmup_steps, optim.warmup_steps >= 0, "a whole number of at least 0"),
        ("optim.max_grad_norm", optim.max_grad_norm, 0 <= optim.max_grad_norm < math.inf, "a number of at least 0"),
        ("optim.epochs", optim.epochs, 0 < optim.epochs < math.inf, "a number above 0"),
        ("optim.max_steps", optim.max_steps or 0, optim.max_steps is None or optim.max_steps >= 1, "at least 1"),
        ("optim.micro_batch_size", optim.micro_batch_size, optim.micro_batch_size >= 1, "at least 1"),
        (
            "optim.micro_batch_tokens",
            optim.micro_batch_tokens or 0,
            optim.micro_batch_tokens is None or optim.micro_batch_tokens >= config.data.max_length,
            f"at least data.max_length, {config.data.max_length}",
        ),
        (
            "optim.gradient_accumulation_steps",
            optim.gradient_accumulation_steps,
            optim.gradient_accumulation_steps >= 1,
            "at least 1",
        ),
        (
            "optim.global_batch_size",
            optim.global_batch_size or 0,
            optim.global_batch_size is None or optim.global_batch_size >= 1,
            "at least 1",
        ),
        (
            "optim.class_balance_beta",
            optim.class_balance_beta,
            0 <= optim.class_balance_beta < 1,
            "a number from 0 to below 1",
        ),
        ("optim.focal_gamma", optim.focal_gamma, 0 <= optim.focal_gamma < math.inf, "a number of at least 0"),
        ("optim.label_smoothing", optim.label_smoothing, 0 <= optim.label_smoothing < 1, "a number from 0 to below 1"),
        ("run.seed", run.seed, 0 <= run.seed < 2**31, "a whole number from 0 to 2147483647"),
        ("run.log_every", run.log_every, run.log_every >= 1, "at least 1"),
        ("run.eval_every", run.eval_every, run.eval_every >= 0, "at least 0"),
        ("run.save_every", run.save_every, run.save_every >= 0, "at least 0"),
        ("run.patience", run.patience, run.patience >= 0, "a whole number of at least 0"),
        ("run.keep_last", run.keep_last, run.keep_last >= 1, "at least 1"),
        ("run.max_skipped_steps", run.max_skipped_steps, run.max_skipped_steps >= 1, "at least 1"),
        ("run.timeout_seconds", run.timeout_seconds, run.timeout_seconds >= 1, "at least 1"),
    ]
    problems = [f"{key} is {value!r}; accepted: {accepted}" for key, value, good, accepted in rules if not good]
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        problems.append(f"optim.betas is {optim.betas!r}; accepted: two numbers from 0 to below 1")
    if tuning.min_fraction > tuning.max_fraction:
        problems.append(
            f"tuning.min_fraction ({tuning.min_fraction}) is above tuning.max_fraction ({tuning.max_fraction})"
        )
    return problems + _check_adapter(adapter)


def _check_adapter(adapter: AdapterConfig) -> list[str]:
    rules: list[tuple[str, object, bool, str]] = [
        ("adapter.size", adapter.size, 1 <= adapter.size <= LARGEST, f"1 to {LARGEST}"),
        ("adapter.scale", adapter.scale, 0 < adapter.scale < math.inf, "a number above 0"),
        ("adapter.num_tokens", adapter.num_tokens, 1 <= adapter.num_tokens <= LARGEST, f"1 to {LARGEST}"),
    ]
    problems = [f"{key} is {value!r}; accepted: {accepted}" for key, value, good, accepted in rules if not good]
    if adapter.type not in ADAPTER_TYPES:
        near = difflib.get_close_matches(adapter.type, ADAPTER_TYPES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        problems.append(f"adapter.type is {adapter.type!r}; {hint}accepted: {', '.join(ADAPTER_TYPES)}")
    if adapter.strata is not None:
        a, b = [*adapter.strata, 0, 0][:2]
        if adapter.type != "spafit":
            problems.append(f"adapter.strata goes with adapter.type spafit, not {adapter.type}")
        if len(adapter.strata) != 2 or not 0 <= a <= b:
            problems.append(f"adapter.strata is {adapter.strata}; accepted: [a, b] with 0 <= a <= b <= layers")
    if adapter.target_parameters and adapter.type not in ("lora", "rslora"):
        problems.append(f"adapter.target_parameters goes with adapter.type lora or rslora, not {adapter.type}")
    if adapter.target_parameters and adapter.dropout:
        problems.append(
            f"adapter.dropout is {adapter.dropout}, which adapter.target_parameters cannot have; set it to 0"
        )
    if adapter.embeddings and adapter.type != "none":
        problems.append(f"adapter.embeddings goes with adapter.type none, not {adapter.type}")
    return problems


def _check_data(config: Config) -> list[str]:
    data = config.data
    problems = []
    if data.path is None and data.train is None:
        problems.append("no corpus: set data.path (file, folder or hub id) or data.train")
    if data.dev_fraction is not None and not 0 < data.dev_fraction <= 0.5:
        problems.append(f"data.dev_fraction is {data.dev_fraction!r}; accepted: a number above 0, at most 0.5")
    if data.fold is not None:
        k, slash, n = data.fold.partition("/")
        numbers = slash and k.isdecimal() and n.isdecimal() and len(k + n) < 20
        if not (numbers and int(n) >= 2 and 1 <= int(k) <= int(n)):
            problems.append(f"data.fold is {data.fold!r}; accepted: K/N with 1 <= K <= N and N at least 2, such as 2/5")
    if isinstance(data.labels, dict):
        strange = [name for pair in data.labels.items() for name in pair if not isinstance(name, str)]
        if strange:
            problems.append(
                f"data.labels: {strange[0]!r} is no text (YAML reads yes, no, on and off as truth values); put labels "
                "in quotes"
            )
            return problems
    names = list(data.labels.values()) if isinstance(data.labels, dict) else data.labels
    if isinstance(data.labels, list) and len(set(data.labels)) != len(data.labels):
        problems.append(f"data.labels names a label twice: {data.labels}")
    if names is not None and len(set(names)) < 2:
        problems.append(f"data.labels has {len(set(names))} label(s); at least 2 are needed: {names}")
    columns = [column for column in (data.before, data.after, data.label) if column is not None]
    if len(set(columns)) != len(columns):
        problems.append(f"data.before, data.after and data.label must be different columns, not {columns}")
    return problems


def check_compile(config: Config, zero: dict[str, Any], path: object) -> list[str]:
    """Problems of model.compile with the base and the zero_optimization section of the DeepSpeed file `path`."""
    if not config.model.compile:
        return []
    problems = []
    if zero["stage"] == 3:
        problems.append(
            f"model.compile does not go with zero_optimization.stage 3 in {path}, whose hooks gather weights inside "
            "every layer; set model.compile to false, or --deepspeed to a file with stage 0, 1 or 2"
        )
    if config.model.quantization != "none":
        problems.append(
            f"model.compile does not go with model.quantization {config.model.quantization}, whose products cannot be "
            "compiled; set one of the two back"
        )
    return problems


def check_parameters(parameters: list[str], zero: dict[str, Any], path: object) -> list[str]:
    """Problems of adapter.target_parameters with the zero_optimization section of the DeepSpeed file `path`."""
    if not parameters or zero["stage"] != 3:
        return []
    return [
        f"adapter.target_parameters does not go with zero_optimization.stage 3 in {path}, which keeps weights in "
        "shares; set --deepspeed to a file with stage 0, 1 or 2"
    ]


def check_sharding(quantization: str, zero: dict[str, Any], path: object) -> list[str]:
    """Problems of a quantised base with the zero_optimization section of the DeepSpeed file `path`."""
    if quantization == "none" or zero["stage"] != 3:
        return []
    if quantization == "int8":
        return [
            f"model.quantization int8 does not go with zero_optimization.stage 3 in {path}: every rank would keep the "
            "whole base; set model.quantization to nf4, or --deepspeed to a file with stage 0, 1 or 2"
        ]
    return [
        f"{path}: zero_optimization.{key} would round the packed weights of model.quantization nf4, whose bits are no "
        "numbers; take it out"
        for key in ROUNDING
        if zero.get(key)
    ]


def _check_combinations(config: Config) -> list[str]:
    problems = []
    if config.model.quantization != "none" and config.adapter.type in PLAIN_BASE:
        does = "decomposes" if config.adapter.type == "pissa" else "trains parameters of"
        problems.append(
            f"adapter.type {config.adapter.type} {does} the base, which model.quantization {config.model.quantization} "
            "makes constant and inexact; set model.quantization to none, or adapter.type to lora"
        )
    if config.adapter.dtype == "float32" and config.model.dtype == "float16":
        problems.append(
            "adapter.dtype float32 needs model.dtype float32 or bfloat16; with float16 set adapter.dtype to model"
        )
    adapter, tuning, optim = config.adapter, config.tuning, config.optim
    if optim.micro_batch_tokens is not None and optim.global_batch_size is not None:
        problems.append(
            f"optim.global_batch_size {optim.global_batch_size} counts examples, of which optim.micro_batch_tokens "
            f"{optim.micro_batch_tokens} puts more or fewer into a micro-batch; leave one of the two out"
        )
    if optim.micro_batch_tokens is not None and adapter.type in OUTSIDE_LAYERS:
        problems.append(
            f"optim.micro_batch_tokens does not count the embeddings that adapter.type {adapter.type} puts before "
            "every text; leave it out"
        )
    if adapter.type in OWN_WEIGHTS and adapter.dtype == "float32" and config.model.dtype != "float32":
        problems.append(
            f"adapter.type {adapter.type} trains the model's own parameters, which are {config.model.dtype}; set "
            "adapter.dtype to model (fp32 masters are kept) or model.dtype to float32"
        )
    if adapter.type in OUTSIDE_LAYERS and tuning.method != "full":
        problems.append(
            f"adapter.type {adapter.type} has its parameters before the first layer, not in layers: tuning.method "
            f"{tuning.method} has nothing to choose; use full"
        )
    if tuning.method == "spafit" and adapter.type != "spafit":
        problems.append(f"tuning.method spafit needs adapter.type spafit, not {adapter.type}")
    if tuning.budget is not None and tuning.method in ("full", "fixed", "spafit"):
        problems.append(f"tuning.budget has no meaning for tuning.method {tuning.method}; leave it out")
    if tuning.budget is not None and tuning.method == "ir" and tuning.rule == "reference":
        problems.append("tuning.budget cannot be kept by tuning.rule reference, which has limits of its own; use otsu")
    if tuning.cost_weight and tuning.method != "ir":
        problems.append(f"tuning.cost_weight has no meaning for tuning.method {tuning.method}; leave it out")
    elif tuning.cost_weight and (adapter.type == "ltuning-prefix" or adapter.embeddings):
        what = "adapter.embeddings" if adapter.embeddings else f"adapter.type {adapter.type}"
        problems.append(
            f"tuning.cost_weight has no effect with {what}: the backward pass goes through all layers anyway; leave it "
            "out"
        )
    if (tuning.layers is None) == (tuning.method == "fixed"):
        problems.append("tuning.layers goes with tuning.method fixed, and fixed needs it, for example 0-3,7")
    if tuning.method == "grass" and tuning.score != "rms":
        problems.append(f"tuning.method grass is defined for tuning.score rms, not {tuning.score}")
    if config.tuning.score in ("weight", "cosine") and config.tuning.scores == "stale":
        problems.append(
            f"tuning.scores stale has no meaning for tuning.score {config.tuning.score}, which frozen layers have too; "
            "use fresh"
        )
    return problems
