"""Quantised base weights under ZeRO, where training leaves them bit for bit alone; and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from irtune.adapters.build import add_adapters
from irtune.config import AdapterConfig, Config, ModelConfig, load_config
from irtune.config.checks import check_config
from irtune.config.deepspeed_json import read_engine_json
from irtune.errors import ConfigError, ModelError
from irtune.models.anatomy import is_linear
from irtune.models.quantization import is_quantized
from tests.support.quantized import bits, load
from tests.support.ranks import run_ranks
from tests.support.tiny import Rig, save_model

quick = pytest.mark.quick


# ----- under ZeRO -----

LESS = 3  # layers: ZeRO 3 takes its time for every module
SELECTIONS = [[1], [0, 2], [2]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("small"), layers=LESS)


def train(model: Path, cases: list[tuple[int, str, dict]]) -> list[dict]:
    """For each stage, number format and options of a rig: losses, who moved, and what the base holds."""
    reports = []
    for stage, dtype, options in cases:
        rig = Rig(model, stage, dtype, **options)
        trained = {name for name, _ in rig.table.all()}
        constant = [(n, p) for n, p in rig.engine.module.named_parameters() if n not in trained]
        packed = [module.weight for module in rig.engine.module.modules() if is_quantized(module)]
        report = {"losses": [], "moved": [], "modules": len(packed)}
        report["held"] = sum(getattr(p, "ds_tensor", p).numel() * p.element_size() for p in packed)
        with rig.engine._whole([parameter for _, parameter in constant]):
            base = {name: bits(parameter) for name, parameter in constant}
        for selected in SELECTIONS:
            rig.engine.reselect(selected)
            before = rig.layer_weights()
            rig.steps = 0  # the same two steps every time: what is learnt is seen
            report["losses"].append(rig.train(2))
            after = rig.layer_weights()
            report["moved"].append([n for n in range(LESS + 1) if not torch.equal(before[n], after[n])])
        with rig.engine._whole([parameter for _, parameter in constant]):
            report["base is the same"] = {name: bits(parameter) for name, parameter in constant} == base
            report["packed bytes"] = sum(p.numel() * p.element_size() for p in packed)
        report["released"] = stage != 3 or not any(p.numel() for p in packed)
        reports.append(report)
        rig.engine.close()
    return reports


def check(report: dict, weights: int, quantization: str, share: int = 1) -> None:
    """Selected layers and the head have moved, others and the base have not by a bit, and something was learnt."""
    assert report["moved"] == [[*selected, LESS] for selected in SELECTIONS]
    assert report["base is the same"] and report["released"]
    assert report["modules"] == 7 * LESS
    assert report["packed bytes"] == weights // (2 if quantization == "nf4" else 1)
    assert report["held"] == report["packed bytes"] // share
    assert sum(report["losses"][-1]) < 0.9 * sum(report["losses"][0])


def layer_weights(folder: Path) -> int:
    """Elements of all linear modules of the layers."""
    classifier = load(folder, "none")
    layers = classifier.model.get_submodule(classifier.anatomy.layers)
    return sum(module.weight.numel() for module in layers.modules() if is_linear(module))


def test_a_replicated_base_on_zero_0_to_2(small):
    cases = [(0, "float32", "nf4", False), (2, "float32", "nf4", True), (1, "mixed", "nf4", False),
             (2, "bfloat16", "nf4", False), (0, "mixed", "int8", False), (1, "bfloat16", "int8", False),
             (2, "float32", "int8", True)]  # fmt: skip
    rigs = [(stage, dtype, {"quantization": kind, "recompute": again}) for stage, dtype, kind, again in cases]
    reports = run_ranks(train, 2, small, rigs)
    weights = layer_weights(small)
    for report in reports:
        for (_, _, kind, _), each in zip(cases, report):
            check(each, weights, kind)
        for first, second in zip(report[0]["losses"], report[1]["losses"]):
            assert second == pytest.approx(first, rel=1e-5)
    assert reports[0] == reports[1]


@pytest.mark.slow
def test_nf4_in_pieces_on_zero_3(small):
    """The same losses as ZeRO 0, also after layers are chosen anew; each rank holds half of the packed bits."""
    dora = {"adapter": {"type": "dora", "r": 4}}
    offload = {"recompute": True, "zero": {"offload_param": {"device": "cpu", "pin_memory": False}}}
    cases = [(0, "float32", {}), (3, "float32", {}), (3, "float32", offload), (0, "float32", dora),
             (3, "float32", dora), (0, "mixed", {}), (3, "mixed", {})]  # fmt: skip
    cases = [(stage, dtype, options | {"quantization": "nf4"}) for stage, dtype, options in cases]
    weights = layer_weights(small)
    for report in run_ranks(train, 2, small, cases):
        for (stage, _, _), each in zip(cases, report):
            check(each, weights, "nf4", share=2 if stage == 3 else 1)
        losses = [[loss for pair in each["losses"] for loss in pair] for each in report]
        whole, pieces, offloaded, dora_whole, dora_pieces, mixed, mixed_pieces = losses
        assert pieces == pytest.approx(whole, rel=1e-5)
        assert offloaded == pytest.approx(whole, rel=1e-5)
        assert dora_pieces == pytest.approx(dora_whole, rel=1e-5)
        # In bf16 Adam's first step turns rounding into signs; unquantised bases differ as much.
        assert mixed_pieces[0] == mixed[0]
        assert mixed_pieces == pytest.approx(mixed, rel=0.05)


# ----- refusals -----


@quick
@pytest.mark.parametrize("kind", ["none", "bitfit", "spafit", "pissa"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_types_that_need_the_weights_themselves_are_refused(llama, kind, quantization):
    adapter = AdapterConfig(type=kind, dtype="model")
    config = Config(model=ModelConfig(quantization=quantization), adapter=adapter)
    said = [line for line in check_config(config) if "quantization" in line]
    assert len(said) == 1 and f"adapter.type {kind}" in said[0] and "set model.quantization to none" in said[0]
    with pytest.raises(ConfigError, match=f"adapter.type {kind} needs model.quantization none"):
        add_adapters(load(llama, quantization), adapter)


@quick
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "bottleneck", "prefix", "ltuning-prefix"])
def test_types_beside_constant_weights_are_accepted(kind):
    for quantization in ("nf4", "int8"):
        config = Config(model=ModelConfig(quantization=quantization), adapter=AdapterConfig(type=kind))
        assert not [line for line in check_config(config) if "quantization" in line]


@quick
def test_what_zero_3_cannot_cut_is_refused(tmp_path):
    def said(quantization: str, **zero: object) -> list[str]:
        file = tmp_path / "engine.json"
        file.write_text(json.dumps({"zero_optimization": zero}))
        try:
            config = load_config(["--data.path=x", f"--deepspeed={file}", f"--model.quantization={quantization}"])
        except ConfigError as error:
            return error.problems
        return read_engine_json(config, 2)[1]

    (problem,) = said("int8", stage=3)
    assert "model.quantization int8 does not go with zero_optimization.stage 3" in problem
    assert "set model.quantization to nf4, or --deepspeed to a file with stage 0, 1 or 2" in problem
    (problem,) = said("nf4", stage=3, zero_quantized_weights=True)
    assert "zero_optimization.zero_quantized_weights would round the packed weights" in problem
    assert said("nf4", stage=3) == said("int8", stage=2) == said("none", stage=3, zero_quantized_weights=True) == []


@quick
def test_a_model_that_is_quantised_already_is_refused(tmp_path, llama):
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((llama / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="holds weights that are quantised already; accepted: weights in 16 or 32"):
        load(tmp_path, "nf4")
