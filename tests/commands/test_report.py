"""python -m irtune report: what the page says of a run, finished or not, and of several."""

import itertools
import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from irtune import cli
from irtune.commands.report import charts
from irtune.commands.report.read import read_run_data
from irtune.config.load import load_config, write_config
from irtune.data import read_corpus
from tests.tracking.test_tensorboard import browser  # noqa: F401  (a fixture)

EMPTY = {"meta", "circle", "image", "line", "polyline", "rect"}  # elements without an end


class Tree(HTMLParser):
    """Notes what is open, and every attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.open.pop() == tag


def a_run(folder: Path, corpus: Path, *, macro_f1: float = 0.5, finished: bool = True) -> Path:
    """A run of six steps with two selections; all dev examples but the first two are predicted well, with .95."""
    folder.mkdir()
    config = load_config(["--data.path", str(corpus), "--run.output_dir", str(folder), "--optim.max_steps", "6"])
    write_config(config, folder / "config.yaml")
    found = read_corpus(config.data)
    per_class = {name: {"precision": 0.5, "recall": 0.5, "f1": 0.5, "average_precision": None, "examples": 4}
                 for name in found.labels}  # fmt: skip
    means = dict.fromkeys(("accuracy", "macro_precision", "macro_recall", "macro_f1_present", "auprc", "loss"), 0.5)
    size = len(found.labels)
    dev = means | {"macro_f1": macro_f1, "examples": 20, "per_class": per_class,
                   "confusion_matrix": [[4 * (i == j) for j in range(size)] for i in range(size)]}  # fmt: skip
    rows = [{"kind": "train", "step": s, "loss": 2.0 - s / 10, "tokens_per_second": 100.0} for s in range(1, 7)]
    rows += [{"kind": "eval", "split": "dev", "step": 3} | dev, {"kind": "eval", "split": "dev", "step": 6} | dev]
    chosen = [{"step": s, "scores": [0.1, None, 0.4], "selected": [s % 2, 2], "num_layers": 3} for s in (0, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "selection.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    if not finished:
        return folder
    lines = []
    for number, example in enumerate(found.splits["dev"]):
        right = found.labels[example.label]
        other = next(name for name in found.labels if name != right)
        said = other if number < 2 else right
        rest = dict.fromkeys(found.labels, 0.05 / (size - 1))
        lines.append({"id": example.id, "label": right, "predicted": said, "probabilities": rest | {said: 0.95}})
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = {"dev": dev, "steps": 6, "num_layers": 3, "layers_trained_per_step": 2.0, "training_seconds": 61.2}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def page_of(capsys, *runs: Path) -> tuple[str, Tree]:
    """The page of runs, and its tree, which must be closed."""
    assert cli.main(["report", "--run", *map(str, runs)]) == 0
    assert f"written to {runs[0] / 'report.html'}" in capsys.readouterr().out
    text = (runs[0] / "report.html").read_text(encoding="utf-8")
    tree = Tree()
    tree.feed(text)
    assert tree.open == [] and len(text) < 2_000_000
    return text, tree


@pytest.mark.quick
def test_a_page_of_a_finished_run(tmp_path, corpus, capsys):
    run = a_run(tmp_path / "<b>mine", corpus)
    text, tree = page_of(capsys, run)
    assert "<title>irtune: &lt;b&gt;mine</title>" in text and "<b>mine" not in text
    assert "6 of 6" in text and "61 s" in text and "2.0 of 3" in text and "Classes on dev (20 examples)" in text
    # 20 examples with confidence .95, of which 18 are right: |.95 - .9|.
    assert "expected calibration error 0.050" in text
    assert "3 of 3 layers were trained at some time, 2.0 at a time on average" in text
    assert "highest on average: layers 2, 0, 1" in text
    example = read_run_data(run).mistakes[0]
    assert [mistake["confidence"] for mistake in read_run_data(run).mistakes] == [0.95, 0.95]
    assert "".join(piece for kind, piece in example["pieces"] if kind != "-") in {
        row.after for row in read_corpus(load_config(["--config", str(run / "config.yaml")]).data).splits["dev"]
    }
    assert re.search(r"<ins>|<del>", text)
    # Nothing is fetched from anywhere, and each drawing has a name and a description that exist.
    ids = {value for _, name, value in tree.attributes if name == "id"}
    for tag, name, value in tree.attributes:
        if name in ("src", "href"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, value)
        if name in ("aria-labelledby", "aria-describedby") or (name == "href" and value.startswith("#")):
            assert value.removeprefix("#") in ids
    assert "http" not in text and "@import" not in text and "url(" not in text
    headings = [int(level) for level in re.findall(r"<h(\d)", text)]
    assert headings[0] == 1 and all(after - before <= 1 for before, after in itertools.pairwise(headings))


@pytest.mark.quick
def test_an_unfinished_run_and_several_side_by_side(tmp_path, corpus, capsys):
    good = a_run(tmp_path / "good", corpus, macro_f1=0.75)
    bad = a_run(tmp_path / "bad", corpus, finished=False)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text((bad / "config.yaml").read_text())
    text, _ = page_of(capsys, bad, good, bare)
    assert "<b>bad</b>: not finished: it has reached step 6; what is here is what it has written" in text
    assert "<b>bare</b>: not finished: it has reached step 0" in text
    assert re.search(r'dev macro-F1</th>\s*<td>0\.500</td>\s*<td class="best">0\.750</td>\s*<td>-</td>', text)
    assert text.count('<polyline class="line c1"') == 6  # the second run in four charts; layers of two


@pytest.mark.quick
def test_runs_of_equal_folder_names_are_told_apart(tmp_path, corpus, capsys):
    runs = []
    for method in ("ir", "full"):
        (tmp_path / method).mkdir()
        runs.append(a_run(tmp_path / method / "seed_0", corpus))
    text, _ = page_of(capsys, *runs)
    assert "<title>irtune: ir/seed_0, full/seed_0</title>" in text
    assert re.findall(r'<th scope="col">(\S+seed_0)</th>', text) == ["ir/seed_0", "full/seed_0"]
    assert "ir/seed_0: 100 at step 1, 100 at step 6; full/seed_0: 100 at step 1" in text
    one = charts.lines("x", [charts.Line("a", 0, [3], [6760.4]), charts.Line("b", 1, [1, 2], [0.5, 0.12345])])
    assert "a: 6,760 at step 3; b: 0.5 at step 1, 0.123 at step 2" in one


@pytest.mark.quick
def test_a_layer_that_never_had_a_score_is_among_the_lowest():
    values = np.array([[np.nan, 1.0, 2.0, 4.0], [np.nan, 3.0, 0.0, np.inf]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = charts.scores([0, 3], values, 6)
    assert "highest on average: layers 3, 1, 2" in drawn  # of what is known: 1, (1/4 + 1) / 2 and (2/4 + 0) / 2


@pytest.mark.quick
def test_a_corpus_that_is_neither_here_nor_cached_is_not_sought_on_the_network(tmp_path, corpus, capsys, monkeypatch):
    asked = []
    run = a_run(tmp_path / "run", corpus)
    text = (run / "config.yaml").read_text().replace(str(corpus), "elsewhere/corpus")
    (run / "config.yaml").write_text(text)
    monkeypatch.setattr("socket.getaddrinfo", lambda *found, **_: asked.append(found) or [])
    assert "mistakes are without their texts, since the corpus cannot be read" in page_of(capsys, run)[0]
    assert asked == [] and not constants.HF_HUB_OFFLINE


@pytest.mark.quick
def test_what_is_no_run_is_said(tmp_path, corpus, capsys):
    assert cli.main(["report", "--run", str(tmp_path)]) == 2
    assert f"{tmp_path} is not a run folder: it has no config.yaml" in capsys.readouterr().err
    run = a_run(tmp_path / "run", corpus)
    (run / "predictions.jsonl").write_text('{"id": "x"}\n')
    assert cli.main(["report", "--run", str(run)]) == 2
    assert "predictions.jsonl is damaged" in capsys.readouterr().err
    assert not (run / "report.html").exists()
    run = a_run(tmp_path / "moved", corpus)
    config = (run / "config.yaml").read_text().replace(str(corpus), str(tmp_path / "gone"))
    (run / "config.yaml").write_text(config)
    assert "mistakes are without their texts, since the corpus cannot be read" in page_of(capsys, run)[0]


@pytest.mark.slow
def test_a_browser_shows_the_page(tmp_path, corpus, capsys, browser):  # noqa: F811
    run = a_run(tmp_path / ("long" * 20), corpus)
    page_of(capsys, run)
    for width, dark in ((1280, False), (390, True)):
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get((run / "report.html").as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width  # only tables scroll
        ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(18, 22, 28)" if dark else "rgb(255, 255, 255)")
        drawn = browser.execute_script("return [...document.querySelectorAll('svg')].map(s => s.clientWidth)")
        assert len(drawn) >= 7 and all(200 < wide < width for wide in drawn)
    browser.find_element("tag name", "body").send_keys("\ue004")  # the tabulator
    assert browser.execute_script("return document.activeElement.className") == "skip"
    assert browser.get_log("browser") == []
