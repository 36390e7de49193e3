"""Training losses of a classifier. Each is a mean over the examples of a micro-batch.

The mean divides by the number of examples, also where classes or examples weigh differently (not by the sum of their
weights): so equal micro-batches may be spread over ranks and accumulation steps in any way, and the gradient stays the
same.
"""

import difflib
from collections.abc import Callable, Sequence

import torch
from torch import nn

from irtune.config import OptimConfig
from irtune.config.labels import canonical
from irtune.errors import ConfigError

# logits [batch, classes], labels int64 [batch] and, where examples weigh differently, their weights fp32 [batch]
Loss = Callable[..., torch.Tensor]


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


def build_loss(
    optim: OptimConfig, counts: Sequence[int], device: torch.device, labels: Sequence[str] | None = None
) -> Loss:
    """The loss named by `optim.loss`, for training labels that occur `counts` times and are called `labels`.

    cross_entropy; class_balanced: weighted cross-entropy, see `class_balanced_weights`; focal: (1 - p)^gamma times the
    cross-entropy, p the probability of the true class (Lin et al., ICCV 2017, eq. 4). All with `optim.label_smoothing`
    (Szegedy et al., CVPR 2016): that share of the target is spread over all classes. All with `optim.class_weights`,
    and with a weight of each example where the batch has them (`data.weight`).

    Raises:
        ConfigError: as `class_weights`.
    """
    weights = None
    given = class_weights(optim, labels if labels is not None else [str(number) for number in range(len(counts))])
    if given is not None:
        weights = torch.tensor(given, device=device)
    if optim.loss == "class_balanced":
        weights = class_balanced_weights(counts, optim.class_balance_beta).to(device)
    gamma = optim.focal_gamma if optim.loss == "focal" else 0.0

    def loss(logits: torch.Tensor, labels: torch.Tensor, examples: torch.Tensor | None = None) -> torch.Tensor:
        each = nn.functional.cross_entropy(
            logits.float(), labels, weight=weights, reduction="none", label_smoothing=optim.label_smoothing
        )
        if gamma:
            true = logits.float().softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            each = (1 - true) ** gamma * each
        if examples is not None:
            each = each * examples
        return each.mean()

    return loss
