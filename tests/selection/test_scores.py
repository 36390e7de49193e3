"""Layer scores against torch.autograd.grad and hand-written formulas."""

import math

import pytest
import torch

from irtune.distributed import runtime
from irtune.selection.scores import LayerScores
from tests.support.ranks import run_ranks
from tests.support.tiny import LAYERS, Rig


def true_gradients(rig, batches):
    """Gradient of every adapter parameter of each layer, for each micro-batch, by autograd alone."""
    parameters = [parameter for layer in rig.table.layers for _, parameter in layer]
    result = []
    for batch in batches:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with rig.engine.idle.awake():
            gradients = torch.autograd.grad(rig.engine.module(**batch).loss, parameters)
        sizes = [len(layer) for layer in rig.table.layers]
        per_layer, start = [], 0
        for size in sizes:
            per_layer.append(gradients[start : start + size])
            start += size
        result.append(per_layer)
    rig.table.set_trainable(rig.engine.selected)
    return result


def formulas(gradients):
    """rms, global and reference scores of all micro-batches taken as one rank's."""
    count = len(gradients)
    rms, average, reference = [], [], []
    for layer in range(LAYERS):
        squares = sum(float(g.double().pow(2).sum()) for micro in gradients for g in micro[layer])
        rms.append(math.sqrt(squares / count))
        means = [sum(micro[layer][p] for micro in gradients) / count for p in range(len(gradients[0][layer]))]
        average.append(math.sqrt(sum(float(m.double().pow(2).sum()) for m in means)))
        reference.append(math.sqrt(sum(math.sqrt(float(m.double().norm())) for m in means)))
    return {"rms": rms, "global": average, "reference": reference}


def input_sizes(rig, batches):
    """Square root of the mean square of each layer's input, over all tokens."""
    squares, tokens = torch.zeros(LAYERS, dtype=torch.float64), 0
    for batch in batches:
        mask = batch["attention_mask"].bool()
        tokens += int(mask.sum())
        with torch.no_grad():
            for layer, (before, _) in enumerate(hidden_states(rig, batch)):
                squares[layer] += before[mask].double().square().mean(-1).sum()
    return (squares / tokens).sqrt().tolist()


def score_a_step(model, stage, kind, accumulation, probe):
    rig = Rig(model, stage, accumulation=accumulation)
    if not probe:
        rig.engine.reselect([1, 4])
        rig.train(2)  # adapters have left their zeros
    scores = LayerScores(rig.table, kind, rig.world.device, rig.projections)
    world = rig.world.size
    first = rig.steps * world * accumulation
    everything = [rig.batch(first + m) for m in range(world * accumulation)]
    truth = formulas(true_gradients(rig, everything)) if stage != 3 else None
    if truth is not None:
        inputs, weights = input_sizes(rig, everything), [float(w.norm()) for w in rig.projections]
        truth["resnorm"] = [score / size for score, size in zip(truth["rms"], inputs, strict=True)]
        truth["ratio"] = [score / size for score, size in zip(truth["rms"], weights, strict=True)]
    if probe:
        for batch in rig.mine(rig.steps):
            watch = scores.micro_batch(batch["attention_mask"], all_layers=True, factor=1.0)
            with rig.engine.reaching_all_layers(), watch:
                rig.engine.probe(batch, backward=True)
    else:
        rig.train(1, scores)
    measured = scores.reduce()
    clean = all(p.grad is None and not p.requires_grad for n in (0, 2, 3, 5) for _, p in rig.table.layers[n])
    handles = sum(len(p._backward_hooks or {}) for _, p in rig.table.all())
    rig.close()
    return measured, truth, clean, handles


@pytest.mark.parametrize("kind", ["rms", "global"])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 2)])
@pytest.mark.parametrize("probe", [False, True])
def test_scores_equal_autograd(llama, kind, world, accumulation, probe):
    for measured, truth, clean, handles in run_ranks(score_a_step, world, llama, 2, kind, accumulation, probe):
        assert measured == pytest.approx(truth[kind], rel=1e-5)
        assert clean
        assert handles == 0


@pytest.mark.parametrize("kind", ["resnorm", "ratio"])
def test_scores_by_inputs_and_by_weights_equal_autograd(llama, kind):
    for measured, truth, clean, handles in run_ranks(score_a_step, 2, llama, 2, kind, 2, False):
        assert measured == pytest.approx(truth[kind], rel=1e-5)
        assert clean and not handles


def test_reference_score_is_the_mean_over_ranks(llama):
    ((one, truth, *_),) = run_ranks(score_a_step, 1, llama, 0, "reference", 2, False)
    assert one == pytest.approx(truth["reference"], rel=1e-5)
    two = run_ranks(score_a_step, 2, llama, 0, "reference", 1, False)
    assert two[0][0] == two[1][0]
    assert two[0][0] != pytest.approx(two[0][1]["reference"], rel=1e-3)  # not the score of the averaged gradient


@pytest.mark.parametrize("kind", ["rms", pytest.param("global", marks=pytest.mark.slow)])
def test_stages_give_the_same_scores(llama, kind):
    zero, three = (run_ranks(score_a_step, 2, llama, stage, kind, 2, False)[0] for stage in (0, 3))
    assert three[0] == pytest.approx(zero[0], rel=1e-4)
    assert three[2]


def stale(model):
    rig = Rig(model, 2)
    rig.engine.reselect([1, 4])
    scores = LayerScores(rig.table, "rms", rig.world.device)
    for batch in rig.mine(0):
        with scores.micro_batch(batch["attention_mask"], all_layers=False, factor=1.0):
            rig.engine.forward_backward(batch)
        rig.engine.step(0.01)
    result = scores.reduce()
    rig.close()
    return [score is not None for score in result]


def test_stale_scores_leave_frozen_layers_alone(llama):
    assert run_ranks(stale, 2, llama)[0] == [False, True, False, False, True, False]


def hidden_states(rig, batch):
    """Input and output of every layer."""
    hidden = []

    def note(module, args, kwargs, output):
        before = args[0] if args else kwargs["hidden_states"]
        hidden.append((before, output[0] if isinstance(output, tuple) else output))

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in rig.table.modules]
    rig.engine.module(**batch)
    for hook in hooks:
        hook.remove()
    return hidden


def constants(model):
    """weight and cosine scores, and what they should be."""
    rig = Rig(model, 2)
    rig.engine.reselect([0])
    weights = LayerScores(rig.table, "weight", rig.world.device, rig.projections)
    cosine = LayerScores(rig.table, "cosine", rig.world.device)
    truth = torch.zeros(LAYERS)
    tokens = 0
    rig.engine.module.train()
    for number in range(rig.world.size):
        batch = rig.batch(number)
        batch.pop("labels")
        with torch.no_grad():
            hidden = hidden_states(rig, batch)
        mask = batch["attention_mask"].bool()
        tokens += int(mask.sum())
        for layer, (before, after) in enumerate(hidden):
            truth[layer] += torch.cosine_similarity(before[mask], after[mask], dim=-1).sum()
    rig.train(1, cosine)
    measured = cosine.reduce()
    expected = [float(layer.self_attn.o_proj.weight.norm()) for layer in rig.table.modules]
    result = weights.reduce(), expected, measured, (truth / tokens).tolist(), cosine.higher_is_important
    rig.close()
    return result


def test_weight_and_cosine_scores(llama):
    for weight, expected, cosine, truth, higher in run_ranks(constants, 2, llama):
        assert weight == pytest.approx(expected, rel=1e-5)
        assert cosine == pytest.approx(truth, abs=1e-5)
        assert not higher


def test_reset_after_reading(llama):
    runtime.stop()
    table = type("Table", (), {"num_layers": 2, "layers": [], "modules": []})()
    scores = LayerScores(table, "rms", torch.device("cpu"))
    assert scores.reduce() == [None, None]
