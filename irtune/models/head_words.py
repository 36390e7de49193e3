"""A classification head made of words, so that a decoder predicts before any training (`model.head_init`).

The soft verbaliser of SciPrompt (You et al., EMNLP 2024): the row of class c is (1 / |V_c|) sum_w s_w r_w, where r_w is
the mean of the language model's output rows for the tokens of the term w, and s_w is its score.
"""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from irtune.config.labels import canonical
from irtune.config.schema import ModelConfig
from irtune.config.yaml_file import read_recipe
from irtune.distributed.partitioned import whole
from irtune.errors import ConfigError, ModelError, brief, one_line
from irtune.models.classifier import Classifier
from irtune.models.files import find_source

Terms = dict[str, dict[str, float]]
CUE = "Intention:"  # what a term follows, so that its tokens are those of a word in a text


def read_terms(file: str, labels: list[str]) -> Terms:
    """The terms of each of `labels` and their scores, from a YAML file {label: {term: score}}.

    Raises:
        ConfigError: with everything that is wrong with the file.
    """
    problems: list[str] = []
    content = read_recipe(file, problems)
    if not problems and not (isinstance(content, dict) and all(isinstance(value, dict) for value in content.values())):
        problems.append(f"{file!r} does not map labels to terms and scores; accepted: {{label: {{term: score}}}}")
    if problems:
        raise ConfigError([f"model.head_init: {problem}" for problem in problems])
    terms = {str(canonical(label)): {str(term): s for term, s in found.items()} for label, found in content.items()}
    for label, found in terms.items():
        if label not in labels:
            problems.append(f"{file!r} has terms for {brief(label)}, which is not a label; labels: {', '.join(labels)}")
        for term, score in found.items():
            if isinstance(score, bool) or not isinstance(score, int | float) or not 0 < score < math.inf:
                problems.append(
                    f"{file!r}: {term!r} of {label!r} has the score {brief(score)}; accepted: numbers above 0"
                )
    problems += [f"{file!r} has no terms for {label!r}; add some" for label in labels if not terms.get(label)]
    if problems:
        raise ConfigError([f"model.head_init: {problem}" for problem in problems])
    return terms


def start_from_words(classifier: Classifier, config: ModelConfig, labels: list[str]) -> None:
    """Give the head of `classifier`, without adapters, the rows that the terms of `config.head_init` make, in place.

    A bias becomes 0. Collective where the weights are partitioned.

    Raises:
        ConfigError: for terms that cannot be used, and a model whose head does not read what a language model's does.
        ModelError: when the rows of the language model's head are not in the model's files.
    """
    terms = read_terms(str(config.head_init), labels)
    head = _linear_head(classifier, config)
    tokens = {term: term_tokens(classifier.tokenizer, term) for found in terms.values() for term in found}
    unknown = [
        f"model.head_init: the model's tokenizer knows no part of the term {term!r}; remove it"
        for term, ids in tokens.items()
        if not ids
    ]
    if unknown:
        raise ConfigError(unknown)
    ids = sorted({token for found in tokens.values() for token in found})
    rows = dict(zip(ids, _output_rows(classifier, config, ids)))
    with torch.no_grad():
        for number, label in enumerate(labels):
            head.weight[number] = weighted_mean(terms[label], tokens, rows)
        if head.bias is not None:
            head.bias.zero_()


def weighted_mean(
    scores: Mapping[str, float], tokens: Mapping[str, list[int]], rows: Mapping[int, Any]
) -> torch.Tensor:
    """A class's row [width]: its terms' mean rows times their scores, over the number of terms."""
    parts = [score * torch.stack([rows[token] for token in tokens[term]]).mean(0) for term, score in scores.items()]
    return torch.stack(parts).mean(0)


def term_tokens(tokenizer: PreTrainedTokenizerBase, term: str) -> list[int]:
    """The tokens of a term behind other words, without unknown ones."""
    before, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (CUE, f"{CUE} {term}"))
    return [token for token in ids[len(before) :] if token != tokenizer.unk_token_id]


def _linear_head(classifier: Classifier, config: ModelConfig) -> nn.Linear:
    """The head, where it is one linear module over the last hidden state of a decoder."""
    model: Any = classifier.model
    if model.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise ConfigError(
            f"model.head_init: {config.name_or_path} ({model.config.model_type}) is an encoder, whose words are "
            "predicted at a mask position that no prompt of irtune has; set model.name_or_path to a decoder, or remove "
            "model.head_init"
        )
    parts = [model.get_submodule(name) for name in classifier.anatomy.head]
    leaves = [module for part in parts for module in part.modules() if not any(module.children())]
    width = model.get_input_embeddings().embedding_dim
    if len(leaves) != 1 or not isinstance(leaves[0], nn.Linear) or leaves[0].in_features != width:
        names = ", ".join(type(module).__name__ for module in leaves)
        raise ConfigError(
            f"model.head_init: the head of {config.name_or_path} ({names}) is not one linear module over {width} "
            "numbers; set model.pooling to last, or remove model.head_init"
        )
    return leaves[0]


def _output_rows(classifier: Classifier, config: ModelConfig, ids: list[int]) -> torch.Tensor:
    """Rows [ids, width] of the language model's head, fp32: from the files; where it is tied, from the embeddings."""
    model: Any = classifier.model
    source, settings = Path(find_source(config)), model.config
    name = _output_name(settings, config)
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            if name in weights.keys():  # noqa: SIM118 - safe_open is not a dictionary
                stored = weights.get_slice(name)
                return torch.cat([stored[token : token + 1] for token in ids]).float()
    if not getattr(settings, "tie_word_embeddings", False):
        raise ModelError(
            f"{source} holds no {name}, the head of the language model, whose rows model.head_init needs; remove "
            "model.head_init, or set model.name_or_path to a folder with it"
        )
    embeddings = model.get_input_embeddings().weight
    with whole([embeddings]):
        return embeddings.detach()[torch.tensor(ids, device=embeddings.device)].float().cpu()


def _output_name(settings: Any, config: ModelConfig) -> str:
    """The full name of the weight of the language model's head."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(settings), trust_remote_code=config.trust_remote_code
            )
    except Exception as error:  # a kind of model without a language model, or whatever its code raises
        raise ModelError(
            f"model.head_init: {config.name_or_path} is not known as a language model: {one_line(error)}"
        ) from error
    head = model.get_output_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)
