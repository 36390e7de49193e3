"""Trackers: each against its real package, offline or in a folder; and the line that tells of progress."""

import itertools
import json
import struct
import sys
import types
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from irtune import cli
from irtune.errors import ConfigError
from irtune.tracking import tracker as tracking
from irtune.tracking import writers
from irtune.tracking.tracker import Tracker
from tests.tracking.test_tensorboard import selection, train_record

BLOCK = 2**15
CONFIG = "optim:\n  lr: 0.5\ndata:\n  path: https://me:hunter2hunter2@host/x\n"


def evaluation(value: float) -> dict:
    names = ("loss", "accuracy", "macro_precision", "macro_recall", "macro_f1", "auprc")
    per_class = {name: {"f1": value, "examples": 2} for name in ("a", "b")}
    return dict.fromkeys(names, value) | {"per_class": per_class, "confusion_matrix": [[1, 1], [0, 2]]}


def a_run(folder, *names: str) -> None:
    """Two steps, a session that continues at step 1, and the test split of the first step at the end."""
    (folder / "config.yaml").write_text(CONFIG)
    first = Tracker(folder, active=True, start_step=0, max_steps=2, trackers=names)
    first.selection(selection(0, [1], [1.0, 2.0, None]))
    first.advance(1)
    first.train(train_record(1))
    first.evaluation(1, "dev", evaluation(0.25))
    first.close()
    second = Tracker(folder, active=True, start_step=1, max_steps=2, trackers=names)
    second.advance(2)
    second.train(train_record(2) | {"loss": 3.0})
    second.evaluation(2, "dev", evaluation(0.5))
    second.evaluation(1, "test", evaluation(0.75))
    for writer in second.writers:
        writer.outcome({"lr": 0.5}, {"final/test_macro_f1": 0.75}, 2)
    second.close()


def needs(package: str):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed: irtune[trackers] has it")


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of an offline run: LevelDB's format of logs, after seven bytes."""
    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = BLOCK - place % BLOCK
        if left < 7:
            place += left
            continue
        size, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


@needs("wandb")
@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    a_run(tmp_path, "wandb")
    from wandb.proto import wandb_internal_pb2

    key = json.loads((tmp_path / "trackers.json").read_text())["key"]
    files = sorted(tmp_path.glob(f"wandb/offline-run-*/run-{key}.wandb"))
    assert len(files) == 2  # two sessions of one run
    rows, summary, config = [], {}, {}
    for data in itertools.chain.from_iterable(map(wandb_records, files)):
        record = wandb_internal_pb2.Record.FromString(data)
        values = {one.key or ".".join(one.nested_key): one.value_json for one in record.history.item}
        rows += [{name: json.loads(value) for name, value in values.items()}] if values else []
        summary |= {one.key: json.loads(one.value_json) for one in record.summary.update if one.key}
        config |= {one.key: json.loads(one.value_json) for one in record.run.config.update}
    told = {(row["step"], name): value for row in rows for name, value in row.items() if "step" in row}
    assert told[1, "dev/macro_f1"] == 0.25 and told[2, "dev/macro_f1"] == 0.5 and told[1, "test/macro_f1"] == 0.75
    assert told[2, "train/loss"] == 3.0 and told[0, "layer_score/01"] == 2.0
    assert summary["final/test_macro_f1"] == 0.75
    assert config["optim"] == {"lr": 0.5} and "hunter2" not in json.dumps(config)
    assert list(tmp_path.glob("wandb/*/files/media/images/**/*confusion_matrix*.png"))


@needs("mlflow")
@pytest.mark.slow
def test_mlflow_in_the_folder(tmp_path):
    import mlflow

    mlflow.set_tracking_uri(None)
    a_run(tmp_path, "mlflow")
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("irtune").experiment_id])  # one, though it was resumed
    assert run.info.status == "FINISHED" and run.data.params["optim.lr"] == "0.5"
    assert "hunter2" not in json.dumps(run.data.params)
    history = {(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "dev/macro_f1")}
    assert history == {(1, 0.25), (2, 0.5)}
    assert run.data.metrics["final/test_macro_f1"] == 0.75 and run.data.metrics["test/macro_f1"] == 0.75
    names = [file.path for file in client.list_artifacts(run.info.run_id, "dev")]
    assert "dev/confusion_matrix_2.png" in names


@needs("trackio")
@pytest.mark.slow
def test_trackio_on_this_machine(tmp_path, monkeypatch):
    if "trackio" not in sys.modules:
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    a_run(tmp_path, "trackio")
    storage = import_module("trackio.sqlite_storage").SQLiteStorage
    (run,) = [run for run in import_module("trackio").Api().runs("irtune") if run.name.startswith(tmp_path.name)]
    rows = storage.get_logs("irtune", run.name, run_id=run.id)
    assert {(1, 0.25), (2, 0.5)} <= {(row.get("step"), row.get("dev/macro_f1")) for row in rows}
    assert [row["final/test_macro_f1"] for row in rows if "final/test_macro_f1" in row] == [0.75]
    assert {row["step"] for row in rows if "dev/confusion_matrix" in row} == {1, 2}
    assert len(list((tmp_path / "trackio").rglob("*.png"))) >= 2 or "trackio" in sys.modules
    assert run.config["optim"] == {"lr": 0.5} and "hunter2" not in json.dumps(run.config)


@pytest.mark.quick
def test_a_tracker_without_its_package_is_named_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb, mlflow is not installed; pip install 'irtune\[trackers\]'"):
        writers.check_installed(["tensorboard", "wandb", "mlflow"])
    options = ["--data.path", str(tmp_path), "--run.output_dir", str(tmp_path / "run"), "--run.trackers"]
    assert cli.main(["train", *options, "[trackio]"]) == 2
    assert "trackio is not installed; pip install 'irtune[trackers]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert cli.main(["train", *options, "[tensorboard, tensorboard]"]) == 2
    assert "accepted: a list of tensorboard, wandb, mlflow, trackio, each at most once" in capsys.readouterr().err


@pytest.mark.quick
def test_a_tracker_that_cannot_start_says_why(tmp_path, monkeypatch):
    fails = types.SimpleNamespace(open_writer=lambda session: (_ for _ in ()).throw(OSError("no login")))
    monkeypatch.setitem(sys.modules, "irtune.tracking.writers.wandb_writer", fails)
    with pytest.raises(ConfigError, match=r"run\.trackers: wandb cannot start: no login"):
        Tracker(tmp_path, active=True, start_step=0, max_steps=2, trackers=["tensorboard", "wandb"])


@pytest.mark.quick
def test_a_progress_line_has_time_left_loss_and_the_dev_metric(tmp_path, monkeypatch):
    clock, said = [0.0], []
    monkeypatch.setattr(tracking, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(tracking.pictures, "rgb", lambda figure: np.zeros((2, 2, 3), dtype=np.uint8))
    tracker = Tracker(tmp_path, active=True, start_step=10, max_steps=110, trackers=[])
    monkeypatch.setattr(tracker, "say", said.append)
    clock[0] = 30.0  # 10 steps in 30 s: the other 90 take 270 s
    tracker.train(train_record(20))
    tracker.evaluation(20, "dev", evaluation(0.25))
    clock[0] = 60.0
    tracker.train(train_record(30))
    tracker.close()
    assert said[0].endswith("1 tokens/s  04:30 left")
    assert said[2].startswith("step 30  loss 1.0000  ") and said[2].endswith("  04:00 left  dev macro_f1 0.250")
