"""L-Tuning (Kowsher et al. 2024, arXiv 2402.01643): a text is judged beside the text of each candidate label.

The label's own words y go through the frozen model once, h = M(y) in R^{l x d}. What is made of h conditions the model
while it reads the text x; the classification head's output for that label is the candidate's logit. So a text takes
one forward pass per label, in training and in prediction, and the logits of all labels compete in one softmax.
With `adapter.label_head: entailment` the head has two rows for whatever label, as for pairs of texts, and a candidate's
logit is their difference: the log-odds that the text entails the label. That the candidates compete, rather than each
pair being judged by itself, and the shapes of G, F and Z are irtune's own choices.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from irtune.adapters.trainable import head_modules, layer_list
from irtune.distributed.partitioned import runnable
from irtune.errors import ModelError
from irtune.models import Classifier
from irtune.models.anatomy import is_linear


@dataclass(frozen=True)
class LabelStates:
    """h of every label: states [labels, l, d] in fp32, attends [labels, l] with 1 for tokens and 0 for padding."""

    states: torch.Tensor
    attends: torch.Tensor


def label_states(classifier: Classifier) -> LabelStates:
    """Last hidden states of the labels' texts under the pretrained model."""
    model: Any = classifier.model
    ids = _label_ids(classifier)
    length = max(map(len, ids))
    pad = classifier.tokenizer.pad_token_id
    tokens = torch.tensor([row + [pad] * (length - len(row)) for row in ids], device=model.device)
    attends = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids], device=model.device)
    training = model.training
    model.eval()
    with torch.no_grad(), runnable(model, layer_list(classifier)):
        body = getattr(model, model.base_model_prefix)
        states = body(input_ids=tokens, attention_mask=attends).last_hidden_state.float()
    model.train(training)
    return LabelStates(states, attends)


def _label_ids(classifier: Classifier) -> list[list[int]]:
    names: Any = classifier.model.config.id2label.values()  # type: ignore[operator, union-attr]
    texts = [str(name).replace("-", " ").replace("_", " ") for name in names]
    ids = [classifier.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    if [] in ids:
        raise ModelError(
            f"the tokenizer makes no token of the label {texts[ids.index([])]!r}, by whose text L-Tuning judges; "
            "rename it with data.labels, or set adapter.type to lora"
        )
    return ids


def longest_label(classifier: Classifier) -> int:
    """Tokens of the longest label."""
    return max(map(len, _label_ids(classifier)))


def per_label(batch: dict[str, torch.Tensor], labels: int) -> dict[str, torch.Tensor]:
    """Every row of a batch once per label: row b * labels + c is text b beside label c."""
    return {name: tensor.repeat_interleave(labels, dim=0) for name, tensor in batch.items()}


def judge_pairs(classifier: Classifier) -> None:
    """Give the head two rows, entails and does not, in place of one for each label.

    Raises:
        ModelError: when the head has no linear module with a row for each label.
    """
    model: Any = classifier.model
    labels = len(model.config.id2label)
    parts: list[Any] = [part for head in head_modules(classifier) for part in head.modules()]
    last = next((part for part in reversed(parts) if is_linear(part) and len(part.weight) == labels), None)
    if last is None:
        raise ModelError(
            f"adapter.label_head entailment: the head of {type(model).__name__} has no linear module with a row for "
            "each label; set adapter.label_head to diagonal"
        )
    for name, parameter in list(last.named_parameters(recurse=False)):
        setattr(last, name, nn.Parameter(parameter.detach()[:2].clone()))
    last.out_features = 2


def candidate_logits(logits: torch.Tensor, labels: int, head: str) -> SequenceClassifierOutput:
    """From the head's output for each pair, [batch * labels, rows], to each candidate's own logit, [batch, labels].

    diagonal: row c of the head judges candidate c. entailment: all are judged by the log-odds of the first of two rows.
    """
    pairs = logits.view(-1, labels, logits.shape[-1])
    own = pairs.diagonal(dim1=1, dim2=2) if head == "diagonal" else pairs[..., 0] - pairs[..., 1]
    return SequenceClassifierOutput(logits=own)  # type: ignore[arg-type]
