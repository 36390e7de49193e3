"""python -m irtune doctor: what there is, and what is wrong."""

import json
import os
import subprocess
import sys

import pytest

from irtune import cli
from irtune.commands import doctor


@pytest.mark.quick
def test_a_machine_alone(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    status = cli.main(["doctor", "--ranks", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"].startswith("2.") and "gloo" in found["backends"]
    (node,) = found["nodes"]
    assert any("127.0.0.1" in one["addresses"] for one in node["interfaces"])
    assert found["ranks"] == 1 and found["all_reduce"] == []
    assert status == (2 if found["problems"] else 0)


@pytest.mark.quick
def test_what_is_wrong_is_said(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    real = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.0.1" if name == "deepspeed" else real(name))
    assert cli.main(["doctor", "--ranks", "1"]) == 2
    out = capsys.readouterr().out
    assert "problem: GLOO_SOCKET_IFNAME is 'nowhere0', but the interfaces that are up are " in out
    assert "problem: deepspeed is 0.0.1, and requirements.txt wants ==0.19.8" in out
    assert cli.main(["doctor", "--ranks", "0"]) == 2
    assert "--ranks: '0'; accepted: a whole number from 1 to 1,024" in capsys.readouterr().err


@pytest.mark.quick
def test_what_a_recipe_should_say_on_this_machine(capsys):
    old, new, large = (16 * 2**30, False), (24 * 2**30, True), (80 * 2**30, True)
    assert doctor.suggestions([], {"avx2"})[1] == "model.dtype float32: this processor does not compute in bfloat16"
    assert len(doctor.suggestions([], {"avx2", "amx_bf16"})) == len(doctor.suggestions([], ())) == 1
    float16, small = doctor.suggestions([old], ())
    assert float16.startswith("model.dtype float16") and "model.quantization nf4" in small
    assert doctor.suggestions([new], ()) == ["8B models: model.dtype bfloat16 with model.gradient_checkpointing true"]
    checkpointing, several = doctor.suggestions([large, large], ())
    assert "gradient_checkpointing false" in checkpointing and "deepspeed --num_gpus 2" in several
    cli.main(["doctor", "--ranks", "1"])
    assert "suggestion: " in capsys.readouterr().out


def test_it_measures_between_ranks():
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}
    done = subprocess.run([sys.executable, "-m", "irtune", "doctor", "--json"], capture_output=True, text=True,
                          env=environment, timeout=170, check=False)  # fmt: skip
    found = json.loads(done.stdout)
    assert found["ranks"] == 2 and found["used_backend"] == "gloo", found["problems"]
    assert [row["bytes"] for row in found["all_reduce"]] == [128, 4 * 655_360, 4 * 6_553_600]
    times = [row["seconds"] for row in found["all_reduce"]]
    assert all(seconds > 0 for seconds in times) and times[0] < times[2], times  # 2.6 MB may take as long as 128 bytes
    assert all(row["bytes_per_second"] == pytest.approx(row["bytes"] / row["seconds"]) for row in found["all_reduce"])
