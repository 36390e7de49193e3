"""The DeepSpeed JSON: engine knobs only. What the recipe decides is filled in where the file says "auto"."""

import difflib
import json
from pathlib import Path
from typing import Any

from irtune.config.schema import Config

# Decided by the recipe, so the JSON must not hold them at all.
RECIPE_ONLY = {
    "optimizer": "the optim section",
    "scheduler": "optim.schedule and optim.warmup_steps",
    "data_types": "model.dtype and adapter.dtype",
    "tensorboard": "irtune, which writes TensorBoard files itself",
    "checkpoint": "irtune's own checkpoints",
}


# What may stand at the top of the file: knobs of the engine that do not change what is computed.
KNOBS = {
    "zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "bf16", "fp16", "steps_per_print", "wall_clock_breakdown", "memory_breakdown",
    "communication_data_type", "comms_logger", "flops_profiler", "aio", "dump_state",
}  # fmt: skip


def read_engine_json(config: Config, world_size: int | None) -> tuple[dict[str, Any], list[str]]:
    """Read and complete the file named by `config.deepspeed`; without a `world_size`, leave out what depends on it.

    Returns:
        The settings for deepspeed.initialize, and one sentence per problem (contradictions show both values).
    """
    path = find_engine_json(config.deepspeed)
    if path is None:
        return {}, [f"deepspeed: there is no file {config.deepspeed!r}"]
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        return {}, [f"deepspeed: {path} is not valid JSON: {error}"]
    if not isinstance(settings, dict):
        return {}, [f"deepspeed: {path} must hold an object, not a {type(settings).__name__}"]
    problems = _unknown(settings, path)
    for key in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(settings.setdefault(key, {}), dict):
            problems.append(f"{path}: {key} must hold an object, not {settings[key]!r}")
    if problems:
        return {}, problems
    for key, (option, value) in _decided(config, world_size).items():
        given = _get(settings, key)
        if given not in (None, "auto", value):
            problems.append(f'{path}: {key} is {given!r}, but {option} makes it {value!r}; write "auto"')
        _set(settings, key, value)
    stage = settings["zero_optimization"].setdefault("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        problems.append(f"{path}: zero_optimization.stage is {stage!r}; accepted: 0, 1, 2, 3")
    # The optimizer is torch's AdamW: ZeRO must accept it, and offload must not insist on DeepSpeed's own.
    settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    settings.setdefault("steps_per_print", 2**31)
    return settings, problems


def _unknown(settings: dict[str, Any], path: Path) -> list[str]:
    """Keys that the recipe decides, or that nobody knows."""
    problems = []
    for key in settings:
        if key in RECIPE_ONLY:
            problems.append(f"{path}: {key!r} belongs to {RECIPE_ONLY[key]}; take it out of the DeepSpeed file")
        elif key not in KNOBS:
            near = difflib.get_close_matches(key, KNOBS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"accepted: {', '.join(sorted(KNOBS))}"
            problems.append(f"{path}: unknown key {key!r}; {hint}")
    return problems


def find_engine_json(name: str) -> Path | None:
    """The file `name` as given, or below the project's folder."""
    given = Path(name).expanduser()
    candidates = [given, Path(__file__).resolve().parents[2] / given]
    return next((path for path in candidates if path.is_file()), None)


def engine_dtype(config: Config) -> str:
    """Format that the engine trains in: fp32 unless adapters follow a lower-precision model."""
    return config.model.dtype if config.adapter.dtype == "model" else "float32"


def _decided(config: Config, world_size: int | None) -> dict[str, tuple[str, Any]]:
    """Key of the JSON -> the option that decides it, and its value."""
    optim, dtype = config.optim, engine_dtype(config)
    decided: dict[str, tuple[str, Any]] = {
        "train_micro_batch_size_per_gpu": ("optim.micro_batch_size", optim.micro_batch_size),
        "gradient_accumulation_steps": ("optim.gradient_accumulation_steps", optim.gradient_accumulation_steps),
        "gradient_clipping": ("optim.max_grad_norm", optim.max_grad_norm),
        "bf16.enabled": ("adapter.dtype with model.dtype", dtype == "bfloat16"),
        "fp16.enabled": ("adapter.dtype with model.dtype", dtype == "float16"),
    }
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
