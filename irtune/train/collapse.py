"""Says so when a classifier has collapsed: when all that it predicts is one class."""

from collections.abc import Sequence

from irtune.config import Config
from irtune.evaluation.metrics import Predictions


def collapse(predictions: Predictions, labels: Sequence[str], config: Config) -> str | None:
    """What to change when all predictions of a dev split with several labels are one class; else None."""
    predicted, true = predictions.logits.argmax(-1).unique(), predictions.labels.unique()
    if len(predicted) > 1 or len(true) < 2:
        return None
    advice = [f"another optim.lr (it is {config.optim.lr:g}), with a longer optim.warmup_steps"]
    if config.optim.loss != "class_balanced":
        advice.append("optim.loss class_balanced")
    if config.data.after is not None and config.data.prompt != "diff":
        advice.append("data.prompt diff with model.pooling mean+edit")
    elif config.data.prompt == "diff" and config.model.pooling == "class":
        advice.append("model.pooling mean+edit")
    return (
        f"all {len(predictions.labels)} dev examples are predicted to be {labels[int(predicted)]!r}; if that does not "
        f"change in later evaluations, try {', or '.join(advice)}"
    )
