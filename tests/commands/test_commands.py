"""The commands on finished runs of several kinds, and what they say when something is wrong."""

import csv
import io
import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from irtune.cli import main
from irtune.commands import COMMANDS
from irtune.commands.data.curate import read_folds
from irtune.commands.evaluate import _same
from irtune.commands.predict import _write
from irtune.data.synthetic import synthetic_pairs
from tests.support.ranks import run_ranks
from tests.support.runs import forked_after, launch
from tests.support.tiny import tiny_config


@pytest.fixture(scope="module")
def finished(llama, corpus, tmp_path_factory):
    """Runs by adapter type: LoRA, a type of irtune's own, and own weights."""
    runs = {}
    for kind, options in (("lora", {}), ("bottleneck", {"adapter__size": 8}), ("none", {})):
        folder = tmp_path_factory.mktemp(kind) / "run"
        config = tiny_config(llama, corpus, folder, 0, adapter__type=kind, optim__lr=0.02, **options)
        launch(config, 1)  # DeepSpeed remembers the process group of the first run of a process
        runs[kind] = folder
    return runs


@pytest.mark.quick
def test_every_command_has_help_with_an_example(capsys):
    for name in COMMANDS:
        status = 0
        try:
            status = main([name, "--help"])
        except SystemExit as stop:
            status = stop.code
        assert status == 0
        assert "example" in capsys.readouterr().out.lower(), name
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)


@pytest.mark.parametrize("kind", ["lora", "bottleneck", "none"])
def test_predict_gives_the_probabilities_of_the_run(finished, corpus, tmp_path, kind):
    output = tmp_path / "out.jsonl"
    command = ["predict", "--run", str(finished[kind]), "--input", str(corpus / "dev.jsonl"), "--output", str(output)]
    assert main(command) == 0
    wanted = [json.loads(line) for line in (finished[kind] / "predictions.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (corpus / "dev.jsonl").read_text().splitlines()]
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(found) == len(wanted)
    for row, before, after in zip(found, rows, wanted):
        assert before.items() <= row.items()  # the input's columns are kept
        assert row["predicted"] == after["predicted"]
        assert list(row["probabilities"].values()) == pytest.approx(list(after["probabilities"].values()), abs=1e-5)


def test_predict_reads_standard_input_and_writes_tables(finished, tmp_path, monkeypatch, capsys):
    pairs = synthetic_pairs(7)
    lines = "".join(json.dumps({"before": p["before"], "after": p["after"]}) + "\n" for p in pairs)
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["predict", "--run", str(finished["lora"]), "--input", "-", "--output", "-"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 7 and "examples/s" in err
    first = json.loads(out.splitlines()[0])
    (tmp_path / "in.csv").write_text("what,after,before\n" + f'x,"{pairs[0]["after"]}","{pairs[0]["before"]}"\n')
    command = ["predict", "--run", str(finished["lora"]), "--input", str(tmp_path / "in.csv"), "--output"]
    assert main([*command, str(tmp_path / "out.csv")]) == 0
    assert capsys.readouterr().err.startswith("1 example in ")
    (row,) = csv.DictReader((tmp_path / "out.csv").open())
    assert row["what"] == "x" and row["predicted"] == first["predicted"]
    assert float(row["probability"]) == pytest.approx(first["probability"], abs=1e-5)
    assert main([*command, str(tmp_path / "out.pdf")]) == 2
    assert ".csv" in capsys.readouterr().err


def test_predict_on_two_ranks_is_the_same(finished, corpus, tmp_path):
    alone, together = tmp_path / "alone.jsonl", tmp_path / "together.jsonl"
    command = ["predict", "--run", str(finished["lora"]), "--input", str(corpus / "dev.jsonl"), "--output"]
    assert main([*command, str(alone)]) == 0
    assert run_ranks(main, 2, [*command, str(together)]) == [0, 0]
    for a, b in zip(alone.read_text().splitlines(), together.read_text().splitlines(), strict=True):
        one, two = json.loads(a), json.loads(b)
        assert one["probabilities"] == pytest.approx(two["probabilities"], abs=1e-5)


def test_evaluate_reports_what_the_run_reported(finished, corpus, capsys):
    assert main(["evaluate", "--run", str(finished["lora"]), "--data", str(corpus), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = json.loads((finished["lora"] / "results.json").read_text())["test"]
    assert found["macro_f1"] == pytest.approx(wanted["macro_f1"])
    assert found["confusion_matrix"] == wanted["confusion_matrix"]
    low, high = found["intervals_95"]["accuracy"]
    assert low <= found["accuracy"] <= high
    assert 0 <= found["expected_calibration_error"] <= 1
    mistakes = found["most_confident_mistakes"]
    assert len(mistakes) == min(20, round(15 * (1 - found["accuracy"])))
    assert all(m["label"] != m["predicted"] for m in mistakes)
    assert [m["probability"] for m in mistakes] == sorted((m["probability"] for m in mistakes), reverse=True)
    folder = finished["lora"] / "evaluation_test"
    assert (folder / "confusion_matrix.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((folder / "evaluation.json").read_text()) == found
    assert main(["evaluate", "--run", str(finished["lora"]), "--data", str(corpus), "--split", "dev"]) == 0
    assert "confusion matrix" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_a_merged_model_needs_only_transformers(finished, corpus, tmp_path, kind):
    target = tmp_path / "merged"
    assert main(["export", "--run", str(finished[kind]), "--to", str(target), "--merge"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(target).eval()
    tokenizer = AutoTokenizer.from_pretrained(target)
    from irtune.evaluation.saved_run import load_run

    loaded = load_run(finished[kind], torch.device("cpu"))
    lines = [json.loads(line) for line in (finished[kind] / "predictions.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (corpus / "dev.jsonl").read_text().splitlines()]
    from irtune.data import Example

    for row, line in zip(rows, lines):
        ids = loaded.encoder.encode(Example("x", row["before"], row["after"], 0))["input_ids"]
        with torch.no_grad():
            probabilities = model(input_ids=torch.tensor([ids])).logits.softmax(-1)[0].tolist()
        assert probabilities == pytest.approx(list(line["probabilities"].values()), abs=1e-4)
        assert model.config.id2label[max(range(len(probabilities)), key=probabilities.__getitem__)] == line["predicted"]
    assert tokenizer.pad_token_id == model.config.pad_token_id
    assert "macro-F1" in (target / "README.md").read_text()


def test_an_adapter_is_exported_with_a_card(finished, tmp_path, capsys):
    for kind in ("lora", "bottleneck"):
        assert main(["export", "--run", str(finished[kind]), "--to", str(tmp_path / kind)]) == 0
        card = (tmp_path / kind / "README.md").read_text()
        assert all(word in card for word in ("base_model:", "Layers ever trained", "## Metrics", "| test |", "Licence"))
        assert (tmp_path / kind / "adapter_model.safetensors").is_file()
    assert main(["export", "--run", str(finished["bottleneck"]), "--to", str(tmp_path / "m"), "--merge"]) == 2
    assert "cannot be merged" in capsys.readouterr().err
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".m*"))
    assert main(["export", "--run", str(finished["lora"]), "--to", str(tmp_path / "lora")]) == 2
    assert "not empty" in capsys.readouterr().err


def test_inspect_counts_steps_as_the_run_did(finished, capsys):
    assert main(["inspect", "--run", str(finished["lora"]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    results = json.loads((finished["lora"] / "results.json").read_text())
    assert [row["steps"] for row in found["layers"]] == results["steps_per_layer"]
    assert found["optimizer_state_bytes"] == results["optimizer_state_bytes"]
    assert main(["inspect", "--run", str(finished["lora"])]) == 0
    assert "finished, 6 steps, 3 selections" in capsys.readouterr().out
    assert (finished["lora"] / "layers.png").read_bytes()[:4] == b"\x89PNG"


def test_folders_that_are_no_finished_run(finished, tmp_path, corpus, capsys):
    empty, cut = tmp_path / "empty", tmp_path / "cut"
    empty.mkdir()
    shutil.copytree(finished["lora"], cut)
    (cut / "results.json").unlink()
    data = ["--data", str(corpus)]
    for command in (["evaluate", *data], ["predict", "--input", str(corpus / "dev.jsonl"), "--output", "-"],
                    ["export", "--to", str(tmp_path / "x")]):  # fmt: skip
        assert main([*command, "--run", str(empty)]) == 2
        assert "is not a run folder" in capsys.readouterr().err
        assert main([*command, "--run", str(cut)]) == 2
        said = capsys.readouterr().err
        assert "not finished" in said and "step_6" in said and "train.py --config" in said
    assert main(["inspect", "--run", str(empty)]) == 2
    assert main(["inspect", "--run", str(cut)]) == 0  # also while it runs


def test_inputs_that_do_not_fit_are_named(finished, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"old": "a", "new": "b"}\n')
    command = ["predict", "--run", str(finished["lora"]), "--input", str(tmp_path / "in.jsonl"), "--output", "-"]
    assert main(command) == 2
    assert "no column 'before'; columns: old, new" in capsys.readouterr().err
    assert main([*command, "--before", "old", "--after", "new"]) == 0
    (tmp_path / "test.jsonl").write_text('{"before": "a", "after": "b", "label": "strange"}\n')
    assert main(["evaluate", "--run", str(finished["lora"]), "--data", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "'strange'" in said and "the run knows only" in said


def test_validate_shows_what_the_model_sees(llama, corpus, capsys):
    options = ["--model.name_or_path", str(llama), "--data.path", str(corpus), "--data.max_length", "64"]
    assert main(["validate", *options, "--optim.micro_batch_size", "4", "--ranks", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batch"]["examples_per_step"] == 8 and found["examples"]["train"] == 64
    assert len(found["first_examples"]) == 3
    first = json.loads((corpus / "train.jsonl").read_text().splitlines()[0])
    assert all(word in found["first_examples"][0]["text"] for word in first["before"].split()[:3])
    assert any("warmup" in line for line in found["warnings"])
    assert main(["validate", *options]) == 0
    said = capsys.readouterr().out
    assert "the configuration can be run" in said and "memory planned per rank under ZeRO 2" in said
    assert found["planned_memory_bytes"] > 100 * 2**20  # Python with torch alone


def test_validate_finds_errors_of_several_kinds_at_once(tmp_path, capsys):
    options = ["--model.name_or_path", "./nowhere", "--data.path", "./nothing.jsonl"]
    assert main(["validate", *options]) == 2
    said = capsys.readouterr().err
    assert "./nowhere" in said and "nothing.jsonl" in said and "2 errors" in said


def test_data_stats_finds_duplicates_contradictions_and_leakage(tmp_path, capsys):
    def write(split, rows):
        lines = [{"before": b, "after": a, "label": label, "doc": doc} for b, a, label, doc in rows]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    write(
        "train",
        [("a", "b", "x", "1"), ("a", "b", "x", "1"), ("a", "b", "y", "1"), ("c", "", "y", "2"), ("d", "d", "x", "3")],
    )
    write("dev", [("a", "b", "x", "2"), ("", "z", "y", "4")])
    assert main(["data", "stats", "--data", str(tmp_path), "--data.group", "doc", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    train, dev = found["splits"]["train"], found["splits"]["dev"]
    assert (train["rows"], train["duplicates"], train["contradictions"], train["unchanged"]) == (5, 2, 1, 1)
    assert (train["empty_after"], dev["empty_before"]) == (1, 1)
    assert train["labels"] == {"x": 3, "y": 2}
    assert (found["pairs_in_several_splits"], found["documents_in_several_splits"]) == (1, 1)
    assert main(["data", "stats", "--data", str(tmp_path), "--data.group", "doc"]) == 0
    said = capsys.readouterr().out
    assert "leakage: 1 pair of texts is in more than one split; 1 document is\n" in said
    assert main(["data", "stats", "--data", str(tmp_path)]) == 0
    assert "documents unknown" in capsys.readouterr().out
    assert main(["data", "stat"]) == 2


def test_crossvalidation_holds_every_example_out_once(llama, corpus, tmp_path):
    folder = tmp_path / "cv"
    command = ["crossvalidate", "--folds", "2", "--output_dir", str(folder), "--model.name_or_path", str(llama),
               "--model.dtype", "float32", "--data.path", str(corpus), "--data.max_length", "64",
               "--optim.max_steps", "2", "--optim.micro_batch_size", "4"]  # fmt: skip
    with forked_after(0):  # test_compare starts one as always
        assert main(command) == 0
    ids = []
    for fold in (1, 2):
        lines = (folder / f"fold_{fold}/predictions.jsonl").read_text().splitlines()
        ids += [json.loads(line)["id"] for line in lines]
    assert len(ids) == len(set(ids)) == 64 + 20
    found = json.loads((folder / "crossvalidate.json").read_text())
    assert found["folds"] == 2 and len(found["metrics"]["macro_f1"]["folds"]) == 2 and not found["errors"]
    # Every training row has a prediction of the run that did not see it; test_curate.py says what is made of them.
    assert len(read_folds(folder).probabilities) == 64
    assert main(["data", "curate", "--folds", str(folder)]) == 0


@pytest.mark.quick
def test_baselines_say_what_is_easily_reached(corpus, capsys):
    assert main(["data", "baseline", "--data", str(corpus), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    labels = [json.loads(line)["label"] for line in (corpus / "dev.jsonl").read_text().splitlines()]
    (always,) = (name for name in rows if name.startswith("always "))
    assert rows[always]["accuracy"] == pytest.approx(labels.count(always.removeprefix("always ")) / len(labels))
    assert rows["linear model of changed words"]["accuracy"] >= rows[always]["accuracy"]
    assert main(["data", "baseline", "--data", str(corpus)]) == 0
    assert "linear model of changed words" in capsys.readouterr().out


@pytest.mark.quick
def test_json_is_all_of_stdout_also_beside_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a process of its own
    for split, labels in (("train", "xyxy"), ("dev", "xx")):
        lines = [json.dumps({"before": f"{split}{i}", "after": "", "label": label}) for i, label in enumerate(labels)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    assert main(["data", "stats", "--data", str(tmp_path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["splits"]["dev"]["labels"] == {"x": 2, "y": 0}
    assert "the dev split has no example of 'y'" in err


@pytest.mark.quick
def test_one_corpus_under_several_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    for name in ("corpus", "corpus/", "./corpus", str(tmp_path / "corpus")):
        assert _same(name, "corpus")
    assert _same("someone/corpus", "someone/corpus")
    assert not _same("corpus/en", "corpus") and not _same("corpus", None)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"predicted": "x"}, "the input's column predicted is kept; the new ones are predicted_2, "),
        (
            {"predicted": "x", "probability": 1},
            "the input's columns predicted, probability are kept; the new ones are ",
        ),
    ],
)
def test_columns_that_are_kept_are_counted(row, said, capsys):
    found = {"predicted": "b", "probability": 0.75, "probabilities": {"a": 0.25, "b": 0.75}}
    _write(None, [(1, row)], [found], SimpleNamespace())
    out, err = capsys.readouterr()
    assert err.startswith(said)
    assert json.loads(out) == row | {
        "predicted_2": "b", "probability_2": 0.75, "probabilities_2": {"a": 0.25, "b": 0.75},
    }  # fmt: skip
