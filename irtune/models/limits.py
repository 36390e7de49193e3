"""How long a text a model can read, and which tokens it knows."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from irtune.errors import ModelError, one_line
from irtune.models.classifier import Classifier

POSITIONS = ("position", "wpe")  # what tables of absolute positions are called
UNLIMITED = 10**9


def longest_input(classifier: Classifier) -> int | None:
    """Tokens that the model has positions for, or None where nothing says.

    The least of config.json, the tokenizer, and the tables of positions, some of which begin behind the padding's row.
    """
    settings: Any = classifier.model.config
    limits = [
        getattr(settings.get_text_config(), "max_position_embeddings", None),
        classifier.tokenizer.model_max_length,
        *_tables(classifier.model),
    ]
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < UNLIMITED]
    return min(known, default=None)


def longest_whole(settings: Any) -> int | None:
    """Tokens of a batch up to which BigBird's attention is whole, or None for models whose attention always is.

    Of longer batches it attends in blocks, the last one from everywhere, padding or not; after one short batch it
    attends whole to all: what comes out depends on the batch, and on those before.
    """
    if getattr(settings, "attention_type", None) != "block_sparse":
        return None
    return int((5 + 2 * settings.num_random_blocks) * settings.block_size)  # as in BigBirdModel.forward


def _tables(model: Any) -> list[int]:
    """Places in the tables of absolute positions, which are beside the embeddings of tokens."""
    words = model.get_input_embeddings()
    beside = next(module for module in model.modules() if any(child is words for child in module.children()))
    return [
        table.num_embeddings - (table.padding_idx + 1 if table.padding_idx is not None else getattr(table, "offset", 0))
        for name, table in beside.named_children()
        if isinstance(table, nn.Embedding) and "relative" not in name and any(word in name for word in POSITIONS)
    ]


def cannot_read(model: nn.Module, error: Exception, adapter: str | None = None) -> ModelError:
    """The error for a model, with adapters of type `adapter` or none, that fails on a text, with what to change."""
    few_bits = any(p.is_floating_point() and p.dtype.itemsize < 4 for p in model.parameters())
    where, more = (" in this number format", "model.dtype to float32, or ") if few_bits else ("", "")
    if adapter is not None:
        where, more = f" with adapter.type {adapter}", "" if adapter == "lora" else "adapter.type to lora, or "
    reason = one_line(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {one_line(error)}"
    return ModelError(
        f"{type(model).__name__} cannot read a text{where} ({reason}); set {more}model.name_or_path to another model"
    )


def check_tokens(classifier: Classifier, encoded: Iterable[Sequence[Mapping[str, Sequence[int]]]]) -> None:
    """Look whether the embeddings have a row for every token of the texts.

    Raises:
        ModelError: naming the first token that has none.
    """
    model: Any = classifier.model
    rows = int(model.get_input_embeddings().num_embeddings)
    for texts in encoded:
        largest = max((max(text["input_ids"]) for text in texts), default=0)
        if largest >= rows:
            token = classifier.tokenizer.convert_ids_to_tokens(largest)
            raise ModelError(
                f"{model.name_or_path}: the tokenizer writes token {largest} ({token!r}), but the model has embeddings "
                f"for {rows} tokens; set model.name_or_path to a folder whose model was saved after "
                f"resize_token_embeddings({len(classifier.tokenizer)})"
            )
