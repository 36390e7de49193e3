"""Damaged checkpoints are recognised and named, and the one before is used."""

import json
import logging
import shutil

import pytest
import torch

from irtune.errors import CheckpointError
from irtune.train.checkpoint import MANIFEST, OPTIMIZER, STATE, TRAINABLE, Checkpoints, find_damage
from tests.support.ranks import run_ranks
from tests.support.runs import losses, selections, train
from tests.support.tiny import tiny_config

quick = pytest.mark.quick


def save(folder, steps=(1, 2, 3)):
    checkpoints = Checkpoints(folder, keep_last=9)
    for step in steps:
        tensors = {"weight": torch.full((3,), float(step))}
        checkpoints.save(step, tensors, {"weight/exp_avg": torch.zeros(3)}, {"some": "state"}, best=step == 1)
    return checkpoints


def truncate(file):
    file.write_bytes(file.read_bytes()[:-5])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


DAMAGES = {
    "truncated": (truncate, "bytes, not"),
    "flipped": (flip, "a different checksum"),
    "missing": (lambda file: file.unlink(), "is missing"),
}


@quick
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [TRAINABLE, OPTIMIZER, STATE])
def test_damage_is_named_and_the_checkpoint_before_is_used(tmp_path, caplog, damage, name):
    checkpoints = save(tmp_path)
    assert checkpoints.newest_whole() == tmp_path / "step_3"
    DAMAGES[damage][0](tmp_path / "step_3" / name)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest_whole() == tmp_path / "step_2"
    assert "step_3" in caplog.text and name in caplog.text and DAMAGES[damage][1] in caplog.text


@quick
@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"state.json": 3}', '{"../../x": {"bytes": 1, "sha256": "0"}}', None]
)
def test_a_damaged_manifest(tmp_path, text):
    checkpoints = save(tmp_path)
    manifest = tmp_path / "step_3" / MANIFEST
    manifest.unlink() if text is None else manifest.write_text(text)
    assert checkpoints.newest_whole() == tmp_path / "step_2"


@quick
def test_a_manifest_cannot_lead_outside_its_folder(tmp_path):
    save(tmp_path)
    manifest = tmp_path / "step_3" / MANIFEST
    files = json.loads(manifest.read_text()) | {"../step_2/state.json": {"bytes": 1, "sha256": "0"}}
    manifest.write_text(json.dumps(files))
    assert "is missing" in str(find_damage(tmp_path / "step_3"))


@quick
def test_when_all_are_damaged_each_is_named(tmp_path):
    checkpoints = save(tmp_path)
    for step in (1, 2, 3):
        flip(tmp_path / f"step_{step}" / TRAINABLE)
    with pytest.raises(CheckpointError, match=r"step_3: .*step_2: .*step_1: .*remove the folder"):
        checkpoints.newest_whole()


@quick
def test_a_pointer_that_is_damaged_or_leads_nowhere(tmp_path, caplog):
    checkpoints = save(tmp_path)
    (tmp_path / "latest").write_text("../../etc")
    assert checkpoints.newest_whole() == tmp_path / "step_3"
    (tmp_path / "latest").write_text("step_2")  # gone back to: step_3 belongs to another story
    assert checkpoints.newest_whole() == tmp_path / "step_2"
    shutil.rmtree(tmp_path / "step_2")
    assert checkpoints.newest_whole() == tmp_path / "step_1"
    assert Checkpoints(tmp_path / "nothing", 1).newest_whole() is None


def test_a_run_goes_on_from_the_checkpoint_before_and_ends_the_same(llama, corpus, tmp_path):
    options = {"run__eval_every": 2, "run__keep_last": 9}
    config = tiny_config(llama, corpus, tmp_path / "run", **options)
    assert run_ranks(train, 2, config) == [None, None]
    wanted = losses(tmp_path / "run"), selections(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_6")
    (tmp_path / "run/checkpoints/latest").write_text("step_4")
    flip(tmp_path / "run/checkpoints/step_4" / OPTIMIZER)
    assert run_ranks(train, 2, config) == [None, None]
    assert (losses(tmp_path / "run"), selections(tmp_path / "run")) == wanted
