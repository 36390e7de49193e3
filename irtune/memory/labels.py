"""What L-Tuning's shapes need to know of labels and tokenizer, where neither may be at hand."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from irtune.config import Config
from irtune.config.declarations import adapter_kinds
from irtune.models.classifier import load_tokenizer

# Labels of the known corpora, after `data.drop_labels` of their presets.
PRESETS = {
    "iterater-human": ("clarity", "coherence", "fluency", "meaning-changed", "style"),
    "argrewrite": ("claim", "conventions", "evidence", "general-content", "organization", "precision", "reasoning",
                   "rebuttal", "word-usage"),
}  # fmt: skip
ASSUMED = tuple(f"label number {number}" for number in range(1, 6))  # 5 labels of 14 letters


class _TokenPerByte:
    """Stands for a tokenizer that is not at hand: no tokenizer makes more tokens of a text than it has bytes.

    One more is for those that put a space before a text.
    """

    pad_token_id = 0
    cls_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * (len(text.encode()) + 1)}


def planned_labels(config: Config, known: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """The labels, and what had to be assumed, as sentences.

    They are `known` to a run that has read its corpus; otherwise `data.labels` or `data.preset` names them.
    """
    data = config.data
    if known:
        return list(known), []
    if isinstance(data.labels, dict):
        return list(dict.fromkeys(data.labels.values())), []
    if data.labels:
        return list(data.labels), []
    if data.preset in PRESETS:
        return [label for label in PRESETS[data.preset] if label not in data.drop_labels], []
    return list(ASSUMED), [f"the corpus is not read: {len(ASSUMED)} labels are assumed; data.labels can name them"]


def planned_tokenizer(config: Config, labels: Sequence[str]) -> tuple[Any, list[str]]:
    """A tokenizer that can count the tokens of labels, and what had to be assumed, as sentences.

    Only L-Tuning needs one. It is read from a model's folder; for other models, nothing is downloaded.
    """
    if not adapter_kinds()[config.adapter.type].reads_labels:
        return SimpleNamespace(pad_token_id=0, cls_token_id=None), []
    if Path(config.model.name_or_path).expanduser().is_dir():
        return load_tokenizer(config.model), []
    longest = max(len(label.encode()) + 1 for label in labels)
    return _TokenPerByte(), [
        f"the tokenizer is not read: a label is taken to have a token for each byte and one more, {longest} at most"
    ]
