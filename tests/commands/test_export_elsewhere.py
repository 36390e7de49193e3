"""What is exported for others: adapters that vLLM's loader takes, and ONNX graphs with the run's logits."""

import contextlib
import io
import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from irtune.cli import main
from irtune.commands.export import onnx
from irtune.data import Example, collate
from irtune.evaluation.saved_run import load_run
from tests.support import tiny, vllm_rules
from tests.support.finished import finished_run

ROWS = [
    Example("1", "The work was a good work", "The work was good", 0),
    Example("2", "", "A teacher", 0),
    Example("3", "The teacher", "The teacher", 0),
]


def export(run, target, *options) -> str:
    """What the command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["export", "--run", str(run), "--to", str(target), *options]) == 0
    return said.getvalue()


def card_code(folder) -> str:
    ((_, code),) = re.findall(r"^(```+)python\n(.*?)^\1$", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return code.replace("THIS_FOLDER", str(folder))


# ----- vLLM -----


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_vllm_loads_an_exported_adapter_of_a_decoder_and_computes_what_the_run_does(llama, corpus, tmp_path, kind):
    run = finished_run(tmp_path / "run", llama, corpus, adapter__type=kind, adapter__r=9)
    target = tmp_path / "exported"
    assert "README.md has the command with which vLLM serves it" in export(run, target)
    card = (target / "README.md").read_text()
    head = re.escape('{"num_labels": 5, "problem_type": "single_label_classification"}')
    assert re.search(rf"vllm serve {llama} --runner pooling --convert classify --hf-overrides '{head}' --dtype float32 "
                     r"--enable-lora --max-lora-rank 16 --lora-modules irtune=THIS_FOLDER\n", card)  # fmt: skip
    assert json.loads((target / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
    served = vllm_rules.load(target, most_rank=16, labels=5, width=32, modules=vllm_rules.LLAMA)
    with pytest.raises(vllm_rules.RefusedError, match="rank 9 of 8"):
        vllm_rules.load(target, most_rank=8, labels=5, width=32, modules=vllm_rules.LLAMA)
    assert len(served.updates) == 6 * 7 and served.bias is None
    # A plain model with what was loaded, one text at a time without padding, as vLLM computes.
    loaded = load_run(run, torch.device("cpu"))
    plain = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=5, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, update in served.updates.items():
            plain.get_submodule(name).weight += update
        plain.score.weight.copy_(served.weight)
        logits = [plain(torch.tensor([loaded.encoder.encode(row)["input_ids"]])).logits for row in ROWS]
    torch.testing.assert_close(torch.cat(logits).softmax(-1), loaded.predict(ROWS, 2).probabilities, rtol=0, atol=1e-5)


REFUSED = {
    "dora": ({"adapter__type": "dora"}, "vLLM does not load adapter.type dora"),
    "pissa": ({"adapter__type": "pissa"}, "vLLM does not load adapter.type pissa"),
    "rank": ({"adapter__r": 513}, "adapter.r is 513, and vLLM takes ranks up to 512"),
    "bottleneck": ({"adapter__type": "bottleneck", "adapter__size": 4}, "adapter.type bottleneck is not one of LoRA's"),
    "pooling": (
        {"model__pooling": "last"},
        "model.pooling last has a head of irtune's own; train with model.pooling "
        "class, which in a decoder reads the last token",
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("case", REFUSED)
def test_what_vllm_would_refuse_is_said_with_what_helps(llama, corpus, tmp_path, case):
    options, sentence = REFUSED[case]
    run = finished_run(tmp_path / "run", llama, corpus, **options)
    target = tmp_path / "exported"
    assert f"vLLM 0.33.0 cannot serve it: {sentence}" in export(run, target)
    assert sentence in (target / "README.md").read_text() and "vllm serve" not in (target / "README.md").read_text()
    with pytest.raises((vllm_rules.RefusedError, KeyError)):
        vllm_rules.load(target, most_rank=512, labels=5, width=32, modules=vllm_rules.LLAMA)


@pytest.mark.quick
def test_vllm_gives_an_encoder_no_head_and_serves_it_merged(bert, corpus, tmp_path):
    run = finished_run(tmp_path / "run", bert, corpus, data__prompt="plain")
    assert "its head is classifier, and vLLM gives a base without one only 'score'" in export(run, tmp_path / "one")
    assert "README.md has the command with which vLLM serves it" in export(run, tmp_path / "two", "--merge")
    card = (tmp_path / "two/README.md").read_text()
    assert "vllm serve THIS_FOLDER --runner pooling --convert classify\n" in card
    settings = json.loads((tmp_path / "two/config.json").read_text())
    assert settings["architectures"] == ["BertForSequenceClassification"] and len(settings["id2label"]) == 5


# ----- ONNX -----

EDITS = {"model__pooling": "mean+edit", "data__prompt": "diff"}
SIDES = {"model__pooling": "mean", "model__head": "cross"}
TYPES = {"adapter__type": "bottleneck", "adapter__size": 4, "data__prompt": "plain"}


@pytest.mark.slow
@pytest.mark.parametrize(("options", "third"), [(EDITS, "edit_mask"), (SIDES, "side_mask"), (TYPES, "token_type_ids")])
def test_a_graph_gives_the_logits_of_the_run_for_any_batch_and_length(corpus, tmp_path, options, third):
    session_of = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed").InferenceSession
    bert = tiny.save_model(tmp_path / "bert", "bert", layers=1)
    if options is TYPES:
        settings = json.loads((bert / "tokenizer_config.json").read_text())
        names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
        (bert / "tokenizer_config.json").write_text(json.dumps(settings | names))
    run = finished_run(tmp_path / "run", bert, corpus, **options)
    target = tmp_path / "graph"
    said = export(run, target, "--onnx")
    names = ["input_ids", "attention_mask", third]
    assert f"model.onnx takes {', '.join(names)} [batch, length] and gives logits [batch, 5]" in said
    session = session_of(target / "model.onnx", providers=["CPUExecutionProvider"])
    assert [(one.name, one.shape) for one in session.get_inputs()] == [(name, ["batch", "length"]) for name in names]
    loaded = load_run(run, torch.device("cpu"))
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["labels"]) == loaded.labels and json.loads(facts["max_length"]) == 64
    for rows in (ROWS, ROWS[1:2], [*ROWS, Example("4", "The work " * 60, "The teacher " * 60, 0)]):
        batch = collate([loaded.encoder.encode(row) for row in rows], loaded.classifier.tokenizer.pad_token_id)
        with torch.no_grad():
            wanted = loaded.model(**batch).logits
        (found,) = session.run(["logits"], {name: batch[name].numpy() for name in names})
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-5)
    assert onnx._difference(batch, wanted + 1, target / "model.onnx") == pytest.approx(1, abs=1e-4)
    if options is SIDES:  # its texts are not written without irtune
        assert "# batch: what irtune makes of texts, load_run" in card_code(target)
        return
    made: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(card_code(target), "README.md", "exec"), made)
    assert made["logits"].dtype == np.float32 and made["LABELS"][made["logits"][0].argmax()] in printed.getvalue()
    if options is TYPES:
        again = loaded.predict([Example("1", *example, 0) for example in made["examples"]], 2).probabilities
        torch.testing.assert_close(torch.from_numpy(made["logits"]).softmax(-1), again, rtol=0, atol=1e-5)


@pytest.mark.quick
def test_without_the_packages_and_where_torch_cannot_export_one_sentence_is_said(
    llama, corpus, tmp_path, capsys, monkeypatch
):
    run = finished_run(tmp_path / "run", llama, corpus)
    command = ["export", "--run", str(run), "--to", str(tmp_path / "graph"), "--onnx"]

    def fails(*_, **__):
        raise RuntimeError("this operator is not known")

    monkeypatch.setattr(torch.onnx, "export", fails)
    monkeypatch.setattr(onnx, "NEEDED", ())
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "torch cannot export LlamaForSequenceClassification with adapter.type lora to ONNX: this operator" in said
    monkeypatch.setattr(onnx, "NEEDED", ("json", "onnx_is_absent"))
    assert main(command) == 2
    assert "export --onnx needs onnx_is_absent: pip install 'irtune[onnx]'" in capsys.readouterr().err
    assert main([*command, "--merge"]) == 2
    assert "not allowed with" in capsys.readouterr().err
    assert not (tmp_path / "graph").exists()
