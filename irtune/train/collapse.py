"""Says so when a classifier has collapsed: when all that it predicts is one class."""

from collections.abc import Sequence

from irtune.config import Config
from irtune.evaluation.metrics import Predictions


def collapse(predictions: Predictions, labels: Sequence[str], config: Config) -> str | None:
    """What to change when all predictions of a dev split with several labels are one class; else None."""
    only = predictions.task.only(predictions, labels)
    if only is None:
        return None
    optim, templated = config.optim, config.data.template is not None
    warmup = "optim.warmup_steps" if optim.warmup_fraction is None else "optim.warmup_fraction"
    advice = [f"another optim.lr (it is {optim.lr:g}), with a longer {warmup}"]
    if optim.loss in ("cross_entropy", "focal") and optim.class_weights is None:  # others weigh classes
        advice.append("optim.loss class_balanced")
    if config.data.after is not None and (config.data.prompt != "diff" or templated):
        without = " without data.template and" if templated else ""
        advice.append(f"data.prompt diff{without} with model.pooling mean+edit")
    elif config.data.prompt == "diff" and config.model.pooling == "class":
        advice.append("model.pooling mean+edit")
    return (
        f"all {len(predictions.labels)} dev examples are predicted to be {only}; if that does not "
        f"change in later evaluations, try {', or '.join(advice)}"
    )
