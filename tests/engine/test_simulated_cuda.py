"""Training on a CUDA device that is not there (tests/support/simulated): it ends, agrees with the CPU, and its steps do
not wait."""

import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from irtune.engine import deepspeed_private
from irtune.engine.losses import cross_entropy
from irtune.selection.scores import LayerScores
from tests.support.ranks import run_cases
from tests.support.runs import losses, selections, train
from tests.support.simulated.client import needs_compiler, options_of
from tests.support.tiny import Rig, save_model, tiny_config

TOLERANCE = 1e-6  # of fp32 losses, absolute
STEPS = {"optim__max_steps": 6, "tuning__interval": 2, "run__log_every": 3, "run__eval_every": 6, "run__save_every": 3,
         "optim__micro_batch_size": 2, "optim__gradient_accumulation_steps": 2}  # fmt: skip
NF4 = {"model__quantization": "nf4"}
FP16 = {"model__dtype": "float16", "adapter__dtype": "model"}
RUNS = {  # name -> ZeRO stage, ranks, options
    "zero0": (0, 1, {}),
    "zero2": (2, 1, {}),
    "zero3": (3, 1, {}),
    "two ranks": (2, 2, {"optim__gradient_accumulation_steps": 1}),
    "nf4": (2, 1, NF4),
    "fp16": (2, 1, FP16),
}


@pytest.fixture(scope="module")
def cpu(llama, corpus, tmp_path_factory):
    """Folders of the CPU's runs under ZeRO 2, by quantization; other stages and splits over ranks are to equal them."""
    configs = {name: tiny_config(llama, corpus, tmp_path_factory.mktemp(name) / "run", **STEPS | more)
               for name, more in (("none", {}), ("nf4", NF4))}  # fmt: skip
    assert run_cases(train, 1, [(config,) for config in configs.values()]) == [[None]] * 2
    return {name: Path(config.run.output_dir) for name, config in configs.items()}


@pytest.fixture(scope="module")
def run_on_gpu(gpu, llama, corpus, tmp_path_factory):
    """Runs one of RUNS, or goes on with it; what was seen, and its folder."""
    folders = {}

    def run(name):
        stage, ranks, more = RUNS[name]
        folder = folders.setdefault(name, tmp_path_factory.mktemp(name.replace(" ", "-")))
        config = tiny_config(llama, corpus, folder / "unused", stage=stage, **STEPS | more)
        return gpu.run(options_of(config), folder, ranks), folder / "run"

    return run


@needs_compiler
@pytest.mark.parametrize("name", RUNS)
def test_a_run_equals_the_cpus_and_its_steps_do_not_wait(run_on_gpu, cpu, name):
    seen, run = run_on_gpu(name)
    wanted = cpu["nf4" if name == "nf4" else "none"]
    assert seen.results["steps"] == 6 and seen.results["peak_memory_bytes"] > 0
    assert selections(run) == selections(wanted)
    if name == "fp16":  # has 11 bits, and soon goes another way
        assert losses(run)[0] == pytest.approx(losses(wanted)[0], abs=5e-3)
    else:
        assert losses(run) == pytest.approx(losses(wanted), abs=TOLERANCE)
    assert seen.results["skipped_steps"] <= (name == "fp16")  # while its loss scale is looked for
    waits = seen.within_steps()
    # DeepSpeed's ZeRO 3 reads on the host in every step, and so does fp16, whose loss scale follows what the host has
    # read. Both show that waits are seen at all.
    assert bool(waits) == (name in ("zero3", "fp16")), waits
    rebuilt = [what for found in seen.waits for what, place, _ in found if "reselect" in place]
    assert not [what for what in rebuilt if "empty_cache" in what]


@needs_compiler
def test_a_run_is_resumed(run_on_gpu):
    """Goes on with the run under ZeRO 2 from its checkpoint in the middle."""
    whole = losses(run_on_gpu("zero2")[1])
    run = run_on_gpu("zero2")[1]
    (run / "checkpoints" / "latest").write_text("step_3")
    (run / "results.json").unlink()
    seen, run = run_on_gpu("zero2")
    assert seen.results["steps"] == 6
    assert losses(run) == whole


def scores_of_small_losses():
    """Scores of a first selection in fp16, of a loss and of one that is 1e5 times smaller."""
    with tempfile.TemporaryDirectory() as folder:
        rig = Rig(save_model(Path(folder)), 2, "float16")
    found = []
    batch = {name: tensor.to(rig.world.device) for name, tensor in rig.batch(0).items()}
    for size in (1.0, 1e-5):
        rig.engine.loss = lambda *batch, size=size: cross_entropy(*batch) * size
        scores = LayerScores(rig.table, "rms", rig.world.device)
        factor = 1 / rig.engine.probe_scale
        with rig.engine.reaching_all_layers(), scores.micro_batch(batch["attention_mask"], all_layers=True,
                                                                  factor=factor):  # fmt: skip
            rig.engine.probe(batch, backward=True)
        found.append(scores.reduce())
    rig.close()
    return found


@needs_compiler
def test_a_probe_in_fp16_sees_small_gradients(gpu, tmp_path):
    """Unscaled, those of the small loss would be below fp16's smallest number, and all scores 0."""
    plain, small = gpu.call(scores_of_small_losses, tmp_path).results
    assert min(plain) > 0
    assert [1e5 * score for score in small] == pytest.approx(plain, rel=0.05)


@pytest.mark.quick
def test_deepspeed_does_not_ask_nvml_for_memory(monkeypatch):
    """It would take CUDA_VISIBLE_DEVICES for numbers."""
    nvml = Mock(side_effect=ValueError("invalid literal for int() with base 10: 'MIG-f3c7'"))
    accelerator = Mock(available_memory=nvml, device_name=lambda: "cuda")
    monkeypatch.setattr(deepspeed_private, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 10)
    with deepspeed_private.asking_torch_for_memory():
        assert accelerator.available_memory() == accelerator.available_memory(0) == 25
    assert accelerator.available_memory is nvml
