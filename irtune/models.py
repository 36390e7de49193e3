"""Pretrained sequence classifiers, and where their parts are: transformer layers, head, attention output projections.

Layers are found from the module tree, not from a table of architectures: they are the `ModuleList` that holds most
parameters. The head is everything outside the pretrained body, plus whatever the pretrained files did not contain.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from irtune.config.schema import ModelConfig
from irtune.errors import ModelError
from irtune.kernels import attention_kernel

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTION_NAMES = ("attn", "attention")


@dataclass(frozen=True)
class Anatomy:
    """Names of a classifier's parts, as `named_modules()` of the model without adapters spells them.

    layers: the list of transformer layers; layer 3 is `{layers}.3`.
    num_layers: L.
    head: modules that are trained besides the layers, the classification head first.
    """

    layers: str
    num_layers: int
    head: tuple[str, ...]


@dataclass
class Classifier:
    """A pretrained model with its tokenizer and anatomy."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy


def load_classifier(config: ModelConfig, labels: list[str]) -> Classifier:
    """Load model and tokenizer from a folder or hub id (from the local cache when the network is off).

    Raises:
        ModelError: when there is no such model, it has no tokenizer, or no list of layers can be found in it.
    """
    name, source = str(Path(config.name_or_path).expanduser()), _source(config)
    tokenizer = load_tokenizer(config)
    settings = _load(
        AutoConfig,
        source,
        "configuration",
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        trust_remote_code=config.trust_remote_code,
    )
    if getattr(settings, "is_encoder_decoder", False):
        raise ModelError(
            f"{source} is an encoder-decoder model, which has two lists of layers; accepted: models with one"
        )
    if tokenizer.pad_token_id >= settings.vocab_size:
        raise ModelError(
            f"{source}: the tokenizer pads with token {tokenizer.pad_token_id}, but the model has embeddings for "
            f"{settings.vocab_size} tokens only; tokenizer and model do not belong together"
        )
    settings.pad_token_id = tokenizer.pad_token_id
    settings.use_cache = False
    model, info = _load(
        AutoModelForSequenceClassification,
        source,
        "model",
        config=settings,
        dtype=DTYPES[config.dtype],
        attn_implementation=attention_kernel(config.attn_implementation, DTYPES[config.dtype]),
        trust_remote_code=config.trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # a head for other labels is replaced; anything else is refused below
    )
    # The name the user gave, not the place in a cache: peft writes it into the adapter.
    model.name_or_path = model.config.name_or_path = name
    return Classifier(model, tokenizer, _checked_anatomy(source, model, info))


def load_settings(config: ModelConfig) -> PretrainedConfig:
    """The model's config.json, without its weights.

    Raises:
        ModelError: when there is none.
    """
    return _load(AutoConfig, _source(config), "configuration", trust_remote_code=config.trust_remote_code)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token.

    Raises:
        ModelError: when there is none, or it has no token to pad with.
    """
    source = _source(config)
    tokenizer = _load(AutoTokenizer, source, "tokenizer", trust_remote_code=config.trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ModelError(f"{source}: the tokenizer has no padding, end or unknown token to pad with")
    return tokenizer


def _source(config: ModelConfig) -> str:
    """Where the model is: a folder, the folder of a hub model in the local cache, or a hub id."""
    source = str(Path(config.name_or_path).expanduser())
    if Path(source).is_dir():
        return source
    if config.name_or_path.startswith(("~", "/", ".")):
        raise ModelError(
            f"model.name_or_path: there is no folder {config.name_or_path!r}; accepted: a folder with config.json, "
            "or a hub id (launch/quickstart.sh makes the folder of the small model)"
        )
    return _cached_folder(source) or source


def _checked_anatomy(source: str, model: nn.Module, info: dict[str, Any]) -> Anatomy:
    """Anatomy of a loaded model whose layers all came from the files."""
    replaced = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    random = set(info["missing_keys"]) | replaced
    anatomy = find_anatomy(model, random)
    wrong = sorted(key for key in random if f".{anatomy.layers}." in f".{key}")
    if wrong:
        reason = "has another shape in the files than in config.json" if wrong[0] in replaced else "is not in the files"
        raise ModelError(f"{source}: {wrong[0]} {reason} ({len(wrong)} such weights in the layers)")
    return anatomy


def longest_input(classifier: Classifier) -> int | None:
    """Tokens that the model has positions for, or None where nothing says."""
    limits = [
        getattr(classifier.model.config, "max_position_embeddings", None),
        classifier.tokenizer.model_max_length,
    ]
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]
    return min(known, default=None)


def _cached_folder(name: str) -> str | None:
    """Folder of a hub model that is wholly in the local cache, so that no network is asked; None where it is not."""
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):  # not cached; or no hub id, which loading will say
        return None
    parts = ("config.json", "tokenizer*", "*.safetensors")
    return str(folder) if all(any(folder.glob(part)) for part in parts) else None


def _load(kind: Any, source: str, what: str, **options: Any) -> Any:
    """`from_pretrained`; errors become one sentence."""
    try:
        return kind.from_pretrained(source, **options)
    except Exception as error:  # damaged files raise whatever their library raises
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"model.name_or_path: no {what} can be loaded from {source!r}: {reason}") from error


def find_anatomy(model: nn.Module, missing: Collection[str] = ()) -> Anatomy:
    """Find layers and head of `model`.

    Args:
        model: a sequence classifier of transformers without adapters.
        missing: names of parameters that the pretrained files did not contain and that are random now.

    Raises:
        ModelError: when the model has no list of layers or no head.
    """
    best, size = "", 0
    for name, module in model.named_modules():
        count = sum(parameter.numel() for parameter in module.parameters())
        # Outer lists come first, so that a list inside a layer (experts) never beats the list of layers.
        if isinstance(module, nn.ModuleList) and count > size:
            best, size = name, count
    if not best:
        raise ModelError(f"{type(model).__name__} has no list of transformer layers")
    body = getattr(model, "base_model_prefix", "")
    head = [name for name, child in model.named_children() if name != body and any(True for _ in child.parameters())]
    for name in sorted(missing):
        owner = name.rpartition(".")[0]
        if not any(owner == part or owner.startswith(f"{part}.") for part in head):
            log.warning("%s is not in the pretrained files: it starts random and is trained with the head", owner)
            head.append(owner)
    if not head:
        raise ModelError(f"{type(model).__name__} has no classification head outside {body!r}")
    return Anatomy(best, len(list(model.get_submodule(best).children())), tuple(dict.fromkeys(head)))


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a matrix product that an adapter can stand beside (GPT-2's Conv1D is one too)."""
    return isinstance(module, nn.Linear | Conv1D)


def linear_names(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Names of the linear modules inside one layer, for example `self_attn.q_proj`, in order."""
    names: dict[str, None] = {}
    for layer in model.get_submodule(anatomy.layers).children():
        names |= {name: None for name, module in layer.named_modules() if is_linear(module)}
    return list(names)


def output_projections(model: nn.Module, anatomy: Anatomy) -> list[torch.Tensor]:
    """Weight of each layer's attention output projection: the last linear module of its attention, L tensors.

    Raises:
        ModelError: when a layer has no attention with linear modules.
    """
    weights = []
    for number, layer in enumerate(model.get_submodule(anatomy.layers).children()):
        inside = [
            module
            for name, module in layer.named_modules()
            if is_linear(module) and any(word in name.lower() for word in ATTENTION_NAMES)
        ]
        if not inside:
            raise ModelError(f"layer {number} has no attention output projection; use another tuning.score than weight")
        weights.append(inside[-1].weight)
    return weights


class CastLinear(nn.Linear):
    """A linear module whose fp32 parameters compute in the number format of the input.

    So the head learns in fp32 over a lower-precision body, and a model that peft loads back, with the head in the
    body's format, computes the same numbers.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out] in the input's dtype."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.weight.to(input.dtype), bias)


class AdapterLinear(CastLinear):
    """A factor of an update: trains in the number format of the input, evaluates in its own, as peft does.

    In training, products in the base's bf16 take half of the time of fp32 ones, and no second copy of the input is
    kept. In evaluation, the model then computes the same numbers as one that peft has loaded back.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], in the input's dtype while training, in the weight's otherwise."""
        return super().forward(input if self.training else input.to(self.weight.dtype))


def compute_in_input_dtype(module: nn.Module, kind: type[CastLinear] = CastLinear) -> None:
    """Make every plain linear module in `module` one of `kind`; parameters and their names stay."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = kind
