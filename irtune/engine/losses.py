"""Training losses of a classifier. Each is a mean over the examples of a micro-batch.

The mean divides by the number of examples, also where classes weigh differently (not by the sum of their weights): so
equal micro-batches may be spread over ranks and accumulation steps in any way, and the gradient stays the same.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from irtune.config import OptimConfig

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in fp32 of logits [batch, classes] and labels int64 [batch]."""
    return nn.functional.cross_entropy(logits.float(), labels)


def class_balanced_weights(counts: Sequence[int], beta: float) -> torch.Tensor:
    """Weight of each class by its effective number of examples, fp32 [classes], mean 1 over the training examples.

    w_c proportional to (1 - beta) / (1 - beta^n_c) (Cui et al., CVPR 2019, eq. 2); beta 0 weighs all alike, beta near
    1 by inverse frequency. Normalised to a mean of 1 over examples rather than classes, so that the learning rate
    keeps its meaning. A class without an example counts as if it had one.
    """
    known = torch.tensor([max(1, count) for count in counts], dtype=torch.float64)
    weights = (1 - beta) / (1 - beta**known)
    return (weights * known.sum() / (weights * known).sum()).float()


def build_loss(optim: OptimConfig, counts: Sequence[int], device: torch.device) -> Loss:
    """The loss named by `optim.loss`, for training labels that occur `counts` times.

    cross_entropy; class_balanced: weighted cross-entropy, see `class_balanced_weights`; focal: (1 - p)^gamma times the
    cross-entropy, p the probability of the true class (Lin et al., ICCV 2017, eq. 4). All with `optim.label_smoothing`
    (Szegedy et al., CVPR 2016): that share of the target is spread over all classes.
    """
    weights = None
    if optim.loss == "class_balanced":
        weights = class_balanced_weights(counts, optim.class_balance_beta).to(device)
    gamma = optim.focal_gamma if optim.loss == "focal" else 0.0

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        each = nn.functional.cross_entropy(
            logits.float(), labels, weight=weights, reduction="none", label_smoothing=optim.label_smoothing
        )
        if gamma:
            true = logits.float().softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            each = (1 - true) ** gamma * each
        return each.mean()

    return loss
