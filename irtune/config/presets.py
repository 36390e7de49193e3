"""Names that stand for several settings. A preset only fills in what the user did not set."""

from collections.abc import Mapping
from typing import Any

from irtune.config.declarations import adapter_kinds, methods
from irtune.config.schema import DataConfig

MODELS = {
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "deepseek-r1-distil-8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "phi-2": "microsoft/phi-2",
}

# Those of adapter types and methods stand in their declarations, as `fills`.
PRESETS: dict[tuple[str, str | bool], dict[str, Any]] = {
    ("data.preset", "iterater-human"): {
        "data.before": "before_sent",
        "data.after": "after_sent",
        "data.label": "labels",
        "data.drop_labels": ["others"],  # by convention: 45 of 2,946 rows, no intention of its own
    },
    ("data.preset", "argrewrite"): {"data.before": "source", "data.after": "target", "data.label": "label"},
    ("data.multi_label", True): {"optim.loss": "binary"},
    ("data.task", "regression"): {"optim.loss": "mean_squared_error", "run.best_metric": "pearson"},
    ("model.head", "cross"): {"data.prompt": "tagged", "model.pooling": "mean"},
    ("tuning.preset", "reference"): {
        "tuning.score": "reference",
        "tuning.scores": "stale",
        "tuning.rule": "reference",
        "tuning.interval": 1,
        "tuning.first": "random_half",
    },
}


def fill_presets(values: dict[str, Any]) -> dict[str, Any]:
    """Return the flat `values` (dotted key -> value) with what its presets add; keys already there are kept."""
    filled = dict(values)
    method = methods().get(filled.get("tuning.method", ""))
    if method is not None:
        _fill(filled, method.fills)
        _fill(filled, method.fills_with.get(filled.get("adapter.type", ""), {}))
    kind = adapter_kinds().get(filled.get("adapter.type", ""))
    if kind is not None:
        _fill(filled, kind.fills)
    for (key, name), settings in PRESETS.items():
        if filled.get(key) == name:
            _fill(filled, settings)
    _fill_input(filled)
    model = filled.get("model.name_or_path")
    if isinstance(model, str) and model in MODELS:
        filled["model.name_or_path"] = MODELS[model]
    return filled


def _fill(filled: dict[str, Any], settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        filled.setdefault(key, value)


def _fill_input(filled: dict[str, Any]) -> None:
    """A pair is written as a diff, which a head at the edits reads; single texts have neither."""
    pair = filled.get("data.after", DataConfig.after) is not None
    if not pair:
        filled.setdefault("data.prompt", "plain")
    marks_edits = filled.get("data.prompt", DataConfig.prompt) == "diff" and filled.get("data.template") is None
    if marks_edits:
        filled.setdefault("model.pooling", "mean+edit")
