"""Names that stand for several settings. A preset only fills in what the user did not set."""

from typing import Any

MODELS = {
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "deepseek-r1-distil-8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "phi-2": "microsoft/phi-2",
}

PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("data.preset", "iterater-human"): {
        "data.before": "before_sent",
        "data.after": "after_sent",
        "data.label": "labels",
        "data.drop_labels": ["others"],  # by convention: 45 of 2,946 rows, no intention of its own
    },
    ("data.preset", "argrewrite"): {"data.before": "source", "data.after": "target", "data.label": "label"},
    ("tuning.method", "rst"): {"tuning.interval": 1},  # a new draw at every step
    ("tuning.method", "ist"): {"tuning.interval": 1},
    ("tuning.method", "spafit"): {"adapter.type": "spafit"},
    # The model's own parameters train, in its number format; masters are fp32.
    ("adapter.type", "none"): {"adapter.dtype": "model"},
    ("adapter.type", "bitfit"): {"adapter.dtype": "model"},
    ("adapter.type", "spafit"): {"adapter.dtype": "model"},
    # No layer has a parameter: nothing is there to choose.
    ("adapter.type", "prompt"): {"tuning.method": "full"},
    ("adapter.type", "ltuning-prompt"): {"tuning.method": "full"},
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
    for (key, name), settings in PRESETS.items():
        if filled.get(key) == name:
            for setting, value in settings.items():
                filled.setdefault(setting, value)
    if filled.get("tuning.method") == "lisa" and filled.get("adapter.type") == "none":
        filled.setdefault("adapter.embeddings", True)  # LISA's always trained parts, with the head
    model = filled.get("model.name_or_path")
    if isinstance(model, str) and model in MODELS:
        filled["model.name_or_path"] = MODELS[model]
    return filled
