"""Models without weights: the shape of any configuration on the meta device, of the presets without a download."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from irtune.config.schema import ModelConfig
from irtune.models import DTYPES
from irtune.models.anatomy import Anatomy, find_anatomy
from irtune.models.classifier import load_settings
from irtune.models.head import set_labels
from irtune.models.pooling import add_pooling

# Shapes of the presets, from their published config.json files.
_LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "meta-llama/Llama-3.1-8B": ("llama", _LLAMA_8B),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": ("llama", _LLAMA_8B),
    "meta-llama/Llama-2-13b-hf": ("llama", {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 40, "vocab_size": 32000, "max_position_embeddings": 4096,
    }),
    "meta-llama/Llama-3.1-70B": ("llama", _LLAMA_8B | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    }),
    "mistralai/Mistral-7B-v0.1": ("mistral", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768, "sliding_window": 4096,
    }),
    "Qwen/Qwen3-8B": ("qwen3", {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
    }),
    "microsoft/phi-2": ("phi", {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 51200, "partial_rotary_factor": 0.4, "max_position_embeddings": 2048,
    }),
}  # fmt: skip


def empty_classifier(
    config: ModelConfig, labels: Sequence[str], attention: Callable[[type[Any]], str]
) -> tuple[Any, Anatomy]:
    """A sequence classifier on the meta device, without weights.

    `attention` names the attention implementation for a class of models. The configuration of a preset is from here,
    another's from its folder or the hub.

    Raises:
        ModelError: when there is none.
    """
    kind, shape = SHAPES.get(config.name_or_path, ("", {}))
    settings: Any = AutoConfig.for_model(kind, **shape) if kind else load_settings(config)
    set_labels(settings, labels)
    for part in (settings, settings.get_text_config()):
        part.pad_token_id = 0
        part.use_cache = False
    options = {"dtype": DTYPES[config.dtype], "trust_remote_code": config.trust_remote_code}
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(copy.deepcopy(settings), **options)
        wanted = attention(type(model))
        if wanted != model.config._attn_implementation:
            model = AutoModelForSequenceClassification.from_config(settings, attn_implementation=wanted, **options)
        add_pooling(model, config)
    return model, find_anatomy(model)
