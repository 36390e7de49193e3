"""Top layers that start anew: which, with what, and that they stay what they were wherever they never train."""

import dataclasses
import json

import pytest
import torch

from irtune.commands import export
from irtune.config import ModelConfig, load_config
from irtune.data import read_corpus
from irtune.errors import ConfigError, ModelError
from irtune.evaluation.metrics import metrics
from irtune.evaluation.saved_run import load_run
from irtune.models import load_classifier
from tests.support.runs import cut_back, launch, losses
from tests.support.tiny import tiny_config

OWN = {"adapter__type": "none", "adapter__dtype": "model", "model__restart_layers": 1, "optim__max_steps": 4}


def layers_of(folder, count, dtype="float32"):
    config = ModelConfig(name_or_path=str(folder), dtype=dtype, restart_layers=count)
    classifier = load_classifier(config, ["a", "b"])
    return [
        dict(layer.named_parameters()) for layer in classifier.model.get_submodule(classifier.anatomy.layers).children()
    ]


def same(one, other):
    return {name: torch.equal(one[name], other[name]) for name in one}


@pytest.mark.quick
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_the_last_layers_and_no_other_start_as_their_class_draws_them(request, architecture):
    folder = request.getfixturevalue(architecture)
    pretrained, restarted = layers_of(folder, 0), layers_of(folder, 2)
    assert all(all(same(a, b).values()) for a, b in zip(pretrained[:-2], restarted[:-2], strict=True))
    for old, new in zip(pretrained[-2:], restarted[-2:]):
        for name, weight in new.items():
            if weight.dim() > 1:
                assert not torch.equal(old[name], weight)
                assert abs(float(weight.std()) - 0.02) < 0.005
            else:
                assert set(weight.tolist()) <= {0.0, 1.0}  # biases and norms
    matrices = [name for name, weight in restarted[-1].items() if weight.dim() > 1]
    assert not any(torch.equal(restarted[-1][name], restarted[-2][name]) for name in matrices)
    again, low = layers_of(folder, 2), layers_of(folder, 2, "bfloat16")
    assert all(all(same(a, b).values()) for a, b in zip(again, restarted))
    assert all(torch.equal(low[-1][name], restarted[-1][name].bfloat16()) for name in matrices)


@pytest.mark.quick
def test_what_cannot_start_anew_is_refused(llama, monkeypatch):
    for options, sentence in (
        (["--adapter.type=lora"], "random weights would never train under adapter.type lora; set adapter.type to none"),
        (["--adapter.type=none", "--model.start_from=x"], "both set the start of the layers; remove one of the two"),
        (["--adapter.type=none", "--model.restart_layers=-1"], r"model\.restart_layers"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            load_config(["--data.path=x", "--model.restart_layers=2", *options])
    count = len(layers_of(llama, 0))
    with pytest.raises(ConfigError, match=f"is {count + 1}, and the model has {count} layers; accepted: at most that"):
        layers_of(llama, count + 1)
    from transformers import LlamaForSequenceClassification

    monkeypatch.setattr(LlamaForSequenceClassification, "_init_weights", lambda self, part: None)
    with pytest.raises(ModelError, match=r"LlamaForSequenceClassification does not say how .* of a layer starts"):
        layers_of(llama, 1)


def test_layers_that_never_train_stay_as_they_began_on_every_stage(llama, corpus, tmp_path):
    more = OWN | {"tuning__method": "fixed", "tuning__layers": "0,1"}
    found = []
    for stage, world in ((0, 1), (2, 2), (3, 2)):
        config = tiny_config(
            llama, corpus, tmp_path / f"stage{stage}", stage, optim__gradient_accumulation_steps=2 // world, **more
        )
        found.append(losses(launch(config, world)))
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[2] == pytest.approx(found[0], rel=1e-4)
    plain = launch(tiny_config(llama, corpus, tmp_path / "plain", **(more | {"model__restart_layers": 0})), 1)
    assert losses(plain)[0] != pytest.approx(found[0][0], rel=1e-6)
    # Loaded, and merged: what never trained is in no file of the run, and is drawn again.
    dev = read_corpus(config.data).splits["dev"]
    for stage in (0, 3):
        run = load_run(tmp_path / f"stage{stage}", torch.device("cpu"))
        told = json.loads((run.folder / "results.json").read_text())["dev"]
        assert metrics(run.predict(dev, 4), run.labels)["loss"] == pytest.approx(told["loss"], rel=1e-4)
    assert export.main(["--run", str(run.folder), "--to", str(tmp_path / "merged"), "--merge"]) == 0
    merged = load_run(tmp_path / "merged", torch.device("cpu"))
    assert merged.config.model.restart_layers == 0
    torch.testing.assert_close(merged.predict(dev, 4).logits, run.predict(dev, 4).logits, atol=1e-4, rtol=0)


def test_a_stopped_run_goes_on_with_them(llama, corpus, tmp_path):
    first = tiny_config(llama, corpus, tmp_path / "whole", run__eval_every=2, **OWN)
    whole = launch(first, 1)
    again = dataclasses.replace(first, run=dataclasses.replace(first.run, output_dir=str(tmp_path / "parts")))
    cut_back(whole, tmp_path / "parts", last=4, kept=2)
    assert losses(launch(again, 1)) == losses(whole)
