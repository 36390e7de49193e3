"""benchmarks/growth.py: that its points are what they say."""

import pytest

from benchmarks import growth
from benchmarks.growth import Point
from tests.support.ranks import run_ranks


@pytest.mark.quick
@pytest.mark.parametrize("layers", [6, 12, 24, 32, 48])
def test_selections_are_a_quarter_of_the_layers_from_the_middle_upwards(layers):
    first, second = growth._selections(layers)
    assert first != second and len(first) == len(second) == max(2, layers // 4)
    assert min(first) == min(second) == layers // 2 and max(first + second) < layers


def _measured(folder):
    from irtune.distributed import runtime

    runtime.start(runtime.read_world(), 60)
    found = [growth._measured(Point(1, stage, 6, 16), folder) for stage in (2, 3)]
    runtime.stop()
    return found


def test_a_point_of_each_kind_is_measured(tmp_path):
    found = run_ranks(_measured, 1, tmp_path)[0]
    assert [point["stage"] for point in found] == [2, 3]
    assert all(point["step"] > 0 and point["selection"] > 0 for point in found)
    assert growth.table(found).count("\n") == 4
