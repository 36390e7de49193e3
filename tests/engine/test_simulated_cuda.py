"""Training on a CUDA device that is not there (tests/support/simulated): it ends, agrees with the CPU, and its steps do
not wait."""

import pytest

from tests.support.runs import launch, losses, selections
from tests.support.simulated.client import Server, Simulated, needs_compiler, options_of, serving
from tests.support.tiny import tiny_config

pytestmark = needs_compiler
TOLERANCE = 1e-6  # of fp32 losses, absolute
SHORT = {"optim__max_steps": 6, "tuning__interval": 2, "run__log_every": 3, "run__eval_every": 6}


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    with serving(tmp_path_factory.getbasetemp()) as server:
        yield server


def on_gpu(gpu: Server, llama, corpus, folder, stage=2, ranks=1, **more) -> Simulated:
    config = tiny_config(llama, corpus, folder / "cpu", stage=stage, **SHORT | more)
    return gpu.run(options_of(config), folder / "gpu", ranks)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_equals_the_cpus_and_its_steps_do_not_wait(gpu, llama, corpus, tmp_path, stage):
    seen = on_gpu(gpu, llama, corpus, tmp_path, stage)
    cpu = launch(tiny_config(llama, corpus, tmp_path / "cpu", stage=stage, **SHORT), 1)
    run = tmp_path / "gpu" / "run"
    assert selections(run) == selections(cpu)
    assert losses(run) == pytest.approx(losses(cpu), abs=TOLERANCE)
    assert seen.results["peak_memory_bytes"] > 0
    # DeepSpeed's ZeRO 3 reads on the host in every step, which shows that waits are seen at all.
    assert not [place for what, place, _ in seen.waits[0] if "empty_cache" in what and "reselect" in place]
    assert bool(seen.within_steps()) == (stage == 3), seen.within_steps()


def test_two_ranks_under_zero_2(gpu, llama, corpus, tmp_path):
    on_gpu(gpu, llama, corpus, tmp_path, 2, ranks=2)
    cpu = launch(tiny_config(llama, corpus, tmp_path / "cpu", **SHORT), 2)
    assert selections(tmp_path / "gpu" / "run") == selections(cpu)
    assert losses(tmp_path / "gpu" / "run") == pytest.approx(losses(cpu), abs=TOLERANCE)


@pytest.mark.parametrize(
    "more",
    [
        {"model__quantization": "nf4", "model__dtype": "bfloat16"},
        {"model__dtype": "float16", "adapter__dtype": "model"},
    ],
    ids=["nf4", "fp16"],
)
def test_other_number_formats_end(gpu, llama, corpus, tmp_path, more):
    seen = on_gpu(gpu, llama, corpus, tmp_path, 2, **more)
    assert seen.results["steps"] == 6


def test_a_run_is_resumed(gpu, llama, corpus, tmp_path):
    half = {"optim__schedule": "constant", "run__save_every": 3}
    on_gpu(gpu, llama, corpus, tmp_path, 2, **half)
    whole = losses(tmp_path / "gpu" / "run")
    latest = tmp_path / "gpu" / "run" / "checkpoints" / "latest"
    latest.write_text("step_3")
    (tmp_path / "gpu" / "run" / "results.json").unlink()
    on_gpu(gpu, llama, corpus, tmp_path, 2, **half)
    assert losses(tmp_path / "gpu" / "run") == whole
