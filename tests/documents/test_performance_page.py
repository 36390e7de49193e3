"""docs/performance.md and benchmarks/README.md show what was measured."""

import json
from typing import Any

import pytest

from benchmarks import growth, serve
from benchmarks.speed import report as speed_report
from tests.support import ROOT

pytestmark = pytest.mark.quick
RESULTS = ROOT / "benchmarks" / "results"
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
# A row of docs/performance.md -> side of benchmarks/speed.
TRAINERS = {
    "irtune, method ir": "a",
    "irtune, all layers": "b",
    "transformers' Trainer with peft": "c",
    "the same with eager attention": "g",
    "the same with every example padded to 256 tokens": "d",
    "a bare PyTorch loop": "e",
}


def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["speed-cpu", "speed-cpu-2-ranks"])
def test_the_tables_are_those_of_the_files(name):
    assert speed_report.table(result(name)).strip() in BENCHMARKS
    assert (RESULTS / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_growth_is_that_of_the_file():
    assert growth.table(result("growth-cpu")["points"]) in BENCHMARKS


@pytest.mark.parametrize("name", ["serve-cpu", "serve-cpu-tiny"])
def test_loads_of_the_server_are_those_of_the_files(name):
    assert serve.table(result(name)["loads"]) in BENCHMARKS
    assert all(load["lost_or_wrong"] == 0 for load in result(name)["loads"])


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_short_table_is_that_of_the_files(trainer):
    one, two = (result(name)["sides"].get(TRAINERS[trainer]) for name in ("speed-cpu", "speed-cpu-2-ranks"))
    rates = [f"{side['examples_per_second']:.2f}" if side else "" for side in (one, two)]
    cells = [trainer, *rates, f"{one['peak_memory_bytes'] / 2**20:,.0f}"]
    assert f"| {' | '.join(cells)} |".replace("|  |", "| |") in PERFORMANCE
