"""The DeepSpeed JSON: engine knobs only. What the recipe decides is filled in where the file says "auto"."""

import difflib
import json
from pathlib import Path
from typing import Any

from irtune.config.batch_size import accumulation, with_accumulation
from irtune.config.checks import check_engine
from irtune.config.packaged import find_packaged
from irtune.config.schema import Config
from irtune.errors import brief
from irtune.files import read_text

# Decided by the recipe, so the JSON must not hold them at all.
RECIPE_ONLY = {
    "optimizer": "the optim section",
    "scheduler": "optim.schedule and optim.warmup_steps",
    "data_types": "model.dtype and adapter.dtype",
    "tensorboard": "irtune, which writes TensorBoard files itself",
    "checkpoint": "irtune's own checkpoints",
}


# What the top of the file may hold: knobs of the engine that do not change what is computed.
KNOBS = {
    "zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "bf16", "fp16", "steps_per_print", "wall_clock_breakdown", "memory_breakdown",
    "communication_data_type", "comms_logger", "flops_profiler", "aio", "dump_state",
}  # fmt: skip


# What a knob holds; "auto" goes everywhere.
KINDS: dict[str, tuple[type, str]] = dict.fromkeys(
    ("zero_optimization", "bf16", "fp16", "comms_logger", "flops_profiler", "aio"), (dict, "an object")
) | {
    "steps_per_print": (int, "a whole number"),
    "communication_data_type": (str, "the name of a number format"),
    "wall_clock_breakdown": (bool, "true or false"),
    "memory_breakdown": (bool, "true or false"),
    "dump_state": (bool, "true or false"),
}
MAX_BYTES = 2**20


def read_engine_json(config: Config, world_size: int | None) -> tuple[dict[str, Any], list[str]]:
    """Read and complete the file named by `config.deepspeed`; without a `world_size`, leave out what depends on it.

    Returns:
        The settings for deepspeed.initialize, and one sentence per problem (contradictions show both values).
    """
    path = find_engine_json(config.deepspeed)
    if path is None:
        return {}, [f"deepspeed: there is no file {config.deepspeed!r}"]
    try:
        settings = json.loads(read_text(path, MAX_BYTES), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        return {}, [f"deepspeed: {path} is not valid JSON: {str(error)[:300]}"]
    if not isinstance(settings, dict):
        return {}, [f"deepspeed: {path} must hold an object, not a {type(settings).__name__}"]
    problems = _unknown(settings, path)
    for key in ("zero_optimization", "bf16", "fp16"):
        settings.setdefault(key, {})
    for key, (kind, words) in KINDS.items():
        value = settings.get(key, "auto")
        if value != "auto" and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            problems.append(f"{path}: {key} must hold {words}, not {brief(value)}")
    if problems:
        return {}, problems
    if world_size is not None:
        problems += accumulation(config.optim, world_size)[1]
        config = with_accumulation(config, world_size)
    for key, (option, value) in _decided(config, world_size).items():
        given = _get(settings, key)
        if given not in (None, "auto", value):
            problems.append(f'{path}: {key} is {brief(given)}, but {option} makes it {value!r}; write "auto"')
        _set(settings, key, value)
    stage = settings["zero_optimization"].setdefault("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        problems.append(f"{path}: zero_optimization.stage is {brief(stage)}; accepted: 0, 1, 2, 3")
    problems += check_engine(config, settings["zero_optimization"], path)
    # The optimizer is torch's AdamW: ZeRO must accept it, and offload must not insist on DeepSpeed's own.
    settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    # DeepSpeed's own throughput would wait for the GPU twice per micro-batch; nobody would see it.
    settings["timers"] = {"throughput": {"enabled": False}}
    settings.setdefault("steps_per_print", 2**31)
    return settings, problems


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON itself takes the last of two equal keys without a word."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the key {name!r} appears twice")
    return dict(pairs)


def _unknown(settings: dict[str, Any], path: Path) -> list[str]:
    """Keys that the recipe decides, or that nobody knows."""
    problems = []
    for key in settings:
        if key in RECIPE_ONLY:
            problems.append(f"{path}: {key!r} belongs to {RECIPE_ONLY[key]}; remove it from the DeepSpeed file")
        elif key not in KNOBS:
            near = difflib.get_close_matches(key, KNOBS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"accepted: {', '.join(sorted(KNOBS))}"
            problems.append(f"{path}: unknown key {key!r}; {hint}")
    return problems


def find_engine_json(name: str) -> Path | None:
    """The file `name` as given, or the one of irtune's own that it means."""
    given = Path(name).expanduser()
    return given if given.is_file() else find_packaged("ds_configs", name)


def engine_dtype(config: Config) -> str:
    """Format that the engine trains in: fp32 unless adapters follow a lower-precision model."""
    return config.model.dtype if config.adapter.dtype == "model" else "float32"


def _decided(config: Config, world_size: int | None) -> dict[str, tuple[str, Any]]:
    """Key of the JSON -> the option that decides it, and its value."""
    optim, dtype = config.optim, engine_dtype(config)
    decided: dict[str, tuple[str, Any]] = {
        "train_micro_batch_size_per_gpu": ("optim.micro_batch_size", optim.micro_batch_size),
        "gradient_clipping": ("optim.max_grad_norm", optim.max_grad_norm),
        "bf16.enabled": ("adapter.dtype with model.dtype", dtype == "bfloat16"),
        "bf16.check_grad_overflow": ("irtune, which skips steps that are not finite,", True),
        "zero_optimization.compute_grad_norm": ("irtune, which skips steps that are not finite,", True),
        "fp16.enabled": ("adapter.dtype with model.dtype", dtype == "float16"),
    }
    if world_size is not None or optim.global_batch_size is None:
        option = "gradient_accumulation_steps" if optim.global_batch_size is None else "global_batch_size"
        decided["gradient_accumulation_steps"] = (f"optim.{option}", optim.gradient_accumulation_steps)
    if world_size is not None:
        decided["train_batch_size"] = (
            f"optim.micro_batch_size x optim.gradient_accumulation_steps x {world_size} ranks",
            optim.micro_batch_size * optim.gradient_accumulation_steps * world_size,
        )
    return decided


def _get(settings: dict[str, Any], key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _set(settings: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        settings = settings.setdefault(part, {})
    settings[last] = value
