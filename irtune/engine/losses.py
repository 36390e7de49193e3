"""Training losses of a classifier. Each is a mean over the examples of a micro-batch.

The mean divides by the number of examples, also where classes or examples weigh differently (not by the sum of their
weights): so equal micro-batches may be spread over ranks and accumulation steps in any way, and the gradient stays the
same.
"""

import difflib
import logging
from collections.abc import Callable, Sequence

import torch
from torch import nn

from irtune.config import OptimConfig
from irtune.config.labels import canonical
from irtune.errors import ConfigError

log = logging.getLogger("irtune")
# logits [batch, classes], targets [batch, ...] and, where examples weigh differently, their weights fp32 [batch]; with
# optim.mixup also `mixed`
Loss = Callable[..., torch.Tensor]
Mixed = tuple[torch.Tensor, torch.Tensor]
Each = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # logits and targets to the loss of each example [batch]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in fp32 of logits [batch, classes] and labels int64 [batch]."""
    return nn.functional.cross_entropy(logits.float(), labels)


def disagreement(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Mean over examples of (KL(p, q) + KL(q, p)) / 2, p and q the softmax of two logits [batch, classes]; fp32.

    What R-Drop adds to the loss (Wu et al., NeurIPS 2021, eq. 2).
    """
    p, q = (logits.float().log_softmax(-1) for logits in (first, second))
    return ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2


def class_balanced_weights(counts: Sequence[int], beta: float) -> torch.Tensor:
    """Weight of each class by its effective number of examples, fp32 [classes], mean 1 over the training examples.

    w_c proportional to (1 - beta) / (1 - beta^n_c) (Cui et al., CVPR 2019, eq. 2); beta 0 weighs all alike, beta near
    1 by inverse frequency. Normalised to a mean of 1 over examples rather than classes, so that the learning rate
    keeps its meaning. A class without an example counts as if it had one.
    """
    known = torch.tensor([max(1, count) for count in counts], dtype=torch.float64)
    weights = (1 - beta) / (1 - beta**known)
    return (weights * known.sum() / (weights * known).sum()).float()


def logit_adjustment(tau: float, counts: Sequence[int]) -> torch.Tensor:
    """-tau log(share of the training examples), fp32 [classes] (Menon et al., ICLR 2021, eq. 9)."""
    known = torch.tensor([max(1, count) for count in counts], dtype=torch.float32)
    return -tau * (known / known.sum()).log()


def class_weights(optim: OptimConfig, labels: Sequence[str]) -> list[float] | None:
    """`optim.class_weights` in the order of `labels`; a label that a map does not name has 1.

    Raises:
        ConfigError: for another number of weights than labels, an unknown label, and weights that are all 0.
    """
    given = optim.class_weights
    if given is None:
        return None
    if isinstance(given, list):
        if len(given) != len(labels):
            raise ConfigError(
                f"optim.class_weights has {len(given)} weights for {len(labels)} labels; accepted: one for each of "
                f"{', '.join(labels)}"
            )
        return [float(value) for value in given]
    given = {name if name in labels else canonical(name): value for name, value in given.items()}
    strange = next((name for name in given if name not in labels), None)
    if strange is not None:
        near = difflib.get_close_matches(strange, labels, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"optim.class_weights: {strange!r} is not a label; {hint}accepted: {', '.join(labels)}")
    weights = [float(given.get(label, 1.0)) for label in labels]
    if not any(weights):
        raise ConfigError("optim.class_weights has no weight above 0: nothing would be learnt")
    return weights


def positive_weights(counts: Sequence[int], labels: Sequence[str]) -> torch.Tensor:
    """max n / n_c for labels that n_c training examples have, fp32 [classes] (Buchner et al., NAACL 2024).

    A label that no training example has gets 1, which a warning says.
    """
    absent = [repr(label) for label, count in zip(labels, counts) if not count]
    if absent:
        log.warning("no training example has the label %s, whose optim.positive_weight is 1", ", ".join(absent))
    return torch.tensor([max(counts) / count if count else 1.0 for count in counts])


def binary(weights: torch.Tensor | None) -> Each:
    """Mean over classes of -(w_c t log s + (1 - t) log(1 - s)), s the sigmoid, targets t fp32 [batch, classes]."""

    def each(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(
            logits.float(), targets, pos_weight=weights, reduction="none"
        ).mean(-1)

    return each


def squared_error(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(y - t)^2 of outputs y [batch, 1] and values t fp32 [batch]."""
    return (logits.float().squeeze(-1) - targets) ** 2


def build_loss(
    optim: OptimConfig, counts: Sequence[int], device: torch.device, labels: Sequence[str] | None = None
) -> Loss:
    """The loss named by `optim.loss`, for training labels that occur `counts` times and are called `labels`.

    binary: see `binary` and `positive_weights`; mean_squared_error: see `squared_error`.

    For one label per example: cross_entropy; class_balanced: weighted cross-entropy, see `class_balanced_weights`;
    focal: (1 - p)^gamma times the cross-entropy, p the probability of the true class (Lin et al., ICCV 2017, eq. 4).
    All three with `optim.label_smoothing` (Szegedy et al., CVPR 2016): that share of the target is spread over all
    classes; and with `optim.class_weights`. Every loss takes a weight of each example where the batch has them
    (`data.weight`).

    `mixed`, of `optim.mixup` (Zhang et al., ICLR 2018): a share lambda, fp32 [], and an order of the examples, int64
    [batch]. Logits become lambda x their own + (1 - lambda) x those of the example in the order's place, and so do the
    losses for the labels of the two. Behind a linear module, to mix its outputs is to mix its inputs.

    Raises:
        ConfigError: as `class_weights`.
    """
    names = labels if labels is not None else [str(number) for number in range(len(counts))]
    if optim.loss == "binary":
        of_each = binary(positive_weights(counts, names).to(device) if optim.positive_weight else None)
    elif optim.loss == "mean_squared_error":
        of_each = squared_error
    else:
        of_each = _one_label(optim, counts, device, names)

    def weighed(logits: torch.Tensor, labels: torch.Tensor, examples: torch.Tensor | None) -> torch.Tensor:
        each = of_each(logits, labels)
        return each if examples is None else each * examples

    def loss(
        logits: torch.Tensor, labels: torch.Tensor, examples: torch.Tensor | None = None, mixed: Mixed | None = None
    ) -> torch.Tensor:
        if mixed is None:
            return weighed(logits, labels, examples).mean()
        share, order = mixed
        blend = share * logits.float() + (1 - share) * logits.float()[order]
        own, other = weighed(blend, labels, examples), None if examples is None else examples[order]
        return (share * own + (1 - share) * weighed(blend, labels[order], other)).mean()

    return loss


def _one_label(optim: OptimConfig, counts: Sequence[int], device: torch.device, names: Sequence[str]) -> Each:
    """Losses of logits [batch, classes] and labels int64 [batch]."""
    weights = None
    given = class_weights(optim, names)
    if given is not None:
        weights = torch.tensor(given, device=device)
    if optim.loss == "class_balanced":
        weights = class_balanced_weights(counts, optim.class_balance_beta).to(device)
    gamma = optim.focal_gamma if optim.loss == "focal" else 0.0

    def each(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = nn.functional.cross_entropy(
            logits.float(), labels, weight=weights, reduction="none", label_smoothing=optim.label_smoothing
        )
        if gamma:
            true = logits.float().softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            found = (1 - true) ** gamma * found
        return found

    return each
