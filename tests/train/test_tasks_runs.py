"""Whole runs of every task and option: on any ranks, resumed in the middle, and what commands make of them.

All runs of a number of ranks share their processes.
"""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from irtune.cli import main
from irtune.evaluation.saved_run import load_run
from tests.support.ranks import run_cases
from tests.support.runs import losses, selections, train
from tests.support.tiny import tiny_config

MULTI = {"data__multi_label": "true", "run__thresholds": "tuned"}
OPTIONS = {
    "multi": MULTI,
    "prompt": MULTI | {"adapter__type": "prompt", "adapter__prompt_init": "labels", "adapter__prompt_lr": 300,
                       "data__label": "text", "data__label_separator": "|"},
    "mixing": {"data__label": "one", "optim__mixup": 0.4, "optim__contrastive": 0.5, "data__augment": "eda",
               "model__pooling": "mean", "model__head": "mlp"},
    "contrast": {"data__label": "one", "optim__contrastive": 0.5, "adapter__type": "prompt"},
    "packed": {"data__label": "one", "data__padding_free": "true"},
    "value": {"data__task": "regression", "data__label": "value", "optim__lr": 0.001},
}  # fmt: skip


@pytest.fixture(scope="module")
def several(corpus, tmp_path_factory) -> Path:
    """The corpus with a set of labels (a list, a text) and a value in place of each label."""
    folder = tmp_path_factory.mktemp("several")
    for split in ("train", "dev", "test"):
        rows = [json.loads(line) for line in (corpus / f"{split}.jsonl").read_text().splitlines()]
        for row in rows:
            long = len(row["after"]) > 70
            labels = [] if row["label"] == "style" else [row["label"], *(["long"] if long else [])]
            row |= {"one": row["label"], "label": labels, "text": "|".join(labels), "value": len(row["after"]) / 100}
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def cut(whole: Path, folder: Path) -> None:
    """The run as a kill after step 3 leaves it."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints/step_6")
    (folder / "checkpoints/latest").write_text("step_3")
    (folder / "checkpoints/best").write_text("step_3")


def train_and_resume(config, again):
    """Errors of a run, and of one that goes on from its middle."""
    said = train(config)
    if again is not None:
        from irtune.distributed import runtime

        if runtime.rank() == 0:
            cut(Path(config.run.output_dir), Path(again.run.output_dir))
        said = said or train(again)
    return said


@pytest.fixture(scope="module")
def runs(llama, several, tmp_path_factory) -> dict[tuple[str, int], Path]:
    """Folders by option and ranks: two micro-batches per step each; with 0 ranks, the resumed ones."""
    folder = tmp_path_factory.mktemp("tasks")
    found = {}
    for world in (1, 2):
        cases = []
        for name, options in OPTIONS.items():
            found[name, world] = folder / f"{name}{world}"
            configs = [
                tiny_config(llama, several, place, 2, optim__gradient_accumulation_steps=2 // world, **options)
                for place in (found[name, world], folder / f"{name}0")
            ]
            cases.append((configs[0], configs[1] if world == 1 else None))
            found[name, 0] = folder / f"{name}0"
        for said in run_cases(train_and_resume, world, cases):
            assert said == [None] * world
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_is_the_same_on_any_ranks_and_after_a_break(runs, name):
    one, two, resumed = (runs[name, world] for world in (1, 2, 0))
    assert losses(two) == pytest.approx(losses(one), rel=1e-4) and selections(two) == selections(one)
    assert losses(resumed) == losses(one)
    assert (resumed / "predictions.jsonl").read_text() == (one / "predictions.jsonl").read_text()


@pytest.mark.slow
def test_a_run_of_sets_tells_what_it_decides(runs):
    results = json.loads((runs["multi", 1] / "results.json").read_text())
    labels = ["clarity", "coherence", "fluency", "long", "meaning-changed"]
    assert list(results["dev"]["per_class"]) == list(results["thresholds"]) == labels
    assert {"macro_f1", "micro_f1", "auprc", "jaccard"} <= set(results["test"])
    records = [json.loads(line) for line in (runs["multi", 1] / "predictions.jsonl").read_text().splitlines()]
    for record in records:
        chosen = [name for name in labels if record["probabilities"][name] > results["thresholds"][name]]
        assert record["predicted"] == chosen
    right = sum(record["label"] == record["predicted"] for record in records) / len(records)
    assert results["dev"]["accuracy"] == pytest.approx(right)


@pytest.mark.slow
def test_commands_predict_evaluate_and_export_what_a_run_has_learnt(runs, several, tmp_path, capsys):
    for name, label in (("multi", "label"), ("prompt", "text"), ("value", "value")):
        run = runs[name, 1]
        results = json.loads((run / "results.json").read_text())
        assert main(["evaluate", "--run", str(run), "--data", str(several), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        for metric in ("loss", *(("macro_f1", "jaccard") if name != "value" else ("pearson", "r2"))):
            assert found[metric] == pytest.approx(results["test"][metric], rel=1e-4, abs=1e-5)
        for suffix in (".csv", ".jsonl"):
            file = tmp_path / f"{name}{suffix}"
            assert (
                main(["predict", "--run", str(run), "--input", str(several / "test.jsonl"), "--output", str(file)]) == 0
            )
        kept = [json.loads(line) for line in (run / "predictions_test.jsonl").read_text().splitlines()]
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        table = list(csv.DictReader((tmp_path / f"{name}.csv").open(newline="")))
        for old, row, cells in zip(kept, rows, table, strict=True):
            if name == "value":
                assert row["predicted"] == pytest.approx(old["predicted"], abs=1e-4) and "probabilities" not in row
                assert float(cells["predicted"]) == row["predicted"] and old["label"] == row[label]
                continue
            assert row["predicted"] == old["predicted"] and "probability" not in row
            assert float(cells["p_long"]) == pytest.approx(old["probabilities"]["long"], abs=1e-4)
            wanted = "|".join(old["predicted"]) if name == "prompt" else json.dumps(old["predicted"])
            assert cells["predicted"] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("multi", "multi_label_classification"), ("value", "regression")])
def test_an_export_says_what_kind_of_problem_it_is(runs, several, tmp_path, name, kind):
    assert main(["export", "--run", str(runs[name, 1]), "--to", str(tmp_path / "merged"), "--merge"]) == 0
    settings = json.loads((tmp_path / "merged/config.json").read_text())
    assert settings["problem_type"] == kind
    card = (tmp_path / "merged/README.md").read_text()
    assert ("| split | examples | macro-F1 | micro-F1 |" in card) == (name == "multi")
    run, merged = (load_run(folder, torch.device("cpu")) for folder in (runs[name, 1], tmp_path / "merged"))
    assert merged.task == run.task and merged.labels == run.labels


@pytest.mark.quick
def test_ptec_starts_from_the_words_of_its_labels(llama):
    from irtune.adapters.build import add_adapters
    from irtune.adapters.kinds.prompt import label_tokens
    from irtune.config import AdapterConfig, ModelConfig
    from irtune.models import load_classifier

    classifier = load_classifier(ModelConfig(name_or_path=str(llama), dtype="float32"), ["library the", "mill"])
    words = classifier.tokenizer("library the mill", add_special_tokens=False)["input_ids"]
    size = classifier.model.get_input_embeddings().num_embeddings
    assert label_tokens(classifier, 5, size).tolist() == [*words, 1000 % size, 1001 % size]
    few = label_tokens(classifier, 2, size).tolist()
    assert few == [token for token in words if token in few] and len(few) == 2
    table = classifier.model.get_input_embeddings().weight.detach().clone()
    options = {"type": "prompt", "num_tokens": 5, "prompt_init": "labels"}
    model, _ = add_adapters(classifier, AdapterConfig(**options, prompt_lr=10.0))
    torch.testing.assert_close(model.prompt.weight * 10, table[[*words, 1000 % size, 1001 % size]])
