"""Optimal transport of a target to candidates: by hand, against POT, and against finite differences."""

import numpy as np
import ot
import pytest
import torch

from irtune.errors import DataError
from irtune.evaluation import transport

pytestmark = pytest.mark.quick


def test_a_target_of_one_point_by_hand():
    # Target 0, candidates 0 and 10: moving mass e to the first changes the cost by -10 e. Entropy changes nothing here.
    assert transport.gradients(torch.tensor([[0.0, 10.0]]).double()).tolist() == pytest.approx([-10.0, 10.0], abs=1e-3)


@pytest.fixture(scope="module")
def cost():
    generator = torch.Generator().manual_seed(3)
    points = torch.rand(14, 2, generator=generator).double()
    return torch.cdist(points[:8], points[8:])


def test_the_plan_is_that_of_pot(cost):
    g = transport.potentials(cost, 0.1)
    uniform = [np.full(size, 1 / size) for size in cost.shape]
    _, log = ot.sinkhorn(*uniform, cost.numpy(), reg=0.1, method="sinkhorn_log", stopThr=1e-12, log=True)
    wanted = torch.tensor(log["log_v"]) * 0.1  # up to a constant
    assert (g - g.mean()).tolist() == pytest.approx((wanted - wanted.mean()).tolist(), abs=2e-3)


def test_the_gradients_are_those_of_the_exact_cost(cost):
    uniform = [np.full(size, 1 / size) for size in cost.shape]
    columns, step = cost.shape[1], 1e-4
    exact = []
    for i in range(columns):
        masses = uniform[1] - step / (columns - 1)
        masses[i] = uniform[1][i] + step
        moved, here = ot.emd2(uniform[0], masses, cost.numpy()), ot.emd2(*uniform, cost.numpy())
        exact.append((moved - here) / step)
    found = transport.gradients(cost, 0.005)
    assert found.argsort().tolist() == np.argsort(exact).tolist()
    assert found.tolist() == pytest.approx(exact, abs=0.05)


def test_what_does_not_converge_says_its_error(cost, monkeypatch):
    monkeypatch.setattr(transport, "ROUNDS", 10)
    with pytest.raises(DataError, match=r"after 10 rounds its masses are off by 0\.\d+; accepted: 0.001; use a larger"):
        transport.potentials(cost, 1e-4)
