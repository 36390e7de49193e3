"""Which candidates would bring a corpus nearer to a target, by optimal transport (GOT-D, Kang et al., ICLR 2024)."""

import torch

from irtune.errors import DataError

EPSILON = 0.1  # of the entropic term
ROUNDS = 10_000
TOLERANCE = 1e-3  # of the marginals, in all (L1)


def potentials(cost: torch.Tensor, epsilon: float = EPSILON) -> torch.Tensor:
    """Dual potentials g [columns] of entropic optimal transport between uniform masses, by log-domain Sinkhorn.

    Args:
        cost: float64 [rows, columns].
        epsilon: weight of the entropy, in the units of the cost.

    Raises:
        DataError: when the marginals are not met after `ROUNDS` rounds; says by how much.
    """
    rows, columns = cost.shape
    log_rows = -torch.log(torch.tensor(float(rows)))
    log_columns = -torch.log(torch.tensor(float(columns)))
    g = torch.zeros(columns, dtype=cost.dtype)
    error = float("inf")
    for number in range(1, ROUNDS + 1):
        f = -epsilon * torch.logsumexp((g - cost) / epsilon + log_columns, dim=1)
        if number % 10 == 0:  # with this f all rows have their mass; the columns may not
            mass = torch.exp((f[:, None] + g - cost) / epsilon + log_rows + log_columns).sum(0)
            error = float((mass - 1 / columns).abs().sum())
            if error < TOLERANCE:
                return g
        g = -epsilon * torch.logsumexp((f[:, None] - cost) / epsilon + log_rows, dim=0)
    raise DataError(
        f"the transport between target and candidates did not converge: after {ROUNDS:,} rounds its masses are off by "
        f"{error:.2g}; accepted: {TOLERANCE:g}; use a larger --epsilon"
    )


def gradients(cost: torch.Tensor, epsilon: float = EPSILON) -> torch.Tensor:
    """What mass moved to each candidate would add to the cost: g_i minus the mean of the others' g, float64 [columns].

    The smallest are the best candidates. `cost` is float64 [target rows, candidates].
    """
    g = potentials(cost, epsilon)
    others = (g.sum() - g) / max(1, len(g) - 1)
    return g - others
