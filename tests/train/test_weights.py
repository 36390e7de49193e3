"""Weights of examples and classes in whole runs, and the share of a run that is warm-up."""

import json

import pytest
import torch

from irtune.config import OptimConfig, load_config, write_config
from irtune.config.warmup import warmup_length
from irtune.engine.engine import WEIGHTS
from irtune.engine.losses import build_loss
from irtune.errors import ConfigError
from tests.support.ranks import run_ranks
from tests.support.runs import launch, losses, records, selections
from tests.support.tiny import Rig, tiny_config


@pytest.fixture(scope="module")
def weighted(corpus, tmp_path_factory):
    """The corpus with weights: column w, 0 to 2; column two, always 2."""
    folder = tmp_path_factory.mktemp("weighted")
    for split in ("train", "dev", "test"):
        rows = [json.loads(line) for line in (corpus / f"{split}.jsonl").read_text().splitlines()]
        more = [row | {"w": number % 5 / 2, "two": 2} for number, row in enumerate(rows)] if split == "train" else rows
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    return folder


CLASSES = '{"style": 3, "clarity": 0.5}'


@pytest.mark.parametrize(
    "options", [{"optim__micro_batch_size": 4}, {"optim__micro_batch_tokens": 160}], ids=["size", "tokens"]
)
def test_weights_give_the_same_run_on_any_ranks_and_stages(llama, weighted, tmp_path, options):
    found = {}
    for world, stage in ((1, 0), (2, 0), (2, 2), (2, 3)):
        config = tiny_config(
            llama, weighted, tmp_path / f"run{world}{stage}", stage, data__weight="w", optim__class_weights=CLASSES,
            optim__gradient_accumulation_steps=2 // world, optim__max_steps=4, **options,
        )  # fmt: skip
        folder = launch(config, world)
        found[world, stage] = (losses(folder), selections(folder))
    one = found[1, 0]
    for other in found.values():
        assert other[0] == pytest.approx(one[0], rel=1e-4) and other[1] == one[1]


def _gradients(model, sizes):
    """Of the weighted mean loss over eight examples in micro-batches of `sizes`, and that mean."""
    loss = build_loss(OptimConfig(class_weights={"b": 3.0}), [3, 3, 2], torch.device("cpu"), ["a", "b", "c"])
    rig = Rig(model, 0, accumulation=len(sizes), loss=loss)
    rig.engine.reselect([0, 3])
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(4, 60, (8, 9), generator=generator), torch.randint(0, 3, (8,), generator=generator)
    weights = torch.rand(8, generator=generator)
    with torch.no_grad():
        each = torch.nn.functional.cross_entropy(rig.engine.module(input_ids=ids).logits, labels, reduction="none")
    by_hand = float((each * weights * torch.tensor([1.0, 3.0, 1.0])[labels]).sum() / 8)
    first, total = 0, 0.0
    for size in sizes:
        part = slice(first, first + size)
        batch = {"input_ids": ids[part], "attention_mask": torch.ones_like(ids[part]), "labels": labels[part]}
        batch[WEIGHTS] = weights[part]
        total += float(rig.engine.forward_backward(batch, size * len(sizes) / 8)) / len(sizes)
        first += size
        if first < 8:
            rig.engine.step(0.0)
    trained = [parameter for layer in (0, 3) for _, parameter in rig.table.layers[layer]]
    gradients = [parameter.grad.flatten().tolist() for parameter in trained]
    rig.close()
    return total, by_hand, gradients


def test_weights_are_those_of_the_mean_over_examples_however_they_are_cut(llama):
    whole, parts = (run_ranks(_gradients, 1, llama, sizes)[0] for sizes in ((8,), (1, 5, 2)))
    assert whole[0] == pytest.approx(whole[1], rel=1e-5) and parts[0] == pytest.approx(whole[1], rel=1e-5)
    for one, other in zip(parts[2], whole[2], strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-4, atol=1e-6)


def test_twice_the_weight_is_twice_the_loss_and_metrics_know_none(llama, weighted, tmp_path):
    plain = launch(tiny_config(llama, weighted, tmp_path / "plain", optim__max_steps=1), 1)
    double = launch(tiny_config(llama, weighted, tmp_path / "double", optim__max_steps=1, data__weight="two"), 1)
    classes = '{"style": 2, "clarity": 2, "fluency": 2, "coherence": 2, "meaning-changed": 2}'
    by_class = launch(
        tiny_config(llama, weighted, tmp_path / "class", optim__max_steps=1, optim__class_weights=classes), 1
    )
    assert losses(double) == pytest.approx([2 * losses(plain)[0]], rel=1e-5)
    assert losses(by_class) == pytest.approx([2 * losses(plain)[0]], rel=1e-5)
    found = [json.loads((folder / "results.json").read_text()) for folder in (plain, double)]
    assert found[1]["dev"]["loss"] == pytest.approx(found[0]["dev"]["loss"], rel=1e-3)  # Adam forgets the scale
    assert found[0]["dev"]["macro_f1_present"] == pytest.approx(found[0]["dev"]["macro_f1"])  # all labels are there


def test_a_run_warms_up_for_its_share(llama, weighted, tmp_path):
    config = tiny_config(llama, weighted, tmp_path / "run", optim__max_steps=6, optim__schedule="constant")
    config.optim.warmup_fraction = 0.5
    folder = launch(config, 1)
    assert [record["lr"] for record in records(folder, "train")] == pytest.approx(
        [0.01 / 3, 0.02 / 3, 0.01, 0.01, 0.01, 0.01]
    )


@pytest.mark.quick
def test_the_length_of_the_warm_up():
    for fraction, steps, wanted in ((0.1, 30, 3), (0.07, 100, 7), (0.06, 101, 7), (0.0, 50, 0), (0.5, 1, 1)):
        assert warmup_length(OptimConfig(warmup_steps=0, warmup_fraction=fraction), steps) == wanted
    assert warmup_length(OptimConfig(warmup_steps=9), 5) == 9


@pytest.mark.quick
def test_a_share_takes_the_place_of_steps(tmp_path):
    config = load_config(["--data.path", "x", "--optim.warmup_fraction", "0.1"])
    assert (config.optim.warmup_fraction, config.optim.warmup_steps) == (0.1, 0)
    write_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config
    assert load_config(["--data.path", "x"]).optim.warmup_steps == 10
    with pytest.raises(ConfigError, match=r"warmup_fraction 0.1 and optim.warmup_steps 5 both set the warm-up"):
        load_config(["--data.path", "x", "--optim.warmup_fraction", "0.1", "--optim.warmup_steps", "5"])
    for value in ("1", "-0.1", "nan"):
        with pytest.raises(ConfigError, match=r"optim.warmup_fraction"):
            load_config(["--data.path", "x", "--optim.warmup_fraction", value])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[1, -2]", r"optim\.class_weights holds 1: -2"),
        ("{a: .inf}", r"class_weights"),
        ("[0, 0]", "no weight above 0"),
        ("{a: much}", r"optim\.class_weights: takes"),
        ("{null: 1}", r"optim\.class_weights: takes"),
        ('{1: 2, "1": 3}', r"optim\.class_weights: takes"),
    ],
)
def test_class_weights_that_are_none(value, words):
    with pytest.raises(ConfigError, match=words):
        load_config(["--data.path", "x", "--optim.class_weights", value])


@pytest.mark.quick
def test_class_weights_of_numbers_and_beside_another_weighting():
    config = load_config(["--data.path", "x", "--optim.class_weights", "{0: 1, 1: 2.5}"])
    assert config.optim.class_weights == {"0": 1, "1": 2.5}
    for given, wanted in (
        ("{true: 2, FALSE: 3}", {"true": 2, "false": 3}),
        ("{1.0: 2, 1.5: 3}", {"1": 2, "1.5": 3}),
        ("{clarity: 0}", {"clarity": 0}),  # other labels have 1
    ):
        config = load_config(["--data.path", "x", f"--optim.class_weights={given}"])
        assert config.optim.class_weights == wanted
    with pytest.raises(ConfigError, match="both weigh classes"):
        load_config(["--data.path", "x", "--optim.class_weights", "[1, 2]", "--optim.loss", "class_balanced"])
    with pytest.raises(ConfigError, match=r"data\.weight is 'label', a column that is"):
        load_config(["--data.path", "x", "--data.weight", "label"])
