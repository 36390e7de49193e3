"""Outputs of frozen layers that are computed once: the same run, without the layers below."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from irtune.adapters import adapter_traits, add_adapters
from irtune.adapters.build import leave_out_padding
from irtune.config import ModelConfig, load_config
from irtune.data import Corpus, build_sampler, collate
from irtune.data.corpus import Example
from irtune.distributed import runtime
from irtune.engine.replaced_layers import ReplacedLayers
from irtune.errors import ConfigError, TrainingError
from irtune.models import load_classifier
from irtune.train.frozen_outputs import KeptStates, check_frozen_outputs, keep_frozen_outputs
from irtune.train.training_data import TrainingData
from tests.support import zoo
from tests.support.ranks import run_cases, run_ranks
from tests.support.runs import losses, train
from tests.support.tiny import tiny_config

LENGTHS = (5, 9, 30, 17, 3, 9)
TOP = {"tuning__method": "fixed", "tuning__layers": "3-5", "tuning__keep_frozen_outputs": "true"}
HALF = 2  # of the zoo's four layers


def built(box: Path, name: str, tmp_path: Path, *, packed: bool = True, dtype: str = "float32"):
    """Configuration, classifier, adapted model, its table and training data of a model of the zoo."""
    settings = ModelConfig(name_or_path=str(zoo.build(name, box)), dtype=dtype)
    classifier = load_classifier(settings, list(zoo.LABELS))
    options = {"tuning__method": "fixed", "tuning__layers": "2-3", "tuning__keep_frozen_outputs": "true"}
    config = tiny_config(box / name, box, tmp_path, data__padding_free=str(packed).lower(), **options)
    model, table = add_adapters(classifier, config.adapter)
    packs = leave_out_padding(config, classifier, table)
    encoded = [{"input_ids": [4 + (7 * row + i) % 190 for i in range(n)]} for row, n in enumerate(LENGTHS)]
    examples = [Example(str(row), "text", None, row % 2) for row in range(len(encoded))]
    corpus = Corpus({"train": examples, "dev": examples}, list(zoo.LABELS))
    data = TrainingData(
        corpus, {"train": encoded}, build_sampler(encoded, config, 1, packed=packs), max_steps=3, pad_token_id=3,
        device=torch.device("cpu"), seed=0, packed=packs,
    )  # fmt: skip
    return config, classifier, model, table, data


def standing(model: Any, table: Any, selected: tuple[int, ...] = (2, 3)) -> Any:
    """What `keep_frozen_outputs` looks at of an engine."""
    return SimpleNamespace(module=model, table=table, selected=list(selected))


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    return tmp_path_factory.mktemp("frozen")


@pytest.mark.quick
@pytest.mark.parametrize(("packed", "dtype"), [(True, "float32"), (False, "float32"), (True, "bfloat16")])
@pytest.mark.parametrize("name", ["qwen2", "gemma2", "bloom", "falcon", "modernbert", "mixtral"])
def test_steps_compute_the_same_without_the_frozen_layers(box, tmp_path, name, packed, dtype):
    config, _, model, table, data = built(box, name, tmp_path, packed=packed, dtype=dtype)
    said, called = [], []
    batch = data.batch([0, 2, 5])
    batch.pop("labels")
    with torch.no_grad():
        wanted = model.train()(**batch).logits
    keep_frozen_outputs(config, standing(model, table), data, SimpleNamespace(say=said.append))
    assert said[0].startswith("outputs of the frozen layers 0 to 1 are kept: ")
    batch = data.batch([0, 2, 5])
    batch.pop("labels")
    assert batch["attention_mask"].kept.shape[:2] == ((1, 44) if data.packed else (3, 30))
    assert batch["attention_mask"].kept.dtype == getattr(torch, dtype)
    for number, layer in enumerate(table.modules):
        part = next(layer.children())
        part.register_forward_pre_hook(lambda *_, number=number: called.append(number))
    with torch.no_grad():
        found = model(**batch).logits
    assert set(called) == {2, 3}
    rounding = 1e-5 if dtype == "float32" else 0.02
    assert torch.allclose(found, wanted, atol=rounding * float(wanted.abs().max()))
    assert list(tmp_path.iterdir()) == []  # the file has no name


@pytest.mark.quick
def test_what_is_kept_is_what_a_layer_returned(tmp_path):
    states = torch.arange(24.0).view(12, 2).bfloat16()  # of examples of 3, 1, 4 and 4 tokens
    kept = KeptStates((3, 1, 4, 4), states, tmp_path)
    assert kept.states.nbytes == 12 * 2 * 2
    kept.put([2, 0, 1, 3], states)
    assert torch.equal(kept.rows([0, 1], 5, packed=True), states[None, 4:8])
    padded = kept.rows([1, 2], 5, packed=False)
    assert torch.equal(padded[0], torch.cat([states[7:8], torch.zeros(4, 2).bfloat16()]))
    assert torch.equal(padded[1], torch.cat([states[:4], torch.zeros(1, 2).bfloat16()]))


@pytest.mark.quick
def test_layers_that_answer_otherwise_are_found_out(box, tmp_path):
    config, _, model, table, data = built(box, "qwen2", tmp_path)
    table.modules[1].register_forward_hook(lambda _layer, _args, output: output * (1 + torch.rand(())))
    with pytest.raises(TrainingError, match=r"compute something else from kept outputs .* set it to false"):
        keep_frozen_outputs(config, standing(model, table), data, SimpleNamespace(say=print))


@pytest.mark.quick
def test_layers_that_hand_on_more_are_refused():
    class Layer(torch.nn.Module):
        def forward(self, states, more=None):
            return states, states if more is None else more * 2

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer(), Layer()])

        def forward(self, input_ids, attention_mask):
            states, more = self.layers[0](input_ids[..., None].float())
            return self.layers[1](states, more + 1)[0]

    model = Model()
    layers = ReplacedLayers(model, list(model.layers), 1)
    batch: Any = collate([{"input_ids": [4, 5]}], 3)
    batch["attention_mask"].kept = layers.outputs(batch)[None]
    with pytest.raises(TrainingError, match=r"cannot leave out its frozen layers \(.*NoneType.*\); set it to false"):
        layers.check(batch)


@pytest.mark.quick
def test_where_nothing_can_be_kept_is_refused(box, tmp_path):
    config, classifier, _, table, _ = built(box, "bert", tmp_path)
    with pytest.raises(ConfigError) as error:
        check_frozen_outputs(config, classifier.model, table, adapter_traits(config.adapter), [0, 3])
    assert "hidden_dropout_prob 0.1" in str(error.value)
    assert "layer 0 trains, so that there is nothing to keep; set tuning.layers" in str(error.value)


@pytest.mark.quick
def test_contradictions_are_refused_together():
    options = ["--model.compile=true", "--data.augment=eda", "--optim.rdrop=1", "--adapter.dropout=0.1"]
    with pytest.raises(ConfigError) as error:
        load_config(["--data.path=x", "--tuning.keep_frozen_outputs=true", *options])
    text = str(error.value)
    for part in ("model.compile True", "data.augment eda", "optim.rdrop 1.0"):
        assert f"tuning.keep_frozen_outputs does not go together with {part}; remove one of the two" in text
    assert "needs a tuning.method that chooses layers once (fixed, full, probe, spafit, spectrum), not ir" in text


@pytest.mark.quick
def test_without_room_nothing_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"GiB do not fit into run\.output_dir .* free \(No space left on device\)"):
        KeptStates((3, 1), torch.ones(4, 2), tmp_path)
    assert list(tmp_path.iterdir()) == []


def cut(config):
    """The run's folder as a kill after step 3 leaves it, trained to the end."""
    folder = Path(config.run.output_dir)
    if runtime.rank() == 0:
        whole = folder.with_name(folder.name.removesuffix("-cut"))
        shutil.copytree(whole, folder)
        shutil.rmtree(folder / "checkpoints/step_6")
        shutil.rmtree(folder / "adapter")
        (folder / "results.json").unlink()
        for name in ("latest", "best"):
            (folder / "checkpoints" / name).write_text("step_3")
    runtime.barrier()
    return train(config)


def test_runs_are_those_that_compute_all_layers(llama, corpus, tmp_path):
    """On two ranks under all kinds of stages, cut and resumed, and on one rank."""
    more = {"run__save_every": 3, "run__keep_last": 9}

    def config(name: str, stage: int, **options):
        return tiny_config(llama, corpus, tmp_path / name, stage, data__padding_free="true", **TOP | more | options)

    plain = config("plain", 2, tuning__keep_frozen_outputs="false")
    kept = [config(f"kept{stage}", stage) for stage in (0, 2, 3)]
    resumed = [config(f"kept{stage}-cut", stage) for stage in (2, 3)]
    runs = [(train, one) for one in (plain, *kept)] + [(cut, one) for one in resumed]
    assert run_cases(called, 2, runs) == [[None, None]] * 6
    single = config("single", 0, optim__gradient_accumulation_steps=2)
    assert run_ranks(train, 1, single) == [None]
    wanted = losses(tmp_path / "plain")
    for name in ("kept0", "kept2", "kept3", "single"):
        assert losses(tmp_path / name) == pytest.approx(wanted, rel=1e-5)
        assert "layers 0 to 2 are kept" in (tmp_path / name / "logs/rank_0.log").read_text()
        assert list((tmp_path / name).glob(".*")) == []
    for name in ("kept2", "kept3"):
        again = tmp_path / f"{name}-cut"
        assert losses(again) == losses(tmp_path / name)
        files = [folder / "checkpoints/step_6/trainable.safetensors" for folder in (again, tmp_path / name)]
        assert files[0].read_bytes() == files[1].read_bytes()


def called(function, config):
    """Of a case: `function(config)`."""
    return function(config)
