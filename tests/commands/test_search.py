"""The search: its ranges, what it proposes, that it goes on where it was, and its report. Training is a stand-in."""

import csv
import json
import random
from types import SimpleNamespace

import pytest

from irtune.cli import main
from irtune.commands.compare import runs
from irtune.commands.search import command
from irtune.commands.search.trials import STARTUP, Trial, front, hypervolume, propose
from irtune.config import load_config
from irtune.config.keys import known_keys
from irtune.config.search_space import FIXED, Numbers, Subset, read_space
from tests.support import ROOT

SPACE = """
search:
  adapter.r: [1, 2, 4, 8]
  optim.lr: {low: 1e-4, high: 1e-2, log: true}
  tuning.interval: {low: 1, high: 9}
  adapter.target_modules: {subset: [q_proj, v_proj, up_proj]}
"""


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("optim: {epochs: 1}\n" + SPACE)
    return file


def option(line, key):
    """The value of an option in a command line; the last one wins."""
    return [word.partition("=")[2] for word in line if word.startswith(f"--{key}=")][-1]


@pytest.fixture
def trained(monkeypatch):
    """Stands in for the processes that train: more rank is better and dearer. Lists the folders of the runs."""
    folders = []

    def run(line, **_):
        config = load_config(list(line[line.index("train") + 1 :]))
        r, lr = config.adapter.r, config.optim.lr
        folders.append(config.run.output_dir)
        assert not config.run.evaluate_test
        modules, works = len(config.adapter.target_modules), config.tuning.interval != 9
        results = {"dev": {"macro_f1": r / 10 + modules / 100 - lr}, "trained_parameters_per_step": r * modules * 100.0}
        if works:
            command.write_json(command.Path(config.run.output_dir) / "results.json", results | {"wall_seconds": 1.0})
        return SimpleNamespace(returncode=0 if works else 1)

    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(run=run, STDOUT=None, DEVNULL=None))
    monkeypatch.setattr(command, "write_page", lambda folders, target: target.write_text(str(len(folders))))
    return folders


def search(recipe, corpus, folder, *options):
    return main(["search", "--config", str(recipe), "--data.path", str(corpus), "--output_dir", str(folder), *options])


def rows_of(folder):
    return list(csv.DictReader((folder / "search.csv").open()))


@pytest.mark.quick
def test_every_mistake_in_the_ranges_is_reported_at_once(recipe, corpus, capsys):
    recipe.write_text("""
search:
  optim.lrr: [1, 2]
  optim.lr: {low: 1e-2, high: 1e-3, log: true}
  adapter.type: [lora, lorra]
  adapter.r: {low: 0, high: 4}
  run.seed: [0, 1]
  adapter.dropout: 3
  optim.schedule: {low: 1, high: 2}
  adapter.target_modules: {subset: [q_proj]}
  data.prompt: [diff]
  adapter.alpha: [1.0, 2.0]
""")
    assert search(recipe, corpus, recipe.parent / "s", "--trials", "2", "--adapter.alpha", "3", "--optim.epoch=1") == 2
    said = capsys.readouterr().err
    for words in (
        "unknown option 'optim.lrr'; did you mean optim.lr?", "optim.lr has low 0.01 and high 0.001",
        "adapter.type is 'lorra'; did you mean lora?", "adapter.r is 0; accepted: a whole number from 1",
        "run.seed cannot be searched", "adapter.dropout is 3; accepted: a list of values, {low: A, high: B}",
        "optim.schedule: takes one of", "adapter.target_modules is {'subset': ['q_proj']}", "data.prompt is ['diff']",
        "--adapter.alpha sets a key that", "unknown option 'optim.epoch'; did you mean optim.epochs?",
    ):  # fmt: skip
        assert words in said
    assert not (recipe.parent / "s").exists()
    recipe.write_text("optim: {epochs: 1}\n")
    assert search(recipe, corpus, recipe.parent / "s", "--trials", "2") == 2
    assert "has no section 'search'" in capsys.readouterr().err


@pytest.mark.quick
def test_what_is_missing_is_said(recipe, corpus, capsys, monkeypatch):
    assert search(recipe, corpus / "train.jsonl", recipe.parent / "s", "--trials", "2") == 2
    assert "no dev split" in capsys.readouterr().err
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert search(recipe, corpus, recipe.parent / "s", "--trials", "2") == 2
    assert "pip install 'irtune[search]'" in capsys.readouterr().err


@pytest.mark.quick
def test_the_space_of_the_recipe_and_what_never_varies():
    problems: list[str] = []
    space = read_space("search-autopeft", problems)
    assert not problems and set(FIXED) <= set(known_keys())
    assert 576 // 2**3 in space["adapter.size"].values
    assert space["tuning.layers"] == Subset(list(range(30)), text=True)
    trial = propose(space, [], 0, guided=True, seed=0, sign=1)
    layers = [number for number in range(30) if trial.params[f"tuning.layers[{number}]"]]
    assert trial.values["tuning.layers"] == ",".join(map(str, layers)) and 5 < len(layers) < 25
    load_config(["--config", str(ROOT / "launch/recipes/search-autopeft.yaml"), "--data.path", "x"])


@pytest.mark.quick
def test_hypervolume_and_front():
    points = [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]
    assert hypervolume(points, (0.0, 0.0)) == 6
    assert hypervolume([(2.0, 1.5), *points], (0.0, 0.0)) == 6
    assert hypervolume(points, (1.0, 1.0)) == 1
    rng = random.Random(0)
    for _ in range(50):  # against a count of the unit squares below a point
        drawn = [(rng.randint(0, 9), rng.randint(0, 9)) for _ in range(6)]
        squares = sum(any(x > i and y > j for x, y in drawn) for i in range(9) for j in range(9))
        assert hypervolume(drawn, (0, 0)) == squares
    cheap, dear, same, worse, failed = (
        Trial(i, False, {}, {}, str(i), metric, cost)
        for i, (metric, cost) in enumerate([(0.5, 10), (0.7, 30), (0.5, 10), (0.6, 40), (None, None)])
    )
    assert front([cheap, dear, same, worse, failed], 1) == [cheap, dear]
    assert front([cheap, dear, worse], -1) == [cheap]  # the loss


@pytest.mark.quick
def test_guided_trials_find_what_random_ones_do_not():
    space = {"optim.lr": Numbers(1e-6, 1.0, log=True), "adapter.r": Numbers(1, 64, log=False)}

    def best(guided):
        trials: list[Trial] = []
        for number in range(STARTUP + 25):
            trial = propose(space, trials, number, guided=guided, seed=1, sign=-1)
            lr, r = trial.values["optim.lr"], trial.values["adapter.r"]
            trial.metric, trial.cost = abs(lr - 1e-3) * 100 + r / 64, float(r)
            trials.append(trial)
            assert trial.guided == (guided and number >= STARTUP)
        return trials

    guided, chance = best(True), best(False)
    assert guided[:STARTUP] == chance[:STARTUP]
    assert min(trial.metric for trial in guided) < min(trial.metric for trial in chance)


@pytest.mark.quick
def test_a_search_that_is_killed_goes_on_and_repeats_nothing(recipe, corpus, tmp_path, trained, monkeypatch, capsys):
    assert search(recipe, corpus, tmp_path / "whole", "--trials", "12") == 0
    whole, shown = rows_of(tmp_path / "whole"), capsys.readouterr().out
    once = list(trained)
    assert len(once) == len(set(once)) and [row["search"] for row in whole] == [
        *["both"] * STARTUP, *["guided"] * 2, *["random"] * 2,
    ]  # fmt: skip
    trained.clear()
    stand_in = runs.subprocess.run

    def killed(line, **options):
        done = stand_in(line, **options)
        if len(trained) > STARTUP and done.returncode == 0:  # the run has ended, and the search knows nothing of it
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(runs.subprocess, "run", killed)
    assert search(recipe, corpus, tmp_path / "part", "--trials", "12") == 130
    assert [row["run"] for row in rows_of(tmp_path / "part")] == [row["run"] for row in whole][: len(trained) - 1]
    monkeypatch.setattr(runs.subprocess, "run", stand_in)
    assert search(recipe, corpus, tmp_path / "part", "--trials", "12") == 0
    assert rows_of(tmp_path / "part") == whole
    assert [folder.replace("part", "whole") for folder in trained] == once
    assert search(recipe, corpus, tmp_path / "part", "--trials", "12", "--skip_random") == 0
    assert len(trained) == len(once)
    assert {row["tuning.interval"] for row in whole if row["error"]} == {"9"}
    assert not any(row["adapter.target_modules"] == "[]" for row in whole)  # an empty subset is none
    assert not any(row["error"] for row in whole if row["tuning.interval"] != "9")
    for words in ("| search | 12 |", "| random search | 12 |", "The test split was not evaluated", "report.html"):
        assert words in shown
    assert (tmp_path / "whole/search.png").read_bytes()[:4] == b"\x89PNG"
    assert search(recipe, corpus, tmp_path / "part", "--trials", "12", "--optim.epochs", "2") == 2
    assert "holds a search with other options" in capsys.readouterr().err


@pytest.mark.quick
def test_equal_settings_run_once(recipe, corpus, tmp_path, trained):
    recipe.write_text("search: {adapter.r: [1, 2]}\nadapter: {target_modules: [q_proj]}\n")
    assert search(recipe, corpus, tmp_path / "s", "--trials", "12", "--skip_random") == 0
    assert "random search |" not in (tmp_path / "s/search.md").read_text()  # with fewer trials it would look worse
    assert search(recipe, corpus, tmp_path / "s", "--trials", "12") == 0
    assert "| random search | 12 |" in (tmp_path / "s/search.md").read_text()
    assert len(trained) == 2 and len(rows_of(tmp_path / "s")) == 14
    assert (tmp_path / "s/report.html").read_text() == "2"  # of rank 2 the better metric, of rank 1 the lower cost
    assert search(recipe, corpus, tmp_path / "t", "--trials", "4", "--minimize", "seconds") == 0
    assert (tmp_path / "t/report.html").read_text() == "1"  # the stand-in takes a second for any rank


@pytest.mark.slow
def test_a_search_trains(llama, corpus, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("search: {adapter.r: [2, 4], tuning.layers: {subset: [0, 1, 2, 3, 4, 5]}}\n"
                      "tuning: {method: fixed}\n")  # fmt: skip
    line = ["--trials", "2", "--model.name_or_path", str(llama), "--model.dtype", "float32", "--optim.max_steps", "2",
            "--data.max_length", "64", "--optim.micro_batch_size", "4"]  # fmt: skip
    assert search(recipe, corpus, tmp_path / "s", *line) == 0
    assert (tmp_path / "s/report.html").is_file()
    for row in rows_of(tmp_path / "s"):
        results = json.loads((tmp_path / "s" / row["run"] / "results.json").read_text())
        assert "test" not in results and not (tmp_path / "s" / row["run"] / "predictions_test.jsonl").exists()
        layers, r = len(row["tuning.layers"].split(",")), int(row["adapter.r"])
        # A layer of the tiny model: q and o 32 -> 32, k and v 32 -> 16, gate and up 32 -> 64, down 64 -> 32.
        per_rank = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64)
        head = results["trained_parameters_per_step"] - layers * r * per_rank
        assert head == (64 + 1) * len(results["dev"]["per_class"])  # it reads all tokens and those of the edits
