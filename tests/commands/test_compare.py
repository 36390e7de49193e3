"""The comparison: its grid, its statistics, its files, and that it can be stopped and continued."""

import csv
import json

import numpy as np
import pytest
from sklearn.metrics import f1_score

from irtune.cli import main
from irtune.commands.compare.command import write_report
from irtune.commands.compare.grid import build_grid, parse_corpora, parse_fractions, parse_variants
from irtune.commands.compare.linear import LinearResult, changed_words, linear_baseline
from irtune.commands.compare.runs import Outcome
from irtune.config import DataConfig
from irtune.data import Example, read_corpus
from irtune.errors import ConfigError
from irtune.evaluation.bootstrap import paired_bootstrap
from tests.support.runs import forked_after


@pytest.mark.quick
def test_variants_carry_keys_of_the_tuning_section():
    full, ir, published, own = parse_variants("full, ir,ir+preset=reference+interval=5,rst+budget=2")
    assert full.arguments("4") == ["--tuning.method=full"]  # has no budget
    assert ir.arguments("4") == ["--tuning.method=ir", "--tuning.budget=4"]
    assert ir.arguments(None) == ["--tuning.method=ir"]
    assert published.arguments("4") == ["--tuning.method=ir", "--tuning.preset=reference", "--tuning.interval=5"]
    assert own.arguments("4") == ["--tuning.method=rst", "--tuning.budget=2"]


@pytest.mark.quick
@pytest.mark.parametrize("text", ["", "ir+", "ir+preset", "+a=b", "ir,ir", "ir+a-b=1"])
def test_misspelt_variants_are_refused(text):
    with pytest.raises(ConfigError, match="--methods"):
        parse_variants(text)


@pytest.mark.quick
def test_corpora_are_paths_or_presets_with_paths():
    assert [c.name for c in parse_corpora(None)] == ["recipe"]
    plain, preset = parse_corpora("/some/folder,argrewrite=/other")
    assert (plain.name, plain.arguments) == ("folder", ("--data.path=/some/folder",))
    assert (preset.name, preset.arguments) == ("argrewrite", ("--data.path=/other", "--data.preset=argrewrite"))
    with pytest.raises(ConfigError, match="another name"):
        parse_corpora("/a/x,/b/x")


@pytest.mark.quick
def test_the_grid_reports_all_errors_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError) as raised:
        build_grid(
            variants=parse_variants("full,rts,ir+scores=old"),
            adapters=["lora", "loar"],
            corpora=parse_corpora("/some/folder"),
            seeds=2,
            budget=None,
            folder=tmp_path,
            arguments=[],
        )
    said = str(raised.value)
    assert all(word in said for word in ("rts", "rst", "old", "loar", "lora"))
    assert not list(tmp_path.iterdir())


@pytest.mark.quick
def test_seeds_come_round_by_round(tmp_path):
    cells = build_grid(
        variants=parse_variants("full,ir"), adapters=[None], corpora=parse_corpora("/some/folder"), seeds=2,
        budget="2", folder=tmp_path, arguments=["--optim.max_steps=3"],
    )  # fmt: skip
    assert [(cell.variant, cell.seed) for cell in cells] == [("full", 0), ("ir", 0), ("full", 1), ("ir", 1)]
    assert len({cell.folder for cell in cells}) == 4
    assert all("--optim.max_steps=3" in cell.arguments for cell in cells)


@pytest.mark.quick
def test_fractions_are_shares_of_the_training_rows(capsys):
    assert parse_fractions("1, 0.05,.25") == [0.05, 0.25, 1]
    with pytest.raises(ConfigError) as raised:
        parse_fractions("0,0.5,1.5,x,nan,0.50")
    assert raised.value.problems == [
        *(f"--fractions: {item!r}; accepted: numbers above 0, at most 1" for item in ("0", "1.5", "x", "nan")),
        "--fractions names 0.5 twice",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="is empty"):
        parse_fractions("")
    assert main(["compare", "--methods", "ir", "--fractions", "0.5", "--data.train_fraction", "0.1"]) == 2
    assert "leave them out" in capsys.readouterr().err


@pytest.fixture
def curves(tmp_path):
    """What a comparison with fractions has once its runs are there: .1 and all of 200 rows, two seeds."""
    cells = build_grid(
        variants=parse_variants("rst,ir"), adapters=[None], corpora=parse_corpora("/some/folder"), seeds=2,
        budget="2", folder=tmp_path, arguments=[], fractions=[0.1, 1.0],
    )  # fmt: skip
    bytes_of = {"mean": 1, "max": 2}
    outcomes = []
    for cell in cells:
        share = cell.fraction + 0.1 * (cell.variant == "ir") + 0.02 * cell.seed
        metrics = dict.fromkeys(("accuracy", "macro_f1", "auprc"), share / 2)
        results = {"dev": metrics, "layers_trained_per_step": 2, "layers_ever_trained": 3, "wall_seconds": 1.0,
                   "examples_per_second": 1.0, "optimizer_state_bytes_at_selections": bytes_of,
                   "peak_memory_bytes": 1}  # fmt: skip
        cell.folder.mkdir(parents=True)
        line = json.dumps({"kind": "train", "seconds": 1.0, "loss": 1.0}) + "\n"
        (cell.folder / "metrics.jsonl").write_text(line)
        outcomes.append(Outcome(cell, results))
    fits = [LinearResult({"dev": dict.fromkeys(metrics, value)}, {}, 1.0, 20) for value in (0.2, 0.4)]
    return cells, outcomes, {("folder", 0.1): fits, ("folder", 1.0): [LinearResult({"dev": metrics}, {}, 1.0, 200)]}


@pytest.mark.quick
def test_a_learning_curve_has_the_same_rows_for_every_method_and_others_for_every_seed(curves, tmp_path):
    cells, outcomes, linear = curves
    assert len({cell.folder for cell in cells}) == len(cells) == 8
    for cell in cells:
        assert f"--data.train_fraction={cell.fraction:g}" in cell.arguments
        assert f"--data.subset_seed={cell.seed}" in cell.arguments
    write_report(outcomes, linear, tmp_path, [])
    rows = list(csv.DictReader((tmp_path / "compare.csv").open()))
    assert [(row["fraction"], row["train_rows"], row["method"]) for row in rows] == [
        (fraction, size, method) for fraction, size in (("0.1", "20"), ("1.0", "200"))
        for method in ("linear baseline", "rst", "ir")
    ]  # fmt: skip
    line, _, ir = rows[:3]
    assert float(line["dev_macro_f1"]) == pytest.approx(0.3) and float(line["dev_macro_f1_sd"]) == pytest.approx(
        0.1 * 2**0.5
    )
    assert float(ir["dev_macro_f1"]) == pytest.approx(0.105) and float(ir["dev_macro_f1_sd"]) == pytest.approx(
        0.01 / 2**0.5
    )
    assert "| folder | 20 |  | linear baseline | 2 | 0.300 ± 0.141 |" in (tmp_path / "compare.md").read_text()
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.quick
def test_bootstrap_value_is_the_difference_of_macro_f1_as_sklearn_computes_it():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 60)
    better = [np.where(rng.random(60) < 0.8, labels, rng.integers(0, 4, 60)) for _ in range(2)]
    worse = [rng.integers(0, 4, 60) for _ in range(2)]
    result = paired_bootstrap(labels, better, worse, 5)  # class 4 never occurs and counts as 0

    def mean(runs):
        return np.mean([f1_score(labels, p, average="macro", labels=range(5), zero_division=0) for p in runs])

    assert result.value == pytest.approx(mean(better) - mean(worse))
    assert result.low < result.value < result.high
    assert result.p < 0.001
    same = paired_bootstrap(labels, worse, worse, 5)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert paired_bootstrap(labels, better, worse, 5) == result  # seeded


@pytest.mark.quick
def test_changed_words():
    example = Example(id="1", before="the old red house", after="the new red house house", label=0)
    assert changed_words(example) == ("old", "new house")


def test_the_linear_baseline_learns_and_skips_empty_sides(corpus, tmp_path):
    result = linear_baseline(read_corpus(DataConfig(path=str(corpus))))
    assert result.metrics["dev"]["accuracy"] > 0.6  # words tell the label of the synthetic corpus
    assert set(result.metrics) == {"dev", "test"}
    for split, rows in (("train", 12), ("dev", 4)):
        lines = [{"text": f"{'good' if i % 2 else 'bad'} thing {i}", "label": str(i % 2)} for i in range(rows)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    single = read_corpus(DataConfig(path=str(tmp_path), before="text", after=None))
    assert linear_baseline(single).metrics["dev"]["accuracy"] == 1.0


@pytest.fixture(scope="module")
def comparison(llama, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    arguments = ["compare", "--methods", "full,ir,ir+budget=99", "--seeds", "1", "--output_dir", str(folder),
                 "--ranks", "2", "--model.name_or_path", str(llama), "--model.dtype", "float32", "--data", str(corpus),
                 "--optim.max_steps", "2", "--data.max_length", "64", "--optim.micro_batch_size", "4",
                 "--run.log_every", "1"]  # fmt: skip
    with forked_after(1):
        assert main(arguments) == 0
    return folder, arguments


def test_a_comparison_writes_table_numbers_and_picture(comparison, corpus):
    folder, _ = comparison
    rows = {row["method"]: row for row in csv.DictReader((folder / "compare.csv").open())}
    assert list(rows) == ["linear baseline", "full", "ir", "ir+budget=99"]
    results = json.loads((folder / corpus.name / "adapter/ir/seed_0/results.json").read_text())
    assert results["world_size"] == 2
    assert float(rows["ir"]["test_macro_f1"]) == pytest.approx(results["test"]["macro_f1"])
    assert float(rows["ir"]["optimizer_state_bytes_mean"]) < float(rows["full"]["optimizer_state_bytes_mean"])
    assert float(rows["full"]["layers_per_step"]) == 6
    assert rows["ir"]["p"] and not rows["full"]["p"]
    text = (folder / "compare.md").read_text()
    assert "linear baseline" in text and "python -m irtune compare" in text
    assert (folder / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_a_failed_run_is_a_row_with_its_error(comparison):
    folder, _ = comparison
    rows = {row["method"]: row for row in csv.DictReader((folder / "compare.csv").open())}
    assert rows["ir+budget=99"]["seeds"] == "0"
    assert "tuning.budget is 99" in rows["ir+budget=99"]["error"]
    assert "tuning.budget is 99" in (folder / "compare.md").read_text()


def test_finished_runs_are_kept_and_other_settings_refused(comparison, corpus, capsys):
    folder, arguments = comparison
    finished = folder / corpus.name / "adapter/full/seed_0"
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert main(["compare", "--methods", "full", *arguments[3:]]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    assert main([*arguments, "--optim.lr", "0.1"]) == 2
    said = capsys.readouterr().err
    assert "--optim.lr" in said and str(finished) in said


@pytest.mark.quick
def test_unknown_commands_are_named(capsys):
    assert main(["compear"]) == 2
    assert "compear" in capsys.readouterr().err
    assert main([]) == 0
    assert "compare" in capsys.readouterr().out
