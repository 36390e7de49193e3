"""Where the class is read: pooled by hand, for each architecture, in runs, and after saving."""

import dataclasses
import json
import math
import re
import shutil
from unittest.mock import Mock

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from irtune.adapters import load_adapter, write_adapter
from irtune.adapters.build import add_adapters
from irtune.adapters.soft_tokens import leading_tokens
from irtune.commands import export
from irtune.commands.validate import validate
from irtune.config import AdapterConfig, DataConfig, ModelConfig, load_config
from irtune.data import Encoder, Example, collate, read_corpus
from irtune.data.diff import diff, render
from irtune.engine.layer_state import HEAD
from irtune.errors import CheckpointError, ConfigError
from irtune.evaluation.metrics import metrics
from irtune.evaluation.saved_run import load_run
from irtune.models import load_classifier
from irtune.models.pooling import HEAD_NAME, Pooling, pool, pool_sides, pooling_of
from tests.support import tiny
from tests.support.finished import finished_run
from tests.support.ranks import run_ranks
from tests.support.runs import cut_back, launch, losses

CROSS = {"model__head": "cross", "model__pooling": "mean", "data__prompt": "tagged"}
KINDS = ("last", "mean", "edit", "mean+edit", "last+edit")
STATES = torch.arange(16.0).view(2, 4, 2)  # row 0: [0 1] [2 3] [4 5] [6 7]; row 1: [8 9] [10 11] [12 13] [14 15]
SEEN = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
EDITS = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]])  # row 1 has none: all its tokens count


@pytest.mark.quick
@pytest.mark.parametrize(
    "kind, wanted",
    [
        ("last", [[4, 5], [14, 15]]),
        ("cls", [[0, 1], [8, 9]]),
        ("mean", [[2, 3], [11, 12]]),
        ("edit", [[3, 4], [11, 12]]),
        ("mean+edit", [[2, 3, 3, 4], [11, 12, 11, 12]]),
        ("last+edit", [[4, 5, 3, 4], [14, 15, 11, 12]]),
    ],
)
def test_pooling_by_hand(kind, wanted):
    assert pool(STATES.bfloat16(), kind, SEEN, EDITS).tolist() == wanted
    hidden = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1]])  # padding in the middle, as before soft tokens of labels
    assert pool(STATES, "last", hidden).tolist() == [[4, 5], [14, 15]]


@pytest.mark.quick
@pytest.mark.parametrize(
    "kind, wanted",
    [  # old, |new - old|, new; row 1 has no new text
        ("mean", [[1, 2, 3, 3, 4, 5], [10, 11, 10, 11, 0, 0]]),
        ("last", [[2, 3, 2, 2, 4, 5], [12, 13, 12, 13, 0, 0]]),
    ],
)
def test_both_sides_of_a_pair_by_hand(kind, wanted):
    sides = torch.tensor([[1, 1, 2, 0], [1, 1, 1, 0]])
    assert pool_sides(STATES.bfloat16(), kind, SEEN, sides).tolist() == wanted
    # A caller that tells nothing of sides, as when memory is planned.
    assert pool_sides(STATES, "mean", SEEN).tolist() == [[2, 3, 0, 0, 2, 3], [11, 12, 0, 0, 11, 12]]


@pytest.mark.quick
def test_a_pair_that_is_cut_keeps_both_sides(bpe):
    tokenizer = AutoTokenizer.from_pretrained(bpe)
    data = DataConfig(prompt="tagged", max_length=40)
    encoder = Encoder(tokenizer, data, ["x", "y"], mask="side_mask")
    for before, after in (("blue house", "red house"), ("blue " * 90, "red"), ("blue " * 90, "red " * 90), ("", "red")):
        found = encoder.encode(Example("1", before, after, 0))
        assert len(found["input_ids"]) == len(found["side_mask"]) <= 40
        shown = ["".join(tokenizer.decode(token) for token, there in zip(found["input_ids"], found["side_mask"])
                         if there == side) for side in (1, 2)]  # fmt: skip
        assert shown[0] == before[: len(shown[0])] and shown[1] == after[: len(shown[1])]
        assert bool(shown[0]) == bool(before) and shown[1]
    assert collate([found, encoder.encode(Example("2", "a", "b", 0))], 0)["side_mask"].shape[0] == 2


@pytest.mark.quick
def test_a_head_that_compares_sides_is_filled_in_refused_saved_merged_and_loaded(llama, corpus, tmp_path):
    filled = load_config(["--data.path=x", "--model.head=cross"])
    assert (filled.data.prompt, filled.model.pooling) == ("tagged", "mean")
    for options, sentence in (
        (["--data.prompt=diff"], r"tagged form, and data.prompt diff is set; set data.prompt to tagged without"),
        (["--data.template={before}{after}"], r"tagged form, and data.template is set"),
        (["--data.after=null"], r"cross compares two texts, but data.after is null; set model.head to linear or mlp"),
        (["--model.pooling=cls"], r"which model.pooling cls does not; accepted: mean, last"),
        (["--model.pooling=class"], r"which model.pooling class does not; accepted: mean, last"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            load_config(["--data.path=x", "--model.head=cross", *options])

    folder = finished_run(tmp_path / "run", llama, corpus, model__head="cross", model__pooling="mean")
    run = load_run(folder, torch.device("cpu"))
    head = run.classifier.model.get_submodule(HEAD_NAME).modules_to_save["default"][0]
    assert head.in_features == 3 * 32 and pooling_of(run.model) == Pooling("mean", "cross")
    rows = [Example("1", "the blue house", "the red house", 0), Example("2", "", "the house", 0)]
    # By hand, from the last states of each text alone.
    read = []
    for row in rows:
        item = run.encoder.encode(row)
        body = getattr(run.classifier.model, run.classifier.model.base_model_prefix)
        with torch.no_grad():
            states = body(input_ids=torch.tensor([item["input_ids"]])).last_hidden_state[0]
        sides = torch.tensor(item["side_mask"])
        old, new = (states[sides == s].sum(0) / max(1, int((sides == s).sum())) for s in (1, 2))
        read.append(torch.cat([old, (new - old).abs(), new]))
    wanted = (torch.stack(read) @ head.weight.T + head.bias).softmax(-1)
    found = run.predict(rows, 2).probabilities
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert not torch.allclose(found, run.predict([rows[0], Example("2", "the house", "", 0)], 2).probabilities)

    assert export.main(["--run", str(folder), "--to", str(tmp_path / "merged"), "--merge"]) == 0
    merged = load_run(tmp_path / "merged", torch.device("cpu"))
    torch.testing.assert_close(merged.predict(rows, 2).probabilities, found, atol=1e-4, rtol=0)
    exec(code_of((tmp_path / "merged/README.md").read_text(), tmp_path / "merged"), {})
    linear = load_classifier(dataclasses.replace(run.config.model, head="linear"), run.labels)
    with pytest.raises(CheckpointError, match=r"trained with model.pooling mean and model.head cross; load the base"):
        load_adapter(linear, folder / "adapter")


@pytest.mark.quick
def test_validate_checks_a_head_that_compares_sides(llama, corpus, tmp_path):
    validate(tiny.tiny_config(llama, corpus, tmp_path / "run", model__head="cross", model__pooling="last"), 1)


def batch_of(size):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 60, (2, 9), generator=generator)
    seen = torch.ones_like(ids)
    seen[1, 6:] = 0
    edits = torch.zeros_like(ids)
    edits[0, 2:4] = 1
    return {"input_ids": ids, "attention_mask": seen, "edit_mask": edits}


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_every_architecture_reads_its_last_states(request, architecture, kind):
    folder = request.getfixturevalue(architecture)
    config = ModelConfig(name_or_path=str(folder), dtype="float32", pooling=kind)
    classifier = load_classifier(config, ["a", "b", "c"])
    model, batch = classifier.model.eval(), batch_of(2)
    assert classifier.anatomy.head == (HEAD_NAME,) and pooling_of(model) == Pooling(kind, "linear")
    assert not [name for name, _ in model.named_parameters() if "pooler" in name or "score" in name]
    with torch.no_grad():
        assert not model(**batch).logits.any()  # so that the loss is ln 3
        head = model.get_submodule(HEAD_NAME)[0]
        head.weight.normal_()
        body = getattr(model, model.base_model_prefix)
        states = body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        wanted = pool(states, kind, batch["attention_mask"], batch["edit_mask"]) @ head.weight.T
    torch.testing.assert_close(model(**batch).logits, wanted)


@pytest.mark.quick
def test_the_head_computes_in_fp32_over_a_bf16_body_and_learns_from_zero(llama):
    for head, adapter in (("linear", "float32"), ("mlp", "float32"), ("linear", "model")):
        config = ModelConfig(name_or_path=str(llama), pooling="mean+edit", head=head)
        model, table = add_adapters(load_classifier(config, ["a", "b"]), AdapterConfig(dtype=adapter))
        table.set_trainable([])
        logits = model(**batch_of(2)).logits
        assert logits.dtype == torch.float32 and not logits.any()
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
        assert float(loss) == pytest.approx(math.log(2))
        loss.backward()
        assert [name for name, p in table.head if p.grad is not None and p.grad.any()]
        assert {p.dtype for _, p in table.head} == {torch.float32 if adapter == "float32" else torch.bfloat16}


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["prompt", "ltuning-prompt", "prefix", "ltuning-prefix"])
def test_adapters_with_soft_tokens_pool_them_too_but_not_as_edits(llama, kind):
    torch.manual_seed(0)
    config = ModelConfig(name_or_path=str(llama), dtype="float32", pooling="edit")
    classifier = load_classifier(config, ["the school", "bakery"])
    model, _ = add_adapters(classifier, AdapterConfig(type=kind, num_tokens=3))
    seen = {}
    body = getattr(classifier.model, classifier.model.base_model_prefix)
    body.register_forward_hook(lambda _m, _i, output: seen.update(states=output.last_hidden_state))
    torch.nn.init.normal_(classifier.model.get_submodule(HEAD_NAME)[0].weight)
    batch = batch_of(2)
    logits = model(**batch).logits
    head = classifier.model.get_submodule(HEAD_NAME)[0].weight
    more = seen["states"].shape[1] - 9  # soft tokens come first
    marked = seen["states"][0, more + 2 : more + 4].mean(0) @ head.T
    torch.testing.assert_close(logits[0, 0], marked[0])


@pytest.mark.quick
def test_what_a_model_cannot_have_is_refused(llama):
    with pytest.raises(
        ConfigError, match=r"model.pooling cls reads a classification token, and the tokenizer of .* none"
    ):
        load_classifier(ModelConfig(name_or_path=str(llama), pooling="cls"), ["a", "b"])
    with pytest.raises(
        ConfigError, match=r"model.pooling mean\+edit reads the marked edits, and data.prompt tagged marks"
    ):
        load_config(["--data.path=x", "--data.prompt=tagged", "--model.pooling=mean+edit"])
    # Single texts cannot become a diff.
    with pytest.raises(
        ConfigError, match=r"data.prompt plain marks none; set model.pooling to class, last, cls or mean"
    ):
        load_config(["--data.path=x", "--data.after=null", "--model.pooling=edit"])
    with pytest.raises(ConfigError, match=r"model.head mlp goes with every model.pooling but class"):
        load_config(["--data.path=x", "--data.prompt=tagged", "--model.head=mlp"])


@pytest.mark.quick
@pytest.mark.parametrize(("template", "first"), [("<s> $A", 1), ("$A <s>", 0), ("$A", 0)])
def test_cls_must_come_first(llama, tmp_path, template, first):
    folder = shutil.copytree(llama, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.cls_token = "<s>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", tokenizer.cls_token_id)]
    )
    tokenizer.save_pretrained(folder)
    assert leading_tokens(AutoTokenizer.from_pretrained(folder)) == first
    config = ModelConfig(name_or_path=str(folder), dtype="float32", pooling="cls")
    if first:
        assert pooling_of(load_classifier(config, ["a", "b"]).model) == Pooling("cls", "linear")
        return
    with pytest.raises(
        ConfigError, match=r"reads a classification token, and the tokenizer of .* does not put it first"
    ):
        load_classifier(config, ["a", "b"])


@pytest.mark.quick
def test_the_validator_knows_it_too(llama, corpus, tmp_path):
    config = tiny.tiny_config(llama, corpus, tmp_path / "run", model__pooling="cls")
    with pytest.raises(ConfigError) as said:
        validate(config, 1)
    assert str(said.value).count("model.pooling cls reads a classification token") == 1
    shown = validate(tiny.tiny_config(llama, corpus, tmp_path / "run", data__prompt="diff", model__pooling="edit"), 1)
    assert all(one["edit_tokens"] for one in shown["first_examples"])


@pytest.mark.quick
def test_a_tokenizer_without_offsets_is_refused():
    slow = Mock(is_fast=False)
    with pytest.raises(ConfigError, match=r"does not tell which characters .* accepted: model.pooling class, last"):
        Encoder(slow, DataConfig(prompt="diff"), ["x", "y"], mask="edit_mask")


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["lora", "dora", "rslora", "pissa", "bottleneck", "ltuning-prefix"])
def test_every_type_comes_back_with_its_head(llama, tmp_path, kind):
    config = ModelConfig(name_or_path=str(llama), dtype="float32", pooling="last+edit")
    adapter = AdapterConfig(type=kind, r=4)
    torch.manual_seed(0)
    model, table = add_adapters(load_classifier(config, ["a", "b"]), adapter)
    for _, parameter in table.all():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    write_adapter(tmp_path, {name: p.detach() for name, p in table.all()}, adapter, ["a", "b"], pooling_of(model))
    wanted = model.eval()(**batch_of(2)).logits
    again = load_adapter(load_classifier(config, ["a", "b"]), tmp_path)
    torch.testing.assert_close(again(**batch_of(2)).logits, wanted)
    plain = load_classifier(dataclasses.replace(config, pooling="class"), ["a", "b"])
    with pytest.raises(CheckpointError, match=r"trained with model.pooling last\+edit and model.head linear"):
        load_adapter(plain, tmp_path)


def config_of(bpe, corpus, folder, stage=0, **more):
    given = {
        "model__pooling": "mean+edit",
        "data__prompt": "diff",
        "data__max_length": 128,
        "tuning__method": "full",
    } | more
    return tiny.tiny_config(bpe, corpus, folder, stage, **given)


def test_a_run_is_saved_loaded_merged_and_used_without_irtune(bpe, corpus, tmp_path):
    config = config_of(bpe, corpus, tmp_path / "run", model__head="mlp", optim__head_lr=3.0)
    launch(config, 1)
    results = json.loads((tmp_path / "run/results.json").read_text())
    record = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert record["pooling"] == {"kind": "mean+edit", "head": "mlp"} and "peft_type" not in record
    run = load_run(tmp_path / "run", torch.device("cpu"))
    rows = [json.loads(line) for line in (corpus / "dev.jsonl").open()]
    told = [json.loads(line) for line in (tmp_path / "run/predictions.jsonl").open()]
    dev = read_corpus(config.data).splits["dev"]
    probabilities = run.predict(dev, 4).probabilities
    torch.testing.assert_close(
        probabilities, torch.tensor([[one["probabilities"][name] for name in run.labels] for one in told]),
        atol=1e-5, rtol=0,
    )  # fmt: skip
    assert results["dev"]["examples"] == len(rows)

    wrong = load_classifier(dataclasses.replace(config.model, head="linear"), run.labels)
    with pytest.raises(
        CheckpointError, match=r"trained with model.pooling mean\+edit and model.head mlp; load the base"
    ):
        load_adapter(wrong, tmp_path / "run/adapter")

    assert export.main(["--run", str(tmp_path / "run"), "--to", str(tmp_path / "plain")]) == 0
    card = (tmp_path / "plain/README.md").read_text()
    space = {}
    exec(code_of(card, tmp_path / "plain"), space)
    torch.testing.assert_close(space["run"].predict(dev, 4).probabilities, probabilities)

    assert export.main(["--run", str(tmp_path / "run"), "--to", str(tmp_path / "merged"), "--merge"]) == 0
    merged = load_run(tmp_path / "merged", torch.device("cpu")).predict(dev, 4).probabilities
    torch.testing.assert_close(merged, probabilities, atol=1e-4, rtol=0)
    code = code_of((tmp_path / "merged/README.md").read_text(), tmp_path / "merged")
    assert "irtune." not in re.sub("#.*", "", code)
    for example, wanted in zip(dev[:3], probabilities):
        space = {}
        marked = render(diff(example.before, example.after)).text
        assert len(AutoTokenizer.from_pretrained(bpe)(marked)["input_ids"]) <= config.data.max_length
        exec(code.replace('"the [-blue-]{+red+} house"', repr(marked)), space)
        torch.testing.assert_close(space["logits"].softmax(-1), wanted, atol=1e-4, rtol=0)


def code_of(card, folder):
    return card.split("```python\n")[1].split("```")[0].replace("THIS_FOLDER", str(folder))


def _rates(model):
    rig = tiny.Rig(model, 0)
    rig.engine.optim.head_lr = 0.5
    rig.engine.reselect([2])
    rig.engine.forward_backward(rig.batch(0))
    rig.engine.step(0.01)
    rates = {group["layer"]: group["lr"] for group in rig.engine.state.adamw.param_groups}
    rig.close()
    return rates


def test_the_head_has_a_learning_rate_of_its_own(llama):
    assert run_ranks(_rates, 1, llama) == [{2: 0.01, HEAD: 0.005}]


def test_every_stage_computes_the_same_with_a_head_of_irtune(bpe, corpus, tmp_path):
    found = []
    for stage in (0, 2, 3):
        folder = tmp_path / f"stage{stage}"
        found.append(losses(launch(config_of(bpe, corpus, folder, stage, tuning__method="ir", optim__max_steps=4), 2)))
    assert found[0][0] == pytest.approx(math.log(5))  # the head starts at zero
    assert found[1] == pytest.approx(found[0], abs=1e-4) and found[2] == pytest.approx(found[0], abs=1e-4)


def test_a_head_that_compares_sides_computes_the_same_on_any_number_of_ranks(bpe, corpus, tmp_path):
    found = []
    for stage, world in ((0, 1), (2, 2), (3, 2)):
        more = {"tuning__method": "ir", "optim__max_steps": 4, "optim__gradient_accumulation_steps": 2 // world}
        found.append(losses(launch(config_of(bpe, corpus, tmp_path / f"stage{stage}", stage, **more, **CROSS), world)))
    assert len(set(found[0])) > 1
    assert found[1] == pytest.approx(found[0], abs=1e-4) and found[2] == pytest.approx(found[0], abs=1e-4)


@pytest.mark.parametrize(
    "more",
    [
        {"model__quantization": "nf4", "model__dtype": "bfloat16", "model__gradient_checkpointing": True},
        {"optim__micro_batch_tokens": 160, "adapter__type": "none", "adapter__dtype": "model"},
        CROSS,
    ],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_been(bpe, corpus, tmp_path, more):
    first = config_of(bpe, corpus, tmp_path / "whole", optim__max_steps=4, run__eval_every=2, **more)
    whole = launch(first, 1)
    again = dataclasses.replace(first, run=dataclasses.replace(first.run, output_dir=str(tmp_path / "parts")))
    cut_back(whole, tmp_path / "parts", last=4, kept=2)
    assert losses(launch(again, 1)) == losses(whole)
    run = load_run(tmp_path / "parts", torch.device("cpu"))
    told = json.loads((tmp_path / "parts/results.json").read_text())["dev"]
    dev = read_corpus(first.data).splits["dev"]
    assert metrics(run.predict(dev, 4), run.labels)["loss"] == pytest.approx(told["loss"], rel=1e-3)
