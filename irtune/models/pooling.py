"""Where a sequence classifier reads the text, for any architecture: the body's last hidden states, pooled, and a head.

transformers' own classes read at the last token (decoders) or at the first (encoders). A model with another pooling
stays an instance of its class, with its configuration, its body and its ways of loading and saving; only what it does
with the hidden states is replaced.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from irtune.config.schema import ModelConfig
from irtune.errors import ConfigError, ModelError

HEAD_NAME = "pooled_head"
HEAD_FILE = "head.safetensors"  # beside the body of a merged model


class Pooling(NamedTuple):
    """What the head reads (`model.pooling`, other than class), and its kind (`model.head`)."""

    kind: str
    head: str


class FloatLinear(nn.Linear):
    """A linear module that computes in fp32, whatever the format of its parameters and its input."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], fp32."""
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(input.float(), self.weight.float(), bias)


class _Pooled:
    """Mixed into the class of a model: its forward pass from pooled hidden states."""

    pooling: Pooling

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        edit_mask: torch.Tensor | None = None,
        side_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutput:
        """A batch [batch, length] to logits [batch, classes], fp32; the loss of `labels` is the caller's."""
        model: Any = self
        body = getattr(model, model.base_model_prefix)
        given = {name: value for name, value in inputs.items() if value is not None}
        states = body(input_ids=input_ids, attention_mask=attention_mask, **given).last_hidden_state
        if self.pooling.head == "cross":
            read = pool_sides(states, self.pooling.kind, attention_mask, side_mask)
        else:
            read = pool(states, self.pooling.kind, attention_mask, edit_mask)
        return SequenceClassifierOutput(logits=getattr(model, HEAD_NAME)(read))


def pool(
    states: torch.Tensor,
    kind: str,
    attention_mask: torch.Tensor | None = None,
    edit_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hidden states [batch, length, width] to what `kind` reads of them, fp32 [batch, width x parts].

    Args:
        states: of the last layer.
        kind: last, cls, mean, edit, or two of them joined by +.
        attention_mask: [batch, length], 1 for tokens, 0 for padding. None: no padding.
        edit_mask: [batch, length], 1 for tokens of marked edits. A row without any, and None, stand for all tokens.
    """
    seen = torch.ones_like(states[..., 0], dtype=torch.long) if attention_mask is None else attention_mask
    edits = seen if edit_mask is None else torch.where(edit_mask.any(1, keepdim=True), edit_mask, seen)
    places = torch.arange(states.shape[1], device=states.device)
    parts = {
        "last": lambda: states[torch.arange(len(states), device=states.device), (places * seen).argmax(1)].float(),
        "cls": lambda: states[:, 0].float(),
        "mean": lambda: _mean(states, seen),
        "edit": lambda: _mean(states, edits),
    }
    return torch.cat([parts[part]() for part in kind.split("+")], dim=1)


def pool_sides(
    states: torch.Tensor,
    kind: str,
    attention_mask: torch.Tensor | None = None,
    side_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the head cross reads of a pair: old, |new - old| and new, fp32 [batch, 3 x width].

    With `last`, XNet's n-diffABS-o (Ruan, Kuznetsov and Gurevych 2024, arXiv 2410.02028); `mean` is our reading.

    Args:
        states: of the last layer, [batch, length, width], from one pass over both texts.
        kind: mean or last, of each text's own tokens. A text without any is 0.
        attention_mask: as in `pool`.
        side_mask: [batch, length], 1 for tokens of the old text, 2 for those of the new one, else 0. None: all tokens
            are of both.
    """
    seen = torch.ones_like(states[..., 0], dtype=torch.long) if attention_mask is None else attention_mask
    sides = [seen, seen] if side_mask is None else [(side_mask == side).long() for side in (1, 2)]
    old, new = (pool(states, kind, side) * side.amax(1, keepdim=True) for side in sides)
    return torch.cat([old, (new - old).abs(), new], dim=1)


def _mean(states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean over the places where `weights` [batch, length] is 1, of at least one, in fp32."""
    weights = weights.float().unsqueeze(-1)
    return (states.float() * weights).sum(1) / weights.sum(1).clamp(min=1)


def check_pooling(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Look whether a text has what `config.pooling` reads.

    Raises:
        ConfigError: for cls and a tokenizer that does not put a classification token first.
    """
    if config.pooling == "cls" and not begins_with_cls(tokenizer):
        place = "has none" if tokenizer.cls_token_id is None else "does not put it first"
        raise ConfigError(
            f"model.pooling cls reads a classification token, and the tokenizer of {config.name_or_path} {place}; "
            "accepted: class, last, mean, edit, mean+edit, last+edit"
        )


def begins_with_cls(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text begins with a classification token: XLNet's ends with it, and some tokenizers add none."""
    cls = tokenizer.cls_token_id
    return cls is not None and tokenizer("a")["input_ids"][:1] == [cls]


def add_pooling(model: Any, config: ModelConfig) -> None:
    """Let a sequence classifier read what `config.pooling` says, in place; class changes nothing.

    Its own head, with what stands between it and the body, goes. The new one starts at zero, so that the first loss is
    the logarithm of the number of classes.

    Raises:
        ModelError: when the model has no body and head to tell apart.
    """
    if config.pooling == "class":
        return
    body = getattr(model, model.base_model_prefix, None)
    own = [(name, child) for name, child in model.named_children() if child is not body]
    linear = [part for _, child in own for part in child.modules() if isinstance(part, nn.Linear)]
    if not isinstance(body, nn.Module) or not linear:
        raise ModelError(
            f"model.pooling {config.pooling}: {type(model).__name__} has no linear head beside its body "
            f"{model.base_model_prefix!r}; use class"
        )
    for name, _ in own:
        delattr(model, name)
    if isinstance(getattr(body, "pooler", None), nn.Module):
        body.pooler = nn.Identity()  # BERT's, which nothing reads any more
    width, like = linear[0].in_features, linear[0].weight
    place: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    inputs = width * (3 if config.head == "cross" else len(config.pooling.split("+")))
    hidden = [FloatLinear(inputs, width, **place), nn.GELU()] if config.head == "mlp" else []
    last = FloatLinear(width if hidden else inputs, model.config.num_labels, **place)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    setattr(model, HEAD_NAME, nn.Sequential(*hidden, last))
    model.pooling = Pooling(config.pooling, config.head)
    model.__class__ = type(f"Pooled{type(model).__name__}", (_Pooled, type(model)), {})


def pooling_of(model: nn.Module) -> Pooling | None:
    """The pooling of `model`, or of the classifier inside it; None where that is the class's own."""
    return next((part.pooling for part in model.modules() if isinstance(part, _Pooled)), None)


def save_head(model: nn.Module, file: Path) -> None:
    """Write the head of a pooled model; the file's header says what it reads."""
    head, pooling = model.get_submodule(HEAD_NAME), pooling_of(model)
    assert pooling is not None
    weights = {name: tensor.detach().contiguous() for name, tensor in head.state_dict().items()}
    save_file(weights, file, metadata={"pooling": pooling.kind, "head": pooling.head})


def load_head(model: nn.Module, file: Path) -> None:
    """Give a pooled model the head that `save_head` wrote."""
    model.get_submodule(HEAD_NAME).load_state_dict(load_file(file))
