"""Selection under ZeRO, proved with weights and bytes on real processes (invariants 4, 5 and 6)."""

import gc
import math
import resource
from unittest.mock import Mock

import pytest
import torch

from irtune.distributed import runtime
from irtune.selection.scores import LayerScores
from irtune.train.layer_selection import verify_selection
from tests.support.ranks import run_cases, run_ranks
from tests.support.tiny import LAYERS, Rig

SELECTIONS = [[1, 2], [2, 3], [0, 5], [1, 2, 4], [5]]


def freeze_and_thaw(model, stage, dtype, accumulation, options):
    """After each selection: who moved, who stayed bit-identical, and the bytes of optimizer state."""
    rig = Rig(model, stage, dtype, accumulation, **options)
    report = []
    for selected in SELECTIONS:
        rig.engine.reselect(selected)
        before = rig.layer_weights()
        rig.train(2)
        after = rig.layer_weights()
        moved = [number for number in range(LAYERS) if not torch.equal(before[number], after[number])]
        report.append((moved, not torch.equal(before[-1], after[-1]), rig.engine.optimizer_state_bytes(),
                       rig.numel(selected)))  # fmt: skip
    rig.close()
    return report


def expected_bytes(stage: int, dtype: str, numel: int, world: int, groups: int) -> range:
    """(8 + 4 if a master is kept) per parameter, sharded by stages 1 to 3, up to alignment."""
    master = dtype == "bfloat16" or stage in (1, 2)
    per_parameter = 12 if master else 8
    if stage == 0:
        return range(per_parameter * numel, per_parameter * numel + 1)
    exact = per_parameter * numel // world
    return range(exact, exact + per_parameter * 2 * groups * (14 if stage == 3 else 1) + 1)


MOVING = [
    (0, "float32", 1),
    (1, "float32", 2),
    (2, "float32", 1),
    (0, "bfloat16", 1),
    (1, "bfloat16", 1),
    (2, "bfloat16", 2),
    (2, "mixed", 1),
    (3, "bfloat16", 1),
]


@pytest.mark.parametrize(
    ("world", "kinds"),
    [
        (2, MOVING),
        pytest.param(2, [(3, "float32", 2), (3, "mixed", 1)], marks=pytest.mark.slow),
        pytest.param(4, [(2, "float32", 1), (3, "float32", 1)], marks=pytest.mark.slow),
    ],
    ids=["2", "2-zero-3", "4"],
)
def test_selected_layers_move_and_no_other(llama, world, kinds):
    # Weight decay is on: a frozen layer must not even decay.
    cases = [(llama, stage, dtype, accumulation, {"weight_decay": 0.1}) for stage, dtype, accumulation in kinds]
    for case, reports in zip(kinds, run_cases(freeze_and_thaw, world, cases)):
        for report in reports:
            for selected, (moved, head_moved, state_bytes, numel) in zip(SELECTIONS, report, strict=True):
                assert moved == selected, case
                assert head_moved, case
                assert state_bytes in expected_bytes(*case[:2], numel, world, len(selected) + 1), case


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_other_architectures(gpt2, bert, stage):
    cases = [(model, stage, "float32", 1, {}) for model in (gpt2, bert)]
    for case, reports in zip(cases, run_cases(freeze_and_thaw, 2, cases)):
        for report in reports:
            assert [moved for moved, *_ in report] == SELECTIONS, case


def _norms(model, stage):
    """Norms of two steps: irtune's with its all-reduces, and DeepSpeed's own; then with a gradient that is NaN."""
    rig = Rig(model, stage)
    rig.engine.reselect([1, 4])
    optimizer = rig.engine.ds.optimizer
    update, seen = optimizer.step, []

    def compare():
        theirs = optimizer.scaled_global_norm()
        with pytest.MonkeyPatch.context() as patch:
            counted = Mock(wraps=torch.distributed.all_reduce)
            patch.setattr(torch.distributed, "all_reduce", counted)
            update()
        found = rig.engine.ds.optimizer._global_grad_norm
        seen.append((float(found), float(theirs), counted.call_count, counted.call_args.args[0].numel()))

    optimizer.step = compare
    rig.train(2)
    if rig.world.rank == 1:
        rig.table.head[0][1].register_hook(lambda gradient: gradient * float("nan"))
    rig.train(1)
    rig.close()
    return seen


def test_the_norm_is_deepspeeds_in_one_all_reduce(llama):
    for reports in run_cases(_norms, 2, [(llama, 1), (llama, 2)]):
        assert reports[0][:2] == reports[1][:2]
        for found, theirs, calls, numbers in reports[0][:2]:
            assert found == pytest.approx(theirs, rel=1e-6) and found > 0
            assert (calls, numbers) == (1, 1)
        for rank in range(2):
            found, theirs, *_ = reports[rank][2]
            assert math.isnan(found) and theirs == float("inf")


def test_cpu_offload(llama):
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
    both = offload | {"offload_param": {"device": "cpu", "pin_memory": False}}
    cases = [(llama, stage, "float32", 1, {"zero": zero}) for stage, zero in ((2, offload), (3, both))]
    for case, reports in zip(cases, run_cases(freeze_and_thaw, 2, cases)):
        for report in reports:
            assert [moved for moved, *_ in report] == SELECTIONS, case


def come_back(model, stage, dtype, park):
    """State of layer 1 when it is deselected, and when it is back."""
    rig = Rig(model, stage, dtype, park=park)
    rig.engine.reselect([1, 2])
    rig.train(3)
    gone, gone_steps = rig.engine.full_state()
    rig.engine.reselect([3])
    rig.train(2)
    between, _ = rig.engine.full_state()
    rig.engine.reselect([1])
    back, back_steps = rig.engine.full_state()
    parked = rig.engine.parked_bytes()
    first = [name for name, _ in rig.table.layers[1]]
    state = rig.engine.state
    live = [state.adamw.state[tensor] for key, tensors in state.groups() if key == 1 for tensor in tensors]
    zero = bool(live) and all(not state[name].any() for state in live for name in ("exp_avg", "exp_avg_sq"))
    rig.train(1)
    _, after_steps = rig.engine.full_state()
    rig.close()
    same = all(torch.equal(gone[key], back[key]) for key in gone if key.rpartition("/")[0] in first and key in back)
    same = same and any(key.rpartition("/")[0] in first for key in back)  # a layer without a step is not saved
    parked_between = any(key.rpartition("/")[0] in first for key in between)
    assert after_steps["1"] == back_steps.get("1", 0) + 1
    return same, zero, parked_between, parked, gone_steps["1"], back_steps.get("1", 0)


def test_a_layer_that_comes_back_resumes_bit_for_bit(llama):
    kinds = [(0, "float32"), (0, "bfloat16"), (1, "bfloat16"), (2, "float32"), (3, "float32"), (3, "bfloat16")]
    for kind, reports in zip(kinds, run_cases(come_back, 2, [(llama, *kind, True) for kind in kinds])):
        for same, zero, parked_between, parked, gone, back in reports:
            assert same and not zero and parked_between, kind
            assert gone == back == 3, kind
            assert parked > 0, kind


def test_dropped_state_starts_from_zero(llama):
    stages = (0, 2, 3)
    for stage, reports in zip(stages, run_cases(come_back, 2, [(llama, stage, "float32", False) for stage in stages])):
        for same, zero, parked_between, parked, gone, back in reports:
            assert zero and not same and not parked_between, stage
            assert (gone, back, parked) == (3, 0, 0), stage


def select_often(model, stage):
    """Bytes of state and memory of the process over 50 selections, with a step between each."""
    rig = Rig(model, stage)
    history = []
    for round_ in range(50):
        selected = sorted({round_ % LAYERS, (round_ * 5 + 1) % LAYERS})
        rig.engine.reselect(selected)
        rig.train(1)
        gc.collect()
        hooks = sum(len(p._backward_hooks or {}) + len(getattr(p, "_post_accumulate_grad_hooks", None) or {})
                    for _, p in rig.table.all())  # fmt: skip
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * resource.getpagesize()
        history.append((rig.engine.optimizer_state_bytes(), rig.numel(selected), len(selected), hooks, resident))
    rig.close()
    return history


@pytest.mark.parametrize("stage", [0, 1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_fifty_selections_keep_to_the_formula_and_do_not_grow(llama, stage):
    for history in run_ranks(select_often, 2, llama, stage):
        for state_bytes, numel, layers, _, _ in history:
            assert state_bytes in expected_bytes(stage, "float32", numel, 2, layers + 1)
        assert len({hooks for *_, layers, hooks, _ in history if layers == 2}) == 1
        resident = [entry[-1] for entry in history]
        assert resident[-1] <= 1.02 * resident[9]


def probe_beside_training(model, stage):
    """Losses and weights of a run whose every step scores all layers, and of one that never does."""
    outcomes = []
    for scored in (False, True):
        rig = Rig(model, stage, accumulation=2)
        rig.engine.reselect([1, 4])
        scores = LayerScores(rig.table, "rms", rig.world.device) if scored else None
        outcomes.append((rig.train(3, scores), rig.layer_weights()))
        rig.engine.close()
    runtime.stop()
    (plain_losses, plain), (scored_losses, scored_weights) = outcomes
    return plain_losses, scored_losses, all(torch.equal(a, b) for a, b in zip(plain, scored_weights))


def test_fresh_scores_do_not_disturb_training(llama):
    stages = (0, 2, 3)
    for stage, reports in zip(stages, run_cases(probe_beside_training, 2, [(llama, stage) for stage in stages])):
        for plain, scored, same_weights in reports:
            assert plain == scored, stage
            assert same_weights, stage


def disagree():
    world = runtime.read_world()
    runtime.start(world, 60)
    try:
        verify_selection([1, 2 + world.rank], 6, world.device)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        runtime.stop()


def test_ranks_that_disagree_stop_with_names():
    for message in run_ranks(disagree, 2):
        assert message == "DistributedError: ranks chose different layers: rank 0: [1, 2]; rank 1: [1, 3]"


@pytest.mark.quick
def test_the_private_parts_of_deepspeed_are_there():
    import deepspeed

    from irtune.engine.deepspeed_private import check_version

    assert deepspeed.__version__.split("+")[0] == "0.19.8"
    check_version()
