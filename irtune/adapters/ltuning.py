"""L-Tuning (Kowsher et al. 2024, arXiv 2402.01643): a text is judged beside the text of each candidate label.

The label's own words y go through the frozen model once, h = M(y) in R^{l x d}. What is made of h conditions the model
while it reads the text x; the classification head's output for that label is the candidate's logit. So a text takes
one forward pass per label, in training and in prediction, and the logits of all labels compete in one softmax.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import SequenceClassifierOutput

from irtune.adapters.trainable import layer_list
from irtune.distributed.partitioned import runnable
from irtune.errors import ModelError
from irtune.models import Classifier


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


def candidate_logits(logits: torch.Tensor) -> SequenceClassifierOutput:
    """From the head's output [batch * labels, labels] to each candidate's own logit, [batch, labels]."""
    labels = logits.shape[1]
    own = logits.view(-1, labels, labels).diagonal(dim1=1, dim2=2)
    return SequenceClassifierOutput(logits=own)  # type: ignore[arg-type]
