"""What refines a run, each as an option: averaged weights, adjusted logits, R-Drop, a learning rate for each layer."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from irtune.config import load_config
from irtune.engine.losses import disagreement
from irtune.errors import ConfigError
from irtune.evaluation.metrics import Predictions
from irtune.train.checkpoint import TRAINABLE, mean_weights
from irtune.train.trainer import Trainer
from tests.support.ranks import run_ranks
from tests.support.runs import launch, losses, train
from tests.support.tiny import Rig, tiny_config

POOLED = {"model__pooling": "mean"}


@pytest.mark.quick
def test_disagreement_by_hand():
    first, second = torch.tensor([[0.0, 0.0], [1.0, 5.0]]), torch.tensor([[0.0, math.log(3)], [1.0, 5.0]])
    # p = (1/2, 1/2), q = (1/4, 3/4): KL(p, q) = .143841, KL(q, p) = .130812; the other example agrees
    assert float(disagreement(first, second)) == pytest.approx((0.143841 + 0.130812) / 2 / 2, abs=1e-6)
    kl = torch.nn.functional.kl_div
    a, b = torch.randn(5, 4).log_softmax(-1), torch.randn(5, 4).log_softmax(-1)
    both = kl(a, b, reduction="batchmean", log_target=True) + kl(b, a, reduction="batchmean", log_target=True)
    assert float(disagreement(a, b)) == pytest.approx(float(both) / 2, rel=1e-5)


@pytest.mark.quick
def test_what_contradicts_is_refused():
    with pytest.raises(
        ConfigError, match=r"run\.average 3 needs the checkpoint of each evaluation, and run\.save_every"
    ):
        load_config(["--data.path=x", "--run.average=3", "--run.save_every=5"])
    with pytest.raises(ConfigError, match="layer_decay"):
        load_config(["--data.path=x", "--optim.layer_decay=0"])


def _refused(model, corpus, folder):
    """What runs of a model without dropout and without a bias in its head say, in one process."""
    wishes = ({"run__logit_adjust": 1.0}, {"optim__rdrop": 1.0})
    return [train(tiny_config(model, corpus, folder / f"refused{n}", **wish)) for n, wish in enumerate(wishes)]


def test_a_model_without_the_part_is_refused(llama, corpus, tmp_path):
    ((bias, dropout),) = run_ranks(_refused, 1, llama, corpus, tmp_path)
    assert "run.logit_adjust 1.0 is kept in the bias of the head, and this one has none; set model.pooling" in bias
    assert "optim.rdrop 1.0 compares two passes that dropout makes differ, and there is none; set" in dropout
    assert not any(tmp_path.glob("refused*"))


@pytest.mark.quick
@pytest.mark.parametrize("better", [True, False])
def test_averaged_weights_are_kept_where_they_are_better(tmp_path, better):
    for step in (4, 6, 7):
        (tmp_path / f"step_{step}").mkdir()
    right, wrong = Predictions(torch.eye(2), torch.tensor([0, 1])), Predictions(torch.eye(2), torch.tensor([1, 0]))
    loaded, said = [], []
    trainer = SimpleNamespace(
        config=load_config(["--data.path=x", "--run.average=3"]),
        progress=SimpleNamespace(step=7, best_step=4),
        eval_every=2,  # evaluated at 2, 4, 6 and, at the end, at 7
        checkpoints=SimpleNamespace(folder=tmp_path),
        data=SimpleNamespace(corpus=SimpleNamespace(labels=["a", "b"])),
        tracker=SimpleNamespace(say=said.append),
        predict=lambda split: right if better else wrong,
        averaged=[],
        _load=loaded.append,
        _value=lambda values: values["macro_f1"],
    )
    best = wrong if better else right
    assert Trainer._average(trainer, best) is right
    assert trainer.averaged == ([4, 6, 7] if better else [])
    assert loaded == ([[4, 6, 7]] if better else [[4, 6, 7], [4]])
    assert said[0].startswith("mean weights of steps 4, 6, 7: dev macro_f1 ")


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 3)])
def test_the_adapter_holds_the_weights_that_the_results_name(llama, corpus, tmp_path, world, stage):
    config = tiny_config(llama, corpus, tmp_path / "run", stage, run__average=3, run__eval_every=2,
                         tuning__method="rst", tuning__budget=2, **POOLED)  # fmt: skip
    folder = launch(config, world)
    results = json.loads((folder / "results.json").read_text())
    steps = results["averaged_steps"] or [results["best_step"]]
    assert steps in ([2, 4, 6], [2], [4], [6])
    assert sorted(path.name for path in (folder / "checkpoints").glob("step_*")) == ["step_2", "step_4", "step_6"]
    mean = mean_weights([folder / f"checkpoints/step_{step}" for step in steps], {})
    saved = load_file(folder / "adapter/adapter_model.safetensors")
    assert set(saved) == set(mean)
    for name, tensor in saved.items():
        assert torch.equal(tensor, mean[name])
    assert "mean weights of steps 2, 4, 6: dev macro_f1 " in (folder / "logs/rank_0.log").read_text()


@pytest.mark.quick
def test_a_layer_that_a_checkpoint_lacks_counts_with_its_first_values(tmp_path):
    from safetensors.torch import save_file

    for step, tensors in ((1, {"a": torch.tensor([1.0])}), (2, {"a": torch.tensor([3.0]), "b": torch.tensor([8.0])})):
        (tmp_path / str(step)).mkdir()
        save_file(tensors, tmp_path / str(step) / TRAINABLE)
    mean = mean_weights([tmp_path / "1", tmp_path / "2"], {"b": torch.tensor([4.0])})
    assert mean == {"a": torch.tensor([2.0]), "b": torch.tensor([6.0])}


def test_adjusted_logits_are_in_the_head_that_is_saved(bpe, corpus, tmp_path):
    plain, adjusted = (
        launch(tiny_config(bpe, corpus, tmp_path / name, 2, run__logit_adjust=tau, optim__max_steps=2, **POOLED), 1)
        for name, tau in (("plain", 0.0), ("adjusted", 1.5))
    )
    heads = [load_file(folder / "adapter/adapter_model.safetensors") for folder in (plain, adjusted)]
    (name,) = [name for name in heads[0] if "pooled_head" in name and name.endswith("0.bias")]
    counts: dict[str, int] = {}
    for line in (corpus / "train.jsonl").read_text().splitlines():
        label = json.loads(line)["label"]
        counts[label] = counts.get(label, 0) + 1
    shares = torch.tensor([counts[label] for label in sorted(counts)]) / sum(counts.values())
    torch.testing.assert_close(heads[1][name], heads[0][name] - 1.5 * shares.log())
    rows = [
        [json.loads(line)["probabilities"] for line in (folder / "predictions.jsonl").read_text().splitlines()]
        for folder in (plain, adjusted)
    ]
    values = [torch.tensor([list(row.values()) if isinstance(row, dict) else row for row in part]) for part in rows]
    torch.testing.assert_close((values[0].log() - 1.5 * shares.log()).softmax(-1), values[1], rtol=1e-3, atol=1e-5)


def test_rdrop_does_not_depend_on_the_split_and_changes_the_loss(llama, corpus, tmp_path):
    found = []
    for name, world, weight in (("one", 1, 2.0), ("two", 2, 2.0), ("without", 1, 0.0)):
        config = tiny_config(llama, corpus, tmp_path / name, adapter__dropout=0.3, optim__max_steps=3,
                             optim__rdrop=weight, optim__gradient_accumulation_steps=2 // world, **POOLED)  # fmt: skip
        found.append(losses(launch(config, world)))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][0] == pytest.approx(found[2][0], rel=1e-6), "the head starts at zero: both passes agree"
    assert abs(found[0][-1] - found[2][-1]) > 1e-4


def _moved(model, decay):
    """Largest change of a value of each layer in Adam's first step, which is the learning rate, and of the head."""
    rig = Rig(model, 0)
    rig.engine.optim.layer_decay = decay
    rig.engine.reselect([0, 2, 5])
    before = rig.layer_weights()
    rig.train(1)
    moved = [float((new - old).abs().max()) for new, old in zip(rig.layer_weights(), before)]
    rig.close()
    return moved


def test_each_layer_has_its_own_learning_rate(llama):
    (moved,) = run_ranks(_moved, 1, llama, 0.5)
    assert moved[1] == moved[3] == moved[4] == 0.0
    assert [moved[0], moved[2], moved[5], moved[6]] == pytest.approx([0.01 / 32, 0.01 / 8, 0.01, 0.01], rel=1e-3)
