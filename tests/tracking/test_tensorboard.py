"""TensorBoard as the window into a run: what the event file holds, and what a browser shows of it."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util import tensor_util

from irtune.tasks import Predictions
from irtune.tracking import pictures
from irtune.tracking import tracker as tracking
from irtune.tracking.tracker import Tracker
from tests.support.ranks import free_port, run_ranks
from tests.support.runs import train
from tests.support.tiny import tiny_config

LABELS = ("clarity", "coherence", "fluency", "meaning-changed", "style")
LAYER_PICTURES = ("layers/scores", "layers/trained", "layers/trained_share(%)")


@pytest.fixture(scope="module")
def finished(llama, corpus, tmp_path_factory) -> Path:
    """A run of 2 ranks: 6 layers, 6 steps, selections at 0, 2 and 4, evaluations at 3 and 6."""
    folder = tmp_path_factory.mktemp("board") / "run"
    assert run_ranks(train, 2, tiny_config(llama, corpus, folder), True) == [None, None]
    return folder


def board(folder: Path) -> EventAccumulator:
    """All that the event files of a run hold."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    events.Reload()
    return events


def jsonl(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def png(event) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))


def test_pictures_are_those_of_the_records(finished):
    events = board(finished)
    steps, scores, trained = pictures.arrays([pictures.row(r) for r in jsonl(finished / "selection.jsonl")])
    assert steps == [0, 2, 4]
    expected = (
        pictures.score_map(steps, scores, 6, "rms"),
        pictures.trained_map(steps, trained, 6),
        pictures.share_bars(steps, trained, 6),
    )
    for tag, figure in zip(LAYER_PICTURES, expected, strict=True):
        assert events.Images(tag)[-1].step == 6
        np.testing.assert_array_equal(png(events.Images(tag)[-1]), pictures.rgb(figure))
    results = json.loads((finished / "results.json").read_text())
    for split, times in (("dev", [3, 6]), ("test", [results["best_step"]])):
        assert [event.step for event in events.Images(f"{split}/confusion_matrix")] == times
        assert [event.step for event in events.Images(f"{split}/f1_per_class")] == times
    matrix = pictures.confusion_map(results["test"]["confusion_matrix"], LABELS)
    np.testing.assert_array_equal(png(events.Images("test/confusion_matrix")[0]), pictures.rgb(matrix))


def test_precision_recall_curves(finished):
    events = board(finished)
    rows = [row for row in jsonl(finished / "metrics.jsonl") if row["kind"] == "eval" and row["split"] == "dev"]
    for name in LABELS:
        assert events.SummaryMetadata(f"dev_pr/{name}").plugin_data.plugin_name == "pr_curves"
        curves = events.Tensors(f"dev_pr/{name}")
        assert [event.step for event in curves] == [3, 6]
        positives, negatives, *_, recall = tensor_util.make_ndarray(curves[-1].tensor_proto)
        examples = rows[-1]["per_class"][name]["examples"]
        # At threshold 0 everything is predicted: all examples of the class are found, all others wrongly.
        assert (positives[0], negatives[0]) == (examples, rows[-1]["examples"] - examples)
        assert recall[0] == pytest.approx(1)
        assert (np.diff(recall) <= 1e-6).all()


def test_scalars(finished):
    events = board(finished)
    records = [row for row in jsonl(finished / "metrics.jsonl") if row["kind"] == "train"]
    clipped = [event.value for event in events.Scalars("train/clipped")]
    assert clipped == [float(row["grad_norm"] > 1.0) for row in records] == [row["clipped"] for row in records]
    assert 1.0 in clipped
    for name in ("peak_memory", "optimizer_state", "parked_state"):
        assert f"memory/{name}(MiB)" in events.Tags()["scalars"]


def test_configuration_and_hyperparameters_stand_beside_the_curves(finished):
    events = board(finished)
    text = tensor_util.make_ndarray(events.Tensors("configuration/text_summary")[0].tensor_proto)[0].decode()
    fence, rest = text.split("\n", 1)
    assert (fence, rest[-3:]) == ("```yaml", "```")
    assert yaml.safe_load(rest[:-3]) == yaml.safe_load((finished / "config.yaml").read_text())
    content = {tag: HParamsPluginData.FromString(data) for tag, data in events.PluginTagToContent("hparams").items()}
    chosen = {
        name: value.string_value or value.number_value
        for name, value in content["_hparams_/session_start_info"].session_start_info.hparams.items()
    }
    assert chosen.pop("model").startswith("llama")
    assert chosen == {"method": "ir", "score": "rms", "interval": 2, "adapter": "lora", "r": 4, "lr": 0.01, "batch": 8,
                      "loss": "cross_entropy", "steps": 6, "seed": 0, "zero_stage": 2, "world_size": 2}  # fmt: skip
    results = json.loads((finished / "results.json").read_text())
    metrics = [info.name.tag for info in content["_hparams_/experiment"].experiment.metric_infos]
    assert metrics == [f"final/{s}_{name}" for s in ("dev", "test") for name in ("accuracy", "macro_f1", "auprc")]
    for tag in metrics:
        split, name = tag.removeprefix("final/").split("_", 1)
        assert events.Scalars(tag)[-1].value == pytest.approx(results[split][name])
    assert len(list((finished / "tensorboard").iterdir())) == 1  # no run beside the run


# ----- the tracker by itself -----


def selection(step: int, selected: list[int], scores: list[float | None] | None = None, layers: int = 3) -> dict:
    return {"step": step, "scores": scores, "selected": selected, "changed": True, "seconds": 0.1, "num_layers": layers}


def train_record(step: int) -> dict:
    names = (
        "loss",
        "lr",
        "grad_norm",
        "clipped",
        "skipped_steps",
        "layers_selected",
        "tokens_per_second",
        "examples_per_second",
        "padding_share",
    )
    return {"step": step} | dict.fromkeys(names, 1.0)


def advance(tracker: Tracker, step: int) -> None:
    tracker.advance(step)
    tracker.train(train_record(step))


@pytest.mark.quick
def test_after_a_resume_the_pictures_show_the_whole_run(tmp_path):
    first = Tracker(tmp_path, active=True, start_step=0, max_steps=6)
    for step, layer in ((0, 0), (2, 1), (4, 2)):
        first.selection(selection(step, [layer], [1.0, 2.0, None]))
    advance(first, 6)
    first.close()
    second = Tracker(tmp_path, active=True, start_step=3, max_steps=6)  # forgets what was after step 3
    second.selection(selection(4, [0, 1]))
    advance(second, 6)
    second.close()
    nan = float("nan")
    expected = {
        "layers/scores": pictures.score_map([0, 2, 4], [[1, 2, nan], [1, 2, nan], [nan] * 3], 6),
        "layers/trained": pictures.trained_map([0, 2, 4], np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]], dtype=bool), 6),
    }
    events = board(tmp_path)
    for tag, figure in expected.items():
        (event,) = events.Images(tag)  # the first session's last picture was of a step that is taken back
        np.testing.assert_array_equal(png(event), pictures.rgb(figure))


@pytest.mark.quick
def test_pictures_of_layers_are_drawn_now_and_then(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(tracking, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(pictures, "rgb", lambda figure: np.zeros((2, 2, 3), dtype=np.uint8))
    tracker = Tracker(tmp_path, active=True, start_step=0, max_steps=4000)
    for step in range(10, 4001, 10):  # a step each second, a selection and a log line every ten
        clock[0] += 10
        tracker.selection(selection(step - 10, [1]))
        advance(tracker, step)
    for step in range(4010, 5001, 10):  # nothing new: only the last picture is to come
        clock[0] += 10
        advance(tracker, step)
    tracker.close()
    drawn = [event.step for event in board(tmp_path).Images("layers/trained")]
    assert drawn[:3] == [30, 60, 90]
    assert np.diff(drawn)[-3] >= 0.02 * 3800
    assert drawn[-1] == 5000
    assert 4000 <= drawn[-2] <= 4090
    assert len(drawn) < 110


@pytest.mark.quick
@pytest.mark.parametrize("layers", [0, 3])
def test_a_method_without_scores_has_no_heat_map(tmp_path, layers):
    tracker = Tracker(tmp_path, active=True, start_step=0, max_steps=2)
    tracker.selection(selection(0, list(range(layers)), layers=layers))
    advance(tracker, 2)
    tracker.close()
    assert set(board(tmp_path).Tags()["images"]) == (set(LAYER_PICTURES[1:]) if layers else set())


@pytest.mark.quick
def test_a_run_that_fails_at_once_can_be_closed(tmp_path):
    Tracker(tmp_path, active=True, start_step=0, max_steps=2).close()
    Tracker(tmp_path, active=False, start_step=0, max_steps=2).close()


@pytest.mark.quick
def test_an_evaluation_without_probabilities_has_no_curves(tmp_path):
    values = dict.fromkeys(("loss", "accuracy", "macro_precision", "macro_recall", "macro_f1", "auprc"), 0.5)
    per_class = {name: {"f1": 0.5, "examples": 2} for name in ("a", "b")}
    tracker = Tracker(tmp_path, active=True, start_step=0, max_steps=2)
    tracker.evaluation(1, "dev", values | {"per_class": per_class, "confusion_matrix": [[1, 1], [0, 2]]})
    tracker.evaluation(
        2,
        "test",
        values | {"per_class": per_class, "confusion_matrix": [[1, 1], [0, 2]]},
        Predictions(torch.tensor([[1.0, 0.0], [0.2, 0.8], [0.4, 0.6], [0.1, 0.9]]).log(), torch.tensor([0, 0, 1, 1])),
    )
    tracker.close()
    assert {tag for tag in board(tmp_path).Tags()["tensors"] if "_pr/" in tag} == {"test_pr/a", "test_pr/b"}


# ----- in a browser -----

# Polymer hides its elements in shadow roots: walk through all of them.
ROOTS = """
function roots(root) {
    const found = [root];
    for (const element of root.querySelectorAll('*')) {
        if (element.shadowRoot) found.push(...roots(element.shadowRoot));
    }
    return found;
}
"""
TEXT = ROOTS + "return roots(document).map(r => (r.body || r).textContent).join('\\n')"
PICTURES = (
    ROOTS
    + """
const cards = roots(document).flatMap(r => [...r.querySelectorAll('tf-image-loader')]);
return cards.map(card => {
    const image = roots(card.shadowRoot || card).flatMap(r => [...r.querySelectorAll('img')]).find(i => i.naturalWidth);
    return [card.tag, image ? image.naturalWidth : 0, image ? image.naturalHeight : 0];
});
"""
)


def until(look, happy, seconds: float = 20.0):
    """What `look` returns once `happy` likes it."""
    end = time.monotonic() + seconds
    while not happy(seen := look()):
        assert time.monotonic() < end, f"not seen within {seconds} s; there is: {str(seen)[-3000:]}"
        time.sleep(0.2)
    return seen


@pytest.fixture(scope="module")
def address(finished):
    """Where TensorBoard serves the run."""
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(finished / "tensorboard")]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        _stop(server)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless chromium with a profile of its own."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("chromium or chromedriver is not installed (Debian: apt install chromium chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
                   "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
                   "--disable-sync", "--window-size=1400,900",
                   f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):  # fmt: skip
        options.add_argument(option)
    service = Service(chromedriver, popen_kw={"start_new_session": True})  # a process group of our own, to end it whole
    driver = group = None
    try:
        driver = selenium.Chrome(options=options, service=service)
        group = service.process.pid
        driver.set_page_load_timeout(30)
        driver.set_script_timeout(20)
        yield driver
    finally:
        with contextlib.suppress(Exception):
            if driver is not None:
                driver.quit()  # ends chromium
        with contextlib.suppress(ProcessLookupError):  # and whatever did not listen
            if group is not None:
                os.killpg(group, signal.SIGKILL)


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _answer(url: str) -> str:
    try:
        return urllib.request.urlopen(url, timeout=5).read().decode()
    except OSError:
        return ""


def _open(browser, address: str, page: str) -> None:
    """Load a page anew: a changed fragment alone would load nothing."""
    browser.get("about:blank")
    browser.get(f"{address}/{page}")


@pytest.mark.slow
def test_a_browser_shows_the_run(finished, address, browser, tmp_path):
    until(lambda: _answer(f"{address}/data/plugin/scalars/tags"), lambda text: "train/loss" in text, 40)

    def text():
        return browser.execute_script(TEXT)

    _open(browser, address, "?tagFilter=loss#timeseries")
    until(text, lambda seen: "train/loss" in seen and "dev/loss" in seen)
    _open(browser, address, "#scalars")
    until(text, lambda seen: "train" in seen and "dev/macro_f1" in seen and "layer_score" in seen)

    _open(browser, address, "#images&tagFilter=scores%7Ctrained%7Cconfusion")
    wanted = {"layers/scores", "layers/trained", "dev/confusion_matrix"}
    shown = until(
        lambda: {tag: (width, height) for tag, width, height in browser.execute_script(PICTURES)},
        lambda found: wanted <= found.keys() and all(found[tag][0] for tag in wanted),
    )
    assert shown["layers/scores"] == shown["layers/trained"] == (728, 462)
    assert browser.save_screenshot(str(tmp_path / "images.png"))

    _open(browser, address, "#text")
    until(text, lambda seen: "configuration" in seen and "micro_batch_size: 4" in seen and "method: ir" in seen)
    _open(browser, address, "#hparams")
    dev = json.loads((finished / "results.json").read_text())["dev"]
    numbers = [f"{dev[name]:#.5g}" for name in ("accuracy", "macro_f1", "auprc")]
    until(text, lambda seen: "final/dev_macro_f1" in seen and "lora" in seen and all(n in seen for n in numbers))
    _open(browser, address, "#pr_curves")
    until(text, lambda seen: "dev_pr/clarity" in seen)
