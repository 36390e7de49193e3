"""Types of the literature against the cases that were worked out by hand, their sources' rules, and plain formulas."""

import math
import types

import pytest
import torch
from torch import nn

from irtune.adapters.build import add_adapters
from irtune.adapters.kinds.hft import halves
from irtune.adapters.kinds.lofit import PENALTY, HeadOffsets, best_heads, number_of_heads
from irtune.adapters.kinds.sparse import Regrowing, accumulate, looked_up, regrown, share_dropped
from irtune.adapters.kinds.triadapt import TriangularUpdate, growing
from irtune.config import AdapterConfig, ModelConfig, load_config
from irtune.errors import ConfigError, ModelError
from irtune.models import RunFacts, load_classifier
from irtune.models.anatomy import is_linear

pytestmark = pytest.mark.quick

BATCH = {
    "input_ids": torch.tensor([[4, 9, 11, 7, 5, 8], [6, 12, 10, 3, 7, 9]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
}


def build(folder, seed=0, base="float32", max_length=16, **settings):
    """A model with adapters in it and its table."""
    torch.manual_seed(3)
    classifier = load_classifier(ModelConfig(name_or_path=str(folder), dtype=base), ["a", "b", "c"])
    classifier.run = RunFacts(seed, max_length)
    return add_adapters(classifier, AdapterConfig(**settings))


# ----- hft -----


def test_one_half_of_each_sort_of_weights_is_drawn():
    for seed in range(20):
        attention = halves([["q", "k", "v", "o"]] * 4, seed, "attention")
        forward = halves([["gate", "up", "down"]] * 4, seed, "feed-forward")
        norms = halves([["before", "after"]] * 4, seed, "norm")
        assert [len(names) for names in attention] == [2, 2, 2, 2]  # 8 of 16
        assert sorted(len(names) for names in forward) == [1, 1, 2, 2]  # 6 of 12
        assert [len(names) for names in norms] == [1, 1, 1, 1]  # 4 of 8
    assert sorted(map(len, halves([["gate", "up", "down"]] * 5, 0, "feed-forward"))) == [1, 1, 1, 2, 2]
    assert [len(names) for names in halves([["in", "out"]] * 3, 0, "feed-forward")] == [1, 1, 1]
    drawn = {str(halves([["q", "k", "v", "o"]] * 4, seed, "attention")) for seed in range(20)}
    assert len(drawn) == 20  # 6 ** 4 ways
    first = halves([["q", "k", "v", "o"]] * 2, 0, "attention")
    assert first == [["q", "k"], ["k", "v"]]  # forever: a saved adapter is drawn again when it is loaded


def test_hft_steps_as_none_does_under_the_same_mask(llama):
    halved, table = build(llama, 5, type="hft", dtype="model")
    whole, every = build(llama, 5, type="none", dtype="model")
    trained = dict(table.all())
    assert 0 < len(trained) < len(dict(every.all()))
    for name, parameter in every.all():
        parameter.requires_grad_(name in trained)
    frozen = {name: p.clone() for name, p in halved.named_parameters() if name not in trained}
    losses = []
    for model in (halved, whole):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        losses.append([])
        for _ in range(4):
            loss = torch.nn.functional.cross_entropy(model(**BATCH).logits, torch.tensor([0, 2]))
            losses[-1].append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    now = dict(halved.named_parameters())
    assert all(torch.equal(now[name], before) for name, before in frozen.items())


def test_hft_keeps_biases_with_their_matrices_and_refuses_what_it_cannot_halve(bert, gpt2):
    _, table = build(bert, type="hft", dtype="model")
    for layer in table.layers:
        names = [name for name, _ in layer]
        assert {name.removesuffix("weight") for name in names if name.endswith("weight")} == {
            name.removesuffix("bias") for name in names if name.endswith("bias")
        }
        # Of 4 attention matrices 2, of 2 feed-forward matrices 1, of 2 norms 1: BERT's widths are 32 and 64.
        assert len(names) == 8
    with pytest.raises(ModelError, match=r"has its q, k and v in one and cannot be halved by matrix; set"):
        build(gpt2, type="hft", dtype="model")


# ----- lofit -----


def test_lofit_scales_and_shifts_heads():
    module = HeadOffsets(1, 2).eval()
    module.gain.data.copy_(torch.tensor([[0.5, 0.0]]))
    module.offset.data.copy_(torch.tensor([[0.0, 1.0]]))
    z = torch.tensor([1.0, 2.0])
    assert module(z).tolist() == [1.5, 2]  # the first half: offsets rest
    module.located.fill_(True)
    assert module(z).tolist() == [1, 2]  # the second half, a head that was not chosen
    module.chosen.fill_(True)
    assert module(z).tolist() == [1, 3]
    both = (1 + module.gain) * z + module.offset  # what the source writes for both at once
    assert both[0].tolist() == [1.5, 3]
    norms = torch.tensor([[0.3, 0.1], [0.2, 0.4]])
    assert best_heads(norms, 2) == [(1, 1), (0, 0)]
    assert best_heads(torch.ones(2, 2), 3) == [(0, 0), (0, 1), (1, 0)]
    assert number_of_heads(0.03, 270) == 8 and number_of_heads(5, 270) == 5 and number_of_heads(0.001, 10) == 1
    with pytest.raises(ConfigError, match=r"adapter\.heads is 11; accepted: at most 10"):
        number_of_heads(11, 10)


def test_lofit_adds_the_sum_of_absolute_gains_to_the_loss():
    torch.manual_seed(0)
    module, z = HeadOffsets(2, 3).double(), torch.randn(5, 6, dtype=torch.float64)
    module.penalty = PENALTY
    (module(z) ** 2).sum().backward()
    found, module.gain.grad, module.penalty = module.gain.grad, None, 0.0
    ((module(z) ** 2).sum() + 5e-4 * module.gain.abs().sum()).backward()
    assert torch.allclose(found, module.gain.grad, rtol=1e-12, atol=0)


def test_lofit_has_a_gain_and_an_offset_for_each_number_of_a_head(llama):
    _, table = build(llama, type="lofit")
    assert [tuple(p.shape) for _, p in table.layers[0]] == [(4, 8), (4, 8)]
    gains = torch.stack([layer[0][1] for layer in table.layers])
    assert 0.5e-3 < gains.std() < 1.5e-3 and not any(layer[1][1].any() for layer in table.layers)


# ----- sparse -----


def test_values_move_to_the_largest_sums_of_gradients():
    indices, values = torch.tensor([0, 3, 5]), torch.tensor([0.5, -0.1, 0.3])
    candidates, sums = torch.tensor([1, 3, 5]), torch.tensor([-4.0, 2.0, 9.0])
    new = regrown(indices, values, candidates, sums.abs(), int(1 / 3 * 3))
    assert new.tolist() == [0, 1, 5]
    assert looked_up(indices, values, new, torch.zeros(3)).equal(torch.tensor([0.5, 0, 0.3]))
    # Of what is dropped, a candidate with the largest sum grows again at once, and so stays.
    new = regrown(indices, values, candidates, torch.tensor([1.0, 2.0, 9.0]), 1)
    assert new.tolist() == [0, 3, 5] and looked_up(indices, values, new, torch.zeros(3)).equal(values)
    assert [share_dropped(step, 100) for step in (5, 25, 45)] == pytest.approx([1, 0.15, 0.11])


def test_sm3s_accumulators_say_where_values_grow():
    rows, columns = torch.zeros(2), torch.zeros(2)
    accumulate(rows, columns, torch.tensor([0, 3]), torch.tensor([2.0, 1.0]))
    strength = torch.outer(rows, columns)
    assert strength.tolist() == [[16, 4], [4, 1]]
    new = regrown(torch.tensor([0, 3]), torch.tensor([0.2, 0.1]), torch.arange(4), strength.flatten(), 1)
    assert new.tolist() == [0, 1]  # of two equal ones the lower
    accumulate(rows, columns, torch.tensor([0]), torch.tensor([1.0]))
    assert (rows.tolist(), columns.tolist()) == ([5, 1], [5, 1])  # min(4, 4) + 1; the other row has no value now


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_sparse_values_are_a_change_of_the_weight(request, architecture):
    folder, target = request.getfixturevalue(architecture), torch.tensor([0, 2])
    model, table = build(folder, type="sparse", density=0.05)
    plain, whole = build(folder, type="none", dtype="model")
    model.double(), plain.double()
    pairs = []
    for layer, other in zip(table.modules, whole.modules):
        weights = {name.replace(".", "_"): module.weight for name, module in other.named_modules() if is_linear(module)}
        pairs += [(update, weights[key]) for key, update in layer.sparse.items()]
    for update, weight in pairs:
        nn.init.normal_(update.values, std=0.1)
        weight.data.view(-1)[update.indices.long()] += update.values.data
    losses = [nn.functional.cross_entropy(each(**BATCH).logits, target) for each in (model, plain)]
    assert torch.allclose(*losses, rtol=1e-12)
    for loss in losses:
        loss.backward()
    for update, weight in pairs:
        assert torch.allclose(update.values.grad, weight.grad.view(-1)[update.indices.long()], rtol=1e-9, atol=1e-12)
    values = sum(update.values.numel() for update, _ in pairs)
    assert values == pytest.approx(0.05 * sum(p.numel() for p in plain.parameters()), rel=0.02)


def test_values_grow_with_the_moments_of_their_window(llama):
    """A window of known gradients, of two micro-batches each, moves one module's values."""
    config = load_config(["--adapter.type=sparse", "--data.path=x", "--optim.betas=[0.9, 0.99]"])
    _, table = build(llama, type="sparse", density=0.05)
    schedule = Regrowing(table, config, 100)
    update = table.modules[1].sparse["mlp_up_proj"]
    name = next(name for name, parameter in table.layers[1] if parameter is update.values)
    dense = torch.zeros(5, 2, update.shape.numel())
    generator = torch.Generator().manual_seed(0)
    for number in range(5):
        dense[number] = torch.randn(2, update.shape.numel(), generator=generator)
    editor = types.SimpleNamespace(selected=[1], accumulation_steps=2, gradient_factor=2.0)
    state = {name + kind: torch.full((len(update.values),), 7.0) for kind in ("", "/exp_avg", "/exp_avg_sq")}
    editor.edit = lambda layer, change: change(state, 5.0)
    for step in range(1, 6):
        for half in dense[step - 1]:
            with schedule.watching(step, editor):
                update.watch(half / 2)  # as accumulation divides it
        assert schedule.is_due(step) and not schedule.is_due(step + 5)
        schedule.decide(step, editor)
    gradients = dense.sum(1) / 2
    candidates = gradients[0].abs().argsort(descending=True)[: len(update.values)].sort().values
    assert torch.equal(update.indices.long(), candidates)  # p = 1: all gave way
    new = state[name] == 0
    assert torch.allclose(
        state[name + "/exp_avg"][new], gradients[:, candidates].mean(0)[new] * (1 - 0.9**5), atol=1e-5
    )
    squares = (gradients[:, candidates] ** 2).mean(0)
    assert torch.allclose(state[name + "/exp_avg_sq"][new], squares[new] * (1 - 0.99**5), atol=1e-5)
    assert (state[name][~new] == 7).all() and 0.8 < new.float().mean() < 1  # some were there before


# ----- triadapt -----


def test_triangular_factors_lie_between_b_and_a():
    update = TriangularUpdate(2, 1, 1, 4.0).eval()
    update.rank.fill_(2)
    for parameter, rows in (
        (update.lower, [[1.0, 9.0], [2.0, 3.0]]),  # 9 is above L's pattern, 8 below U's
        (update.upper, [[1.0, 4.0], [8.0, 0.0]]),
        (update.a, [[1.0, 0.0], [0.0, 1.0]]),
        (update.b, [[1.0, 2.0]]),
    ):
        parameter.data.copy_(torch.tensor(rows))
    assert update.core(update.lower, update.upper).tolist() == [[2, 4], [2, 3]]
    assert update.importance(update.lower, update.upper).item() == pytest.approx(math.sqrt(33) / 2)
    assert update.weight()[0].tolist() == pytest.approx([12, 20], rel=1e-4)
    x = torch.tensor([[3.0, 1.0]])
    assert update(x).item() == pytest.approx(3 * 12 + 20, rel=1e-4)
    assert (growing(24 - 9, 0.5, "linear"), growing(24 - 9, 0.5, "exp"), growing(3, 0.1, "linear")) == (7, 3, 1)


def test_blocks_grow_from_the_first_row_on():
    update = TriangularUpdate(3, 3, 4, 1.0)
    assert update.block.tolist() == [0, 1, 1, 2, 2, 3, 3, 4]
    update.rank.fill_(3)
    ones = torch.ones(8, 8)
    core = update.core(ones, torch.zeros(8, 8))[:4, :4]
    assert core.tolist() == [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert torch.equal(update.core(torch.zeros(8, 8), ones)[:4, :4], core.T)


def test_the_penalty_of_triadapt_is_that_of_its_formula():
    torch.manual_seed(2)
    update, x = TriangularUpdate(6, 5, 4, 3.0).double(), torch.randn(7, 6, dtype=torch.float64)
    update.rank.fill_(3)
    for parameter in update.parameters():
        nn.init.normal_(parameter)
    update.penalty = 0.5
    (update(x) ** 2).sum().backward()
    found = [parameter.grad.clone() for parameter in update.parameters()]
    update.zero_grad()
    update.penalty, one = 0.0, torch.eye(3, dtype=torch.float64)
    a, b = update.a[:3], update.b[:, :3]
    ((update(x) ** 2).sum() + 0.5 * ((a @ a.T - one).norm() + (b.T @ b - one).norm())).backward()
    for gradient, parameter in zip(found, update.parameters()):
        assert torch.allclose(gradient, parameter.grad, rtol=1e-9, atol=1e-12)
