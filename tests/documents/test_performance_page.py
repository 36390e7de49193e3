"""docs/performance.md shows what was measured."""

import json

import pytest

from benchmarks import growth
from benchmarks.speed import report as speed_report
from tests.support import ROOT

pytestmark = pytest.mark.quick
RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["speed-cpu", "speed-cpu-2-ranks"])
def test_the_tables_are_those_of_the_files(name):
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert speed_report.table(result).strip() in PAGE
    assert (RESULTS / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_growth_is_that_of_the_file():
    assert growth.table(json.loads((RESULTS / "growth-cpu.json").read_text(encoding="utf-8"))["points"]) in PAGE
