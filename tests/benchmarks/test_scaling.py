"""benchmarks/README.md says what benchmarks/scaling.py computes and what benchmarks/nodes.py measured."""

import json

import pytest

from benchmarks import nodes, scaling
from irtune.config import load_config
from irtune.memory import count
from tests.support import ROOT

pytestmark = pytest.mark.quick
PAGE = ROOT / "benchmarks/README.md"


def test_the_page_has_the_table():
    table = "\n".join(scaling.rows())
    assert table in PAGE.read_text(encoding="utf-8"), "out of date; run: python benchmarks/scaling.py"


@pytest.mark.parametrize("own", [False, True])
def test_shapes_are_those_of_the_model(own):
    config = load_config(["--config", str(scaling.RECIPE), "--data.path=corpus"])
    paper = scaling.parts(scaling.SHAPES[0], config, own, config.tuning.max_fraction)
    if own:
        config.adapter.type, config.adapter.dtype = "none", "model"
    model = count(config, slope=False, labels=[str(label) for label in range(scaling.LABELS)])
    assert paper.constant == model.constant
    assert [sum(layer) for layer in paper.layers] == [sum(layer) for layer in model.layers]
    assert (sum(paper.head), len(paper.selected)) == (sum(model.head), len(model.selected))
    assert (paper.weight_bytes, paper.trained_bytes) == (model.weight_bytes, model.trained_bytes)


def test_times_by_hand():
    machine = scaling.Machine()
    assert machine.seconds(450e9, 0, 8) == 1.0
    assert machine.seconds(400e9, 0, 16) == 1.0  # 8 adapters of 50 GB/s
    assert scaling.Machine(adapters=1).seconds(400e9, 0, 16) == 8.0
    assert machine.seconds(0, 1, 8) == pytest.approx(16e-6)
    assert machine.seconds(0, 3, 16) == pytest.approx(3 * (14 * 2e-6 + 2 * 10e-6))


def test_the_figures_of_two_nodes_are_those_that_were_measured():
    rows = json.loads((ROOT / "benchmarks/results/nodes-cpu.json").read_text(encoding="utf-8"))["cases"]
    text = PAGE.read_text(encoding="utf-8")
    for table in nodes.table(rows).split("\n\n"):
        assert table in text
    assert "DIFFERENT" not in text
