"""What is exported can be used: by irtune's own commands, and by the code of its model card."""

import contextlib
import csv
import io
import json
import re
import shutil

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from irtune.adapters.build import add_adapters
from irtune.cli import main
from irtune.config import write_config
from irtune.data import Example
from irtune.evaluation.saved_run import load_run
from irtune.models import load_classifier
from tests.support import zoo
from tests.support.runs import launch
from tests.support.tiny import tiny_config

KINDS = {
    "lora": {},
    "bottleneck": {"adapter__size": 8},
    "template": {"data__template": "Old {before} New {after} {{{labels}}}"},
    "plain": {"data__prompt": "plain", "data__max_length": 16},
    "single": {"data__after": "null"},
}


@pytest.fixture(scope="module")
def bare_llama(llama, tmp_path_factory):
    """A model whose tokenizer has no padding token, as most language models' have none."""
    folder = shutil.copytree(llama, tmp_path_factory.mktemp("bare") / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    return folder


@pytest.fixture(scope="module")
def runs(bare_llama, bert, corpus, tmp_path_factory):
    folders = {}
    for kind, options in KINDS.items():
        folder = tmp_path_factory.mktemp(kind) / "run"
        adapter = kind if kind == "bottleneck" else "lora"
        config = tiny_config(bare_llama, corpus, folder, 0, adapter__type=adapter, optim__lr=0.05, **options)
        folders[kind] = launch(config, 1)
    config = tiny_config(bert, corpus, tmp_path_factory.mktemp("bert") / "run", 0, data__prompt="plain", optim__lr=0.05)
    return folders | {"bert": launch(config, 1)}


def export(run, target, *options):
    assert main(["export", "--run", str(run), "--to", str(target), *options]) == 0
    return target


EXPORTS = [(kind, merge) for kind in (*KINDS, "bert") for merge in (False, True)]
EXPORTS.remove(("bottleneck", True))  # cannot be merged


@pytest.mark.parametrize(("kind", "merge"), EXPORTS)
def test_the_code_of_a_model_card_gives_what_the_run_gives(runs, tmp_path, kind, merge):
    target = export(runs[kind], tmp_path / "exported", *(["--merge"] if merge else []))
    card = (target / "README.md").read_text()
    ((_, code),) = re.findall(r"^(```+)python\n(.*?)^\1$", card, re.MULTILINE | re.DOTALL)
    code = code.replace("THIS_FOLDER", str(target))
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(code, "README.md", "exec"), names)
    run = load_run(runs[kind], torch.device("cpu"))
    rows = [Example("1", *(example if len(example) == 2 else (*example, None)), 0) for example in names["examples"]]
    wanted = run.predict(rows, 2).probabilities
    torch.testing.assert_close(names["probabilities"].float(), wanted, rtol=0, atol=1e-5)
    best = [run.labels[int(row.argmax())] for row in wanted]
    assert [line.split(" ")[0] for line in said.getvalue().splitlines()] == best
    assert len(rows) == 2 and len({len(run.encoder.encode(row)["input_ids"]) for row in rows}) == 2  # one is padded
    if "model" in names:
        assert list(names["model"].config.id2label.values()) == run.labels
        long = rows[0].before * 40
        first = run.encoder.encode(Example("1", long, rows[0].after, 0))
        assert names["encode"](*([long, rows[0].after] if rows[0].after is not None else [long])) == first


@pytest.mark.parametrize(("kind", "merge"), EXPORTS)
def test_an_export_predicts_and_evaluates_like_the_run(runs, corpus, tmp_path, capsys, kind, merge):
    target = export(runs[kind], tmp_path / "exported", *(["--merge"] if merge else []))
    config = yaml.safe_load((target / "config.yaml").read_text())
    assert config["data"]["path"] == corpus.name and str(tmp_path.parent) not in json.dumps(config["run"])
    moved = shutil.move(target, tmp_path / "elsewhere")
    found = []
    for folder in (runs[kind], moved):
        out = tmp_path / "out.jsonl"
        command = ["predict", "--run", str(folder), "--input", str(corpus / "dev.jsonl"), "--output", str(out)]
        assert main(command) == 0
        found.append([list(json.loads(line)["probabilities"].values()) for line in out.read_text().splitlines()])
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=0, atol=1e-4 if merge else 1e-6)
    capsys.readouterr()
    assert main(["evaluate", "--run", str(moved), "--data", str(corpus), "--split", "test", "--json"]) == 0
    wanted = json.loads((runs[kind] / "results.json").read_text())["test"]
    assert json.loads(capsys.readouterr().out)["confusion_matrix"] == wanted["confusion_matrix"]


def test_exports_that_were_changed_are_refused(runs, corpus, tmp_path, capsys):
    target = export(runs["lora"], tmp_path / "merged", "--merge")
    command = [
        "predict",
        "--run",
        str(target),
        "--input",
        str(corpus / "dev.jsonl"),
        "--output",
        str(tmp_path / "o.csv"),
    ]
    settings = json.loads((target / "config.json").read_text())
    labels = settings["id2label"]
    exchanged = {"id2label": labels | {"0": labels["1"], "1": labels["0"]}}
    (target / "config.json").write_text(json.dumps(settings | exchanged))
    assert main(command) == 2
    assert "do not belong together" in capsys.readouterr().err
    (target / "config.json").write_text(json.dumps(settings))
    (target / "model.safetensors").rename(tmp_path / "outside")
    (target / "model.safetensors").symlink_to(tmp_path / "outside")
    assert main(command) == 2
    assert "is a link that leads out of the export" in capsys.readouterr().err
    assert main(["export", "--run", str(target), "--to", str(tmp_path / "again")]) == 2
    assert "holds no adapter" in capsys.readouterr().err
    adapter = export(runs["lora"], tmp_path / "adapter")
    again = export(adapter, tmp_path / "twice")
    assert (again / "adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()
    content = bytearray((adapter / "adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (adapter / "adapter_model.safetensors").write_bytes(bytes(content))
    assert main([*command[:2], str(adapter), *command[3:]]) == 2
    assert "a different checksum" in capsys.readouterr().err
    assert not (tmp_path / "o.csv").exists()


# ----- predict and the user's columns -----


def table(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_columns_of_the_input_are_kept_and_a_labelled_file_can_be_labelled_again(runs, tmp_path, capsys):
    rows = [{"before": "The work", "after": "A teacher", "predicted": "mine", "probability": 7, "p_style": "x",
             "probabilities": [1, {"a": None}], "n": float("nan")}]  # fmt: skip
    first = tmp_path / "first.jsonl"
    first.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def label(source, target):
        command = ["predict", "--run", str(runs["lora"]), "--input", str(source), "--output", str(target)]
        assert main(command) == 0
        return capsys.readouterr().err

    said = label(first, tmp_path / "second.jsonl")
    assert "the input's columns predicted, probability, probabilities are kept; the new ones are predicted_2" in said

    def never(text):
        raise AssertionError(f"{text} is not JSON")

    (found,) = [json.loads(line, parse_constant=never) for line in (tmp_path / "second.jsonl").read_text().splitlines()]
    assert {name: found[name] for name in rows[0] if name != "n"} == {k: v for k, v in rows[0].items() if k != "n"}
    assert found["n"] is None
    assert found["predicted_2"] in found["probabilities_2"] and 0 < found["probability_2"] < 1
    assert "predicted_3" in label(tmp_path / "second.jsonl", tmp_path / "third.jsonl")

    label(first, tmp_path / "second.csv")
    header, cells = table(tmp_path / "second.csv")
    assert len(set(header)) == len(header)
    row = dict(zip(header, cells))
    assert (row["predicted"], row["probability"], row["p_style"]) == ("mine", "7", "x")
    assert json.loads(row["probabilities"]) == rows[0]["probabilities"] and row["n"] == ""
    assert row["predicted_2"] == found["predicted_2"]
    assert float(row["p_style_2"]) == pytest.approx(found["probabilities_2"]["style"])
    label(tmp_path / "second.csv", tmp_path / "third.csv")
    third = table(tmp_path / "third.csv")
    assert third[0][: len(header)] == header and third[1][: len(cells)] == cells
    assert third[0][len(header)] == "predicted_3" and len(set(third[0])) == len(third[0])


def test_without_such_columns_the_names_are_plain(runs, corpus, tmp_path, capsys):
    target = tmp_path / "out.tsv"
    command = ["predict", "--run", str(runs["lora"]), "--input", str(corpus / "dev.jsonl"), "--output", str(target)]
    assert main(command) == 0
    assert "are kept" not in capsys.readouterr().err
    header = target.read_text().splitlines()[0].split("\t")
    assert header[4:7] == ["predicted", "probability", "p_clarity"]


def test_the_input_is_not_written_over(runs, corpus, tmp_path, capsys):
    source = tmp_path / "new.jsonl"
    shutil.copy(corpus / "dev.jsonl", source)
    (tmp_path / "link.jsonl").symlink_to(source)
    for target in (source, tmp_path / "link.jsonl"):
        before = source.read_bytes()
        assert main(["predict", "--run", str(runs["lora"]), "--input", str(source), "--output", str(target)]) == 2
        assert "is the input, which would be written over" in capsys.readouterr().err
        assert source.read_bytes() == before


def finished(model, tmp_path, **options):
    """The folder of a run as if it had trained."""
    labels, folder = list(zoo.LABELS), tmp_path / "run"
    config = tiny_config(model, zoo.corpus(tmp_path / "corpus"), folder, 0, data__prompt="plain", **options)
    torch.manual_seed(0)
    adapted, table = add_adapters(load_classifier(config.model, labels), config.adapter)
    for _, parameter in table.all():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder / "adapter")
    write_config(config, folder / "config.yaml")
    dev = {"examples": 1, "accuracy": 0.0, "macro_f1": 0.0, "auprc": 0.0, "per_class": dict.fromkeys(labels)}
    results = {"dev": dev, "steps_per_layer": [1] * 4, "num_layers": 4, "steps": 1, "layers_trained_per_step": 4.0}
    (folder / "results.json").write_text(json.dumps(results | {"versions": {"irtune": "0"}}))
    return folder


def runs_as_the_run_does(card, target, folder):
    names: dict = {}
    exec(card.split("```python\n")[1].split("```")[0].replace("THIS_FOLDER", str(target)), names)
    rows = [Example("1", *example, 0) for example in names["examples"]]
    wanted = load_run(folder, torch.device("cpu")).predict(rows, 2).probabilities
    torch.testing.assert_close(names["probabilities"].float(), wanted, rtol=0, atol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("merge", [False, True])
def test_what_reads_the_last_place_is_padded_on_the_left_and_no_start_is_told(tmp_path, merge):
    folder = finished(zoo.build("xlnet", tmp_path), tmp_path, model__start_from=tmp_path / "other")
    target = export(folder, tmp_path / "exported", *(["--merge"] if merge else []))
    assert yaml.safe_load((target / "config.yaml").read_text())["model"].get("start_from") is None
    card = (target / "README.md").read_text()
    assert 'padding_side="left"' in card
    runs_as_the_run_does(card, target, folder)


@pytest.mark.quick
def test_a_padding_token_is_set_where_a_model_of_texts_and_pictures_reads_it(tmp_path):
    model = zoo.build("gemma3", tmp_path)
    settings = json.loads((model / "config.json").read_text())
    settings["pad_token_id"] = settings["text_config"]["pad_token_id"] = None
    (model / "config.json").write_text(json.dumps(settings))
    folder = finished(model, tmp_path)
    target = export(folder, tmp_path / "exported")
    runs_as_the_run_does((target / "README.md").read_text(), target, folder)


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["vera", "lokr"])
def test_other_low_rank_types_merge_beside_a_head_of_several_modules(tmp_path, kind):
    folder = finished(zoo.build("roberta", tmp_path), tmp_path, adapter__type=kind)
    target = export(folder, tmp_path / "exported", "--merge")
    runs_as_the_run_does((target / "README.md").read_text(), target, folder)
