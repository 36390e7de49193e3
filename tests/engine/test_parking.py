"""Parked optimizer state: bit for bit, in few buffers that torch hardly rounds, and without a host that waits."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from irtune.engine.parking import Parking, pinned_bytes, pinned_pieces
from irtune.engine.shards import StepState
from tests.support.simulated.client import needs_compiler


@pytest.mark.quick
@given(st.integers(1, 2**40))
@example(2**20 + 1)
@example(2**21 - 1)
def test_torchs_powers_of_two_cost_little(elements):
    sizes = pinned_pieces(elements)
    assert sum(sizes) == elements and len(sizes) <= 5
    assert 4 * elements <= pinned_bytes(elements) <= 4 * elements * 17 / 16


@pytest.mark.quick
def test_bytes_that_are_worked_out_by_hand():
    assert pinned_pieces(0) == [] and pinned_pieces(1024) == [1024]
    assert pinned_pieces(1025) == [1024, 1]
    assert pinned_pieces(2000) == [2000] and pinned_bytes(2000) == 4 * 2048  # 48 more are less than a sixteenth
    assert pinned_pieces(1600) == [1024, 512, 64] and pinned_bytes(1600) == 4 * 1600


def states(device: str) -> dict[str, list[StepState]]:
    """Of three layers: a flat shard, two parameters of which one lies transposed in memory, and one of no elements."""
    torch.manual_seed(3)
    two = [torch.randn(7, 11), torch.randn(13, 5).T]
    layers = {"flat": [torch.randn(1337)], "two": two, "none": [torch.zeros(0)]}
    return {
        key: [StepState({"exp_avg": t.to(device), "exp_avg_sq": t.to(device) * 2}, 3.0 + n) for n, t in enumerate(one)]
        for key, one in layers.items()
    }


def same(found: list[StepState], wanted: list[StepState]) -> bool:
    return all(
        one.step == other.step
        and one.tensors.keys() == other.tensors.keys()
        and all(torch.equal(one.tensors[n].cpu(), t.cpu()) for n, t in other.tensors.items())
        and all(one.tensors[n].stride() == t.stride() for n, t in other.tensors.items())
        for one, other in zip(found, wanted, strict=True)
    )


def park_and_take(device: str = "cuda") -> dict:
    """Whether states are the same on the host and when they are back, where, and in how many bytes of host memory."""
    kept, parking = states(device), Parking(torch.device(device))
    seen: dict = {}
    for key, one in states(device).items():
        parking.put(key, one)
        for state in one:  # they may be used again at once
            state.tensors.clear()
    seen["bytes"], seen["unknown"] = parking.nbytes(), parking.take("unknown")
    back = {key: parking.take(key) for key in ("flat", "none")}
    seen["keys"] = parking.keys()
    seen["where"] = {tensor.device.type for one in back.values() for state in one for tensor in state.tensors.values()}
    seen["where"] = sorted(seen["where"])
    waited_before = _waits()
    seen["host"] = same(parking.on_host("two"), kept["two"])
    seen["waits"] = [waited_before, _waits() - waited_before]
    seen["back"] = all(same(one, kept[key]) for key, one in back.items())
    return seen | {"left": parking.nbytes(), "peak": parking.peak}


def _waits() -> int:
    """Places so far at which Parking's host would have waited for the simulated GPU."""
    import sys

    device = sys.modules.get("tests.support.simulated.device")
    return sum("engine/parking.py" in place for _, place in device.waits) if device else 0


BYTES = 2 * 4 * (1337 + 77 + 65)


@pytest.mark.quick
def test_a_cpus_state_comes_back():
    seen = park_and_take("cpu")
    assert seen == {"bytes": BYTES, "unknown": [], "keys": ["two"], "where": ["cpu"], "host": True, "waits": [0, 0],
                    "back": True, "left": 2 * 4 * 142, "peak": BYTES}  # fmt: skip


@needs_compiler
def test_a_gpus_state_comes_back_and_the_host_waits_only_to_read_it(gpu, tmp_path):
    seen = gpu.call(park_and_take, tmp_path).results
    rounded = pinned_bytes(2 * 1337) + pinned_bytes(2 * 142)
    assert BYTES < rounded < BYTES * 17 / 16
    assert seen == {"bytes": rounded, "unknown": [], "keys": ["two"], "where": ["cuda"], "host": True, "waits": [0, 1],
                    "back": True, "left": pinned_bytes(2 * 142), "peak": rounded}  # fmt: skip
