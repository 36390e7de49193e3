"""A new adapter type and a new method are one file each, outside irtune, and train together on two ranks."""

import json
import shutil
import sys

import pytest
import torch

from irtune.adapters import load_adapter
from irtune.config import load_config
from irtune.config.declarations import adapter_kinds, methods
from irtune.evaluation.saved_run import load_run
from irtune.models import load_classifier
from tests.config.test_declarations import install
from tests.support.ranks import run_ranks
from tests.support.runs import losses, selections, train
from tests.support.tiny import LAYERS, tiny_config

GATE = '''
"""A learnt factor on each layer's feed-forward block: (1 + c) * output, c zero at first."""

import torch
from torch import nn

from irtune.adapters.trainable import freeze, layer_list, train_with_head
from irtune.config.declarations import AdapterKind


class Gate(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.change = nn.Parameter(torch.zeros(width))

    def forward(self, output):
        return (output * (1 + self.change)).to(output.dtype)


def build(classifier, adapter):
    freeze(classifier.model)
    added = []
    for layer in layer_list(classifier):
        layer.gate = gate = Gate(layer.mlp.down_proj.out_features)
        layer.mlp.down_proj.register_forward_hook(lambda _module, _inputs, output, gate=gate: gate(output))
        added += gate.parameters()
    train_with_head(classifier, adapter, added)
    return classifier.model


KIND = AdapterKind(name="gate", summary="a learnt factor on each feed-forward block", build=build)
'''
EVERY_OTHER = '''
"""Even layers and odd layers in turn."""

from irtune.config.declarations import Method
from irtune.selection.chooser import Chooser


class EveryOtherChooser(Chooser):
    def first(self):
        return list(range(0, self.num_layers, 2))

    def choose(self, seen):
        return list(range(seen.step // self.interval % 2, self.num_layers, 2))


METHOD = Method(
    name="every-other",
    summary="even and odd layers in turn",
    from_config=lambda tuning, candidates: EveryOtherChooser(candidates.num_layers, tuning.interval, candidates.seed),
    fills={"tuning.interval": 3, "adapter.type": "gate"},
)
'''


def train_with(folder, config, whole=False):
    """A run on a rank that has `folder` on its path; `whole` ones make a memory plan."""
    sys.path.insert(0, folder)
    adapter_kinds.cache_clear()
    methods.cache_clear()
    return train(config, whole)


@pytest.fixture
def added(tmp_path, monkeypatch):
    """A folder on the path with the two files; nothing else knows of them."""
    folder = tmp_path / "site"
    folder.mkdir()
    install(folder, "my_gate", GATE, "irtune.adapters")
    install(folder, "my_methods", EVERY_OTHER, "irtune.methods")
    monkeypatch.syspath_prepend(folder)
    adapter_kinds.cache_clear()
    methods.cache_clear()
    yield folder
    adapter_kinds.cache_clear()
    methods.cache_clear()


def test_a_type_and_a_method_of_one_file_each_train_resume_and_load(added, llama, corpus, tmp_path):
    assert load_config(["--tuning.method=every-other", "--data.path=x"]).adapter.type == "gate"

    def config(name):
        return tiny_config(llama, corpus, tmp_path / name, tuning__method="every-other", tuning__interval=2)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_ranks(train_with, 2, str(added), config("whole"), True) == [None, None]
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints/step_6")
    (cut / "results.json").unlink()
    for mark in ("latest", "best"):
        (cut / "checkpoints" / mark).write_text("step_3")
    assert run_ranks(train_with, 2, str(added), config("cut")) == [None, None]
    assert losses(cut) == losses(whole) and selections(cut) == selections(whole)
    even, odd = list(range(0, LAYERS, 2)), list(range(1, LAYERS, 2))
    assert selections(whole) == [even, odd, even]
    record = json.loads((whole / "adapter/adapter_config.json").read_text())
    assert record["adapter"]["type"] == "gate"
    run = load_run(whole, torch.device("cpu"))
    gates = [layer.gate.change for layer in run.model.get_submodule("model.layers")]
    assert len(gates) == LAYERS and all(bool(gate.any()) for gate in gates)
    fresh = load_adapter(load_classifier(run.config.model, run.labels), whole / "adapter")
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with torch.no_grad():
        assert torch.equal(fresh(**batch).logits, run.model(**batch).logits)
