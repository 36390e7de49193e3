"""Pretrained sequence classifiers from a folder or the hub: whole, quantised, or in shares."""

import contextlib
import copy
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from irtune.config.schema import Config, ModelConfig
from irtune.distributed import runtime
from irtune.distributed.partitioned import make_whole, sharded_loading
from irtune.errors import ModelError, one_line
from irtune.models.anatomy import Anatomy, find_anatomy, is_linear
from irtune.models.files import check_files, find_source, without_safetensors
from irtune.models.head import fit_head, set_labels
from irtune.models.kernels import attention_kernel, shorten_on_cpus, track_padding
from irtune.models.padding import suit_pooling
from irtune.models.pooling import add_pooling, check_pooling
from irtune.models.restart import restart_layers

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class RunFacts:
    """What an adapter type may ask about the run that it trains in; adapter_config.json keeps it for loading.

    seed: run.seed, from which a type draws. max_length: data.max_length, the longest text in tokens.
    """

    seed: int = 0
    max_length: int = 256

    @classmethod
    def of(cls, config: Config) -> "RunFacts":
        """Those of the run that `config` describes."""
        return cls(config.run.seed, config.data.max_length)


@dataclass
class Classifier:
    """A pretrained model with its tokenizer and anatomy."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy
    run: RunFacts = RunFacts()


def load_classifier(
    config: ModelConfig,
    labels: list[str],
    device: torch.device | None = None,
    sharded: dict[str, Any] | None = None,
    problem_type: str = "single_label_classification",
) -> Classifier:
    """Load model and tokenizer from a folder or hub id (from the local cache when the network is off).

    Args:
        config: the model.
        labels: names of the classes.
        device: where a quantised model is made (None: this rank's device); others are loaded to the CPU.
        sharded: the section zero_optimization of stage 3: each rank keeps its share of the weights only, but the
            whole head. Collective then. None: each rank gets the whole model. So it does where the files do not allow
            it, which a warning says.
        problem_type: in transformers' words; of regression, the one label is the name of the value.

    Raises:
        ConfigError: when the tokenizer does not fit `config.pooling`, or there are fewer layers than start anew.
        ModelError: when there is no such model, it has no tokenizer, no list of layers can be found in it, its weights
            are not all there, are pickles without `model.allow_pickle`, or are quantised already.
    """
    name, source = str(Path(config.name_or_path).expanduser()), find_source(config)
    tokenizer = load_tokenizer(config)
    check_pooling(config, tokenizer)
    settings, before = _settings(config, source, tokenizer, labels, problem_type)
    dtype = DTYPES[config.dtype]
    skeleton = _skeleton(config, settings)
    obstacle = _sharding_obstacle(skeleton, Path(source)) if sharded is not None else None
    if obstacle is not None:
        log.warning("%s: every rank loads the whole model before ZeRO 3 divides it", obstacle)
        sharded = None
    with sharded_loading(sharded, dtype) if sharded is not None else contextlib.nullcontext():
        model, info = _load(
            AutoModelForSequenceClassification,
            source,
            "model",
            config=settings,
            dtype=dtype,
            attn_implementation=attention_kernel(config.attn_implementation, dtype, type(skeleton)),
            trust_remote_code=config.trust_remote_code,
            use_safetensors=None if config.allow_pickle else True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a head for other labels is replaced; anything else is refused below
            **_quantized_loading(config, skeleton, device),
        )
    add_pooling(model, config)
    if config.quantization != "none":
        _quantization().settle(model)
    track_padding(model)
    if not torch.cuda.is_available():
        shorten_on_cpus(model, compiled=config.compile)
    suit_pooling(model, tokenizer)
    # The name the user gave, not the place in a cache: peft writes it into the adapter.
    model.name_or_path = model.config.name_or_path = name
    random = _random(info)
    anatomy = _checked_anatomy(source, model, info)
    if config.restart_layers:
        restart_layers(model, anatomy.layers, skeleton, config.restart_layers)
    heads = [model.get_submodule(part) for part in anatomy.head]
    if sharded is not None:
        make_whole(heads)
    trained = {f"{part}.{name}" for part, head in zip(anatomy.head, heads) for name, _ in head.named_parameters()}
    if config.pooling == "class" and before != list(labels) and not set(info["missing_keys"]) >= trained:
        one_more = copy.deepcopy(settings)
        one_more.id2label = dict(enumerate([*labels, ""]))
        fit_head(model, anatomy, _skeleton(config, one_more), before, labels, random, _replaced(info))
    return Classifier(model, tokenizer, anatomy)


def _settings(
    config: ModelConfig, source: str, tokenizer: PreTrainedTokenizerBase, labels: list[str], problem_type: str
) -> tuple[PretrainedConfig, list[str]]:
    """The model's config.json with the labels, and the names that the head's rows had before.

    Raises:
        ModelError: for kinds of models that cannot be trained here, and files that cannot be read.
    """
    settings = load_settings(config)
    before = set_labels(settings, labels, problem_type)
    _refuse(source, settings)
    _check_padding_token(source, tokenizer, settings)
    check_files(Path(source), config.allow_pickle)
    for part in (settings, settings.get_text_config()):
        part.pad_token_id = tokenizer.pad_token_id
        part.use_cache = False
    return settings, before


def _refuse(source: str, settings: PretrainedConfig) -> None:
    """Raise a ModelError for kinds of models that cannot be trained here."""
    if getattr(settings, "is_encoder_decoder", False):
        raise ModelError(
            f"{source} is an encoder-decoder model, which has two lists of layers; accepted: models with one, such as "
            "the encoder FacebookAI/roberta-base or the decoder HuggingFaceTB/SmolLM2-135M"
        )
    if getattr(settings, "quantization_config", None):
        raise ModelError(
            f"{source} holds weights that are quantised already; accepted: weights in 16 or 32 bits, which "
            "model.quantization quantises while they are loaded"
        )


def _check_padding_token(source: str, tokenizer: PreTrainedTokenizerBase, settings: PretrainedConfig) -> None:
    """Raise a ModelError where the embeddings have no row for the token to pad with."""
    pad: Any = tokenizer.pad_token_id
    known = getattr(settings.get_text_config(), "vocab_size", None)
    if known is not None and pad >= known:
        raise ModelError(
            f"{source}: the tokenizer pads with token {pad}, but the model has embeddings for "
            f"{known} tokens only; tokenizer and model do not belong together"
        )


def _quantization() -> Any:
    """Imported late: bitsandbytes brings torch's compiler along, a second of each start."""
    from irtune.models import quantization

    return quantization


def _quantized_loading(config: ModelConfig, skeleton: nn.Module, device: torch.device | None) -> dict[str, Any]:
    """What `from_pretrained` gets about quantisation: all linear modules of the layers, and no other."""
    if config.quantization == "none":
        return {}
    layers = find_anatomy(skeleton).layers
    kept = [n for n, part in skeleton.named_modules() if is_linear(part) and not n.startswith(f"{layers}.")]
    device = device or runtime.read_world().device
    return _quantization().loading_options(config.quantization, DTYPES[config.dtype], device, kept)


def _skeleton(config: ModelConfig, settings: PretrainedConfig) -> nn.Module:
    """The model without weights."""
    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(
                copy.deepcopy(settings), trust_remote_code=config.trust_remote_code
            )
    except Exception as error:  # as in `_load`
        raise _unusable(config.name_or_path, "model", error) from error


def _sharding_obstacle(skeleton: nn.Module, folder: Path) -> str | None:
    """Why a model's files cannot be loaded share by share, or None where they can.

    Sharded loading can replace no weight that has another shape in the files, such as a head for other labels.
    """
    files = list(folder.glob("*.safetensors"))
    if not files:
        return f"{folder} holds pickles only" if folder.is_dir() else f"{folder} is not on this machine yet"
    wanted = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in sorted(wanted.keys() & set(weights.keys())):
                shape = tuple(weights.get_slice(name).get_shape())
                if shape != wanted[name]:
                    return f"{name} has shape {shape} in the files and {wanted[name]} in the model"
    return None


def load_settings(config: ModelConfig) -> PretrainedConfig:
    """The model's config.json, without its weights.

    Raises:
        ModelError: when there is none.
    """
    return _load(AutoConfig, find_source(config), "configuration", trust_remote_code=config.trust_remote_code)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token.

    Raises:
        ModelError: when there is none, or it has no token to pad with.
    """
    source = find_source(config)
    tokenizer = _load(AutoTokenizer, source, "tokenizer", trust_remote_code=config.trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ModelError(f"{source}: the tokenizer has no padding, end or unknown token to pad with")
    return tokenizer


def _checked_anatomy(source: str, model: nn.Module, info: dict[str, Any]) -> Anatomy:
    """Anatomy of a loaded model whose layers all came from the files, and which has embeddings of tokens."""
    try:
        words = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        words = None
    if not isinstance(words, nn.Embedding):
        raise ModelError(
            f"{source} is of the class {type(model).__name__}, which has no table of embeddings of tokens; accepted: "
            "models with one, such as the encoder FacebookAI/roberta-base or the decoder HuggingFaceTB/SmolLM2-135M"
        )
    replaced = _replaced(info)
    random = _random(info) & {name for name, _ in model.named_parameters()}  # not a head that a pooling replaced
    anatomy = find_anatomy(model, random)
    wrong = sorted(key for key in random if f".{anatomy.layers}." in f".{key}")
    if wrong:
        reason = "has another shape in the files than in config.json" if wrong[0] in replaced else "is not in the files"
        raise ModelError(f"{source}: {wrong[0]} {reason} ({len(wrong)} such weights in the layers)")
    return anatomy


def _replaced(info: dict[str, Any]) -> set[str]:
    """Names of parameters that have another shape in the files."""
    return {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}


def _random(info: dict[str, Any]) -> set[str]:
    """Names of parameters that did not come from the files."""
    return set(info["missing_keys"]) | _replaced(info)


def _load(kind: Any, source: str, what: str, **options: Any) -> Any:
    """`from_pretrained`; errors become one sentence."""
    try:
        return kind.from_pretrained(source, **options)
    except Exception as error:  # damaged files raise whatever their library raises
        raise _unusable(source, what, error) from error


def _unusable(source: str, what: str, error: Exception) -> ModelError:
    if "use_safetensors" in str(error):  # transformers' advice is an option that users do not have
        return without_safetensors(source)
    kind = re.match(r"Unrecognized configuration class <class '.*\.(\w+)Config'>", str(error))
    if kind is not None and what == "model":
        return ModelError(
            f"model.name_or_path: {source!r} is a {kind[1]} model, of which transformers has no sequence classifier; "
            "accepted: kinds such as Llama, Qwen2, BERT and RoBERTa"
        )
    return ModelError(f"model.name_or_path: no {what} can be loaded from {source!r}: {one_line(error)}")
