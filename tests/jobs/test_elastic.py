"""optim.global_batch_size: the same global batch on any number of ranks."""

import shutil

import pytest
import yaml

from irtune.commands.validate import validate
from irtune.config import load_config
from irtune.config.batch_size import accumulation, with_accumulation
from irtune.config.deepspeed_json import read_engine_json
from irtune.config.schema import OptimConfig
from irtune.errors import ConfigError
from tests.support.ranks import run_ranks
from tests.support.runs import launch, losses, selections, train
from tests.support.tiny import tiny_config


@pytest.mark.quick
def test_accumulation_by_hand():
    def found(total, micro, ranks, given=1):
        return accumulation(OptimConfig(global_batch_size=total, micro_batch_size=micro,
                                        gradient_accumulation_steps=given), ranks)  # fmt: skip

    assert found(32, 4, 2) == (4, []) and found(32, 4, 8) == (1, []) and found(32, 4, 1, 8) == (8, [])
    assert found(None, 4, 2, 3) == (3, [])
    _, (said,) = found(10, 4, 2)
    assert (
        "not a multiple of optim.micro_batch_size 4 x 2 rank(s); accepted: 8 or 16, or optim.micro_batch_size 5 or 1"
        in said
    )
    _, (said,) = found(2, 4, 1)
    assert "accepted: 4, or optim.micro_batch_size 2 or 1" in said
    _, (said,) = found(9, 4, 2)
    assert said.endswith("accepted: 8 or 16")
    _, (said,) = found(32, 4, 2, 3)
    assert (
        "gradient_accumulation_steps is 3, but optim.global_batch_size 32 on 2 rank(s)" in said and "makes it 4" in said
    )


@pytest.mark.quick
def test_settings_plan_and_written_configuration_follow_it(llama, corpus, tmp_path):
    config = tiny_config(llama, corpus, tmp_path / "run", optim__global_batch_size=16)
    for ranks, steps in ((1, 4), (2, 2), (4, 1)):
        settings, problems = read_engine_json(config, ranks)
        assert not problems
        assert (settings["gradient_accumulation_steps"], settings["train_batch_size"]) == (steps, 16)
        assert with_accumulation(config, ranks).optim.gradient_accumulation_steps == steps
        found = validate(config, ranks)["batch"]
        assert found["examples_per_step"] == 16 and found["gradient_accumulation_steps"] == steps
    with pytest.raises(ConfigError, match="x 3 rank"):
        validate(config, 3)


def test_fewer_ranks_go_on_with_the_same_global_batch(llama, corpus, tmp_path):
    options = {"optim__global_batch_size": 8, "run__eval_every": 2, "run__keep_last": 9}
    whole = launch(tiny_config(llama, corpus, tmp_path / "whole", **options), 2)
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints/step_6")
    (cut / "checkpoints/latest").write_text("step_4")
    (cut / "checkpoints/best").write_text("step_4")
    config = tiny_config(llama, corpus, cut, **options)
    launch(config, 1)
    assert losses(cut) == losses(whole), "bit for bit: a mean of two is the same sum, halved"
    assert selections(cut) == selections(whole)
    written = yaml.safe_load((cut / "config.yaml").read_text())["optim"]
    assert (written["global_batch_size"], written["gradient_accumulation_steps"]) == (8, 1), "for any number of ranks"
    assert load_config(["--config", str(cut / "config.yaml")]) == config
    (said,) = run_ranks(train, 1, tiny_config(llama, corpus, cut, optim__global_batch_size=12))
    assert "optim.micro_batches_per_step was 2 and is 3" in said
