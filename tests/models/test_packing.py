"""Layers without padding: the same numbers, from texts that stand one after another."""

import gc
import itertools
import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from irtune.adapters import LayerTable, adapter_traits
from irtune.adapters.build import add_adapters, leave_out_padding
from irtune.adapters.guard import watch
from irtune.config import AdapterConfig, ModelConfig
from irtune.data import BatchSampler, Corpus, collate
from irtune.distributed import runtime
from irtune.engine.recompute import Recompute
from irtune.errors import CheckpointError, ModelError
from irtune.memory.measure import LiveTensors
from irtune.models import load_classifier
from irtune.models.kernels import packed
from irtune.models.kernels.packed import Row, products_by_text
from irtune.selection.scores import LayerScores
from irtune.train.resume import began_without_padding, check_same_run, run_identity
from tests.support import tiny, zoo

PACKED = {"gpt2", "qwen2", "mixtral", "bert", "roberta", "modernbert", "mpnet", "gemma3"}
LENGTHS = (5, 9, 30, 17, 3)  # longer than the zoo's windows of 16


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    return tmp_path_factory.mktemp("packing")


def texts() -> list[dict[str, list[int]]]:
    """With an edit in each but the first."""
    return [
        {"input_ids": [4 + (7 * row + place) % 190 for place in range(length)],
         "edit_mask": [int(row > 0 and place in (1, 2)) for place in range(length)],
         "side_mask": [min(place, 2) for place in range(length)]}
        for row, length in enumerate(LENGTHS)
    ]  # fmt: skip


def adapted(
    box, name: str, dtype: str, pooling: str = "class", head: Any = "linear", **options
) -> tuple[Any, LayerTable, bool]:
    """A model of the zoo with adapters that have trained, asked to do without padding; whether it does."""
    settings = ModelConfig(name_or_path=str(zoo.build(name, box)), dtype=dtype, pooling=pooling, head=head)
    classifier = load_classifier(settings, list(zoo.LABELS))
    config = tiny.tiny_config(box / name, box, box / "run", data__padding_free="true", **options)
    torch.manual_seed(1)
    model, table = add_adapters(classifier, config.adapter)
    packs = leave_out_padding(config, classifier, table)
    for _, parameter in table.all():
        parameter.data.normal_(0, 0.1)
    table.set_trainable(list(range(table.num_layers)))
    return model.eval(), table, packs


def passed(model, table: LayerTable, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Logits and gradients."""
    logits = model(**batch).logits.float()
    logits.logsumexp(-1).sum().backward()
    found = [logits.detach(), *(parameter.grad.clone() for _, parameter in table.all())]
    for _, parameter in table.all():
        parameter.grad = None
    return found


@pytest.mark.quick
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["bert", "gemma3", "mpnet", "qwen2"])
def test_nothing_of_a_batch_outlives_it(box, name, checkpointing):
    """A cycle would: what Python looks for seldom is gigabytes after some hundred steps."""
    model, table, packs = adapted(box, name, "bfloat16", "mean")
    assert packs
    Recompute(table.modules, reentrant=False, always=checkpointing, traits=adapter_traits(AdapterConfig()))
    model.train()
    gc.collect()
    gc.disable()
    try:
        passed(model, table, collate(texts(), zoo.PAD, packed=True))
        assert not [one for one in gc.get_objects() if isinstance(one, Row)]
    finally:
        gc.enable()


@pytest.mark.quick
@pytest.mark.parametrize("name", [name for name in zoo.ZOO if name != "t5"])
def test_logits_and_gradients_are_those_of_padded_batches(box, name, caplog):
    pooling, head = {
        "bert": ("mean+edit", "linear"), "mpnet": ("last", "cross"), "qwen2": ("mean", "cross"),
    }.get(name, ("class", "linear"))  # fmt: skip
    model, table, packs = adapted(box, name, "float32", pooling, head)
    assert packs == (name in PACKED)
    if not packs:
        assert f"{type(model.base_model.model).__name__.removeprefix('Pooled')} takes no other attention" in caplog.text
        return
    inputs = texts() if pooling != "class" else [{"input_ids": text["input_ids"]} for text in texts()]
    shapes: list[torch.Size] = []
    table.modules[1].register_forward_hook(lambda _layer, args, _out: shapes.append(args[0].shape[:2]))
    plain, without = (passed(model, table, collate(inputs, zoo.PAD, packed=packed)) for packed in (False, True))
    assert shapes == [(len(LENGTHS), max(LENGTHS)), (1, sum(LENGTHS))]
    for one, other in zip(plain, without):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(one.abs().max()))


@pytest.mark.quick
@pytest.mark.parametrize("name", ["qwen2", "mpnet"])
def test_bf16_on_cpus_has_rows_of_few_lengths(box, name):
    model, table, _ = adapted(box, name, "bfloat16")
    inputs = [{"input_ids": text["input_ids"]} for text in texts()]
    shapes: list[torch.Size] = []
    table.modules[1].register_forward_hook(lambda _layer, args, _out: shapes.append(args[0].shape[:2]))
    plain, without = (passed(model, table, collate(inputs, zoo.PAD, packed=packed))[0] for packed in (False, True))
    assert shapes[1] == (1, 128)  # 64 tokens, and room for 15 places that the last text's products read besides
    exact = passed(*adapted(box, name, "float32")[:2], collate(inputs, zoo.PAD))[0]
    # bf16 has 8 bits; a key of another text, or of none, makes a difference of the outputs' own size.
    assert (plain - exact).norm() < 0.1 * exact.norm() and (without - exact).norm() < 0.1 * exact.norm()


@pytest.mark.quick
def test_what_needs_padding_is_named(box, caplog):
    reasons = {
        "adapter.type prompt puts embeddings": {"adapter__type": "prompt"},
        "attention prefix_sdpa": {"adapter__type": "prefix"},
        "optim.rdrop lets": {"optim__rdrop": "1.0", "adapter__dropout": "0.1"},
        "layers of model.compile": {"model__compile": "true"},
    }
    for reason, options in reasons.items():
        assert not adapted(box, "qwen2", "float32", **options)[-1]
        assert f"data.padding_free: {reason}" in caplog.text


@pytest.mark.quick
def test_the_guard_looks_at_the_row(box, monkeypatch, caplog):
    settings = ModelConfig(name_or_path=str(zoo.build("bert", box)), dtype="float32")
    classifier = load_classifier(settings, list(zoo.LABELS))
    guard = watch(classifier, texts()[:3], patient=True)
    config = tiny.tiny_config(box / "bert", box, box / "run", data__padding_free="true")
    model, table = add_adapters(classifier, AdapterConfig(r=4))
    assert leave_out_padding(config, classifier, table)
    assert guard.allows_packing(model, insist=True)
    unpack = Row.unpack
    harm = {
        "computes something else without padding": lambda row, states: unpack(row, states.roll(1, 1)),
        "cannot compute without padding": lambda row, states: states.view(7, -1),
    }
    for sentence, broken in harm.items():
        monkeypatch.setattr(Row, "unpack", broken)
        with pytest.raises(ModelError, match=rf"{sentence} .*; set data\.padding_free to false"):
            guard.allows_packing(model, insist=True)
        with caplog.at_level(logging.INFO, "irtune"):
            assert not guard.allows_packing(model, insist=False)
        assert f"BertForSequenceClassification {sentence}" in caplog.text


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["cosine", "resnorm", "rms"])
def test_scores_are_those_of_padded_batches(box, kind):
    model, table, _ = adapted(box, "qwen2", "float32")
    inputs = [{"input_ids": text["input_ids"]} for text in texts()]
    found = []
    for packed_ in (False, True):
        scores, batch = LayerScores(table, kind, torch.device("cpu")), collate(inputs, zoo.PAD, packed=packed_)
        with scores.micro_batch(batch["attention_mask"], all_layers=True, factor=1.0):
            passed(model, table, batch)
        found.append(scores)
    plain, without = ([float(value) for value in scores.reduce()] for scores in found)
    assert plain == pytest.approx(without, rel=1e-4)


# ----- attention -----


def _row(multiple: int) -> Row:
    tail = 6 if multiple > 1 else 0
    return Row([5, 9, 2], 12, torch.arange(16 + tail), tail, multiple)


def _tensors(tokens: int, heads: int, shared: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    sizes = (heads, shared, shared)
    return [torch.randn(1, number, tokens, 8, dtype=torch.float64, requires_grad=True) for number in sizes]


def _text_by_text(row: Row, query, key, value, masks, dropout):
    """In plain operations, with the random numbers of `products_by_text`."""
    found, start, groups = [], 0, query.shape[1] // key.shape[1]
    for number, length in enumerate(row.lengths):
        read = min(-(-length // row.multiple) * row.multiple, row.width)
        q, k, v = (tensor[0, :, start : start + read] for tensor in (query, key, value))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        for mask in masks:
            scores = scores + mask[number % mask.shape[0], :, :read, :read]
        weights = scores.softmax(-1)
        if dropout:
            weights = torch.native_dropout(weights.view(key.shape[1], -1, read), dropout, True)[0].view(weights.shape)
        found.append((weights @ v)[:, :length].transpose(0, 1))
        start += length
    return torch.cat([*found, torch.zeros(row.tail, *found[0].shape[1:], dtype=torch.float64)]).unsqueeze(0)


@pytest.mark.quick
@pytest.mark.parametrize(("multiple", "shared", "dropout"), [(1, 4, 0.0), (4, 2, 0.0), (4, 4, 0.3)])
def test_products_by_text_are_attention(multiple, shared, dropout):
    row = _row(multiple)
    hidden = torch.arange(12)[None] >= torch.tensor(row.lengths)[:, None]
    mask = torch.zeros(3, 1, 12, 12, dtype=torch.float64).masked_fill_(hidden[:, None, None], -1e30)
    bias = torch.randn(1, 4, 12, 12, dtype=torch.float64)
    results = []
    for attend in (products_by_text, _text_by_text):
        tensors = _tensors(16 + row.tail, 4, shared)
        torch.manual_seed(3)
        options = (None, dropout) if attend is products_by_text else (dropout,)
        output = attend(row, *tensors, [bias, mask], *options)
        torch.manual_seed(4)
        output[:, :16].backward(torch.randn(1, 16, 4, 8, dtype=torch.float64))
        results.append([output.detach(), *(tensor.grad for tensor in tensors)])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def _flash(query, key, value, begins, _keys, longest, _longest, *, scale, window_size, enable_gqa):
    """varlen_attn, as its documentation describes it: [tokens, heads, dim]."""
    assert begins.dtype == torch.int32 and longest == max(begins.diff())
    left, right = window_size
    assert enable_gqa or query.shape[1] == key.shape[1]
    found = []
    for first, last in itertools.pairwise(begins):
        q, k, v = (tensor[first:last].transpose(0, 1) for tensor in (query, key, value))
        k, v = (tensor.repeat_interleave(q.shape[0] // k.shape[0], 0) for tensor in (k, v))
        away = torch.arange(int(last - first))[None] - torch.arange(int(last - first))[:, None]
        seen = ((away >= -left) | (left < 0)) & ((away <= right) | (right < 0))
        scores = (q @ k.transpose(1, 2) * (scale or q.shape[-1] ** -0.5)).masked_fill(~seen, -1e30)
        found.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(found)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["qwen2", "bert", "modernbert", "gemma3"])
def test_flash_attention_gets_what_stands_for_the_mask(box, name, monkeypatch):
    """On a GPU, texts attend without a mask: causal or not, and in windows, as the model's masks say."""
    model, table, _ = adapted(box, name, "float32")
    batch = collate([{"input_ids": text["input_ids"]} for text in texts()], zoo.PAD, packed=True)
    by_products = passed(model, table, batch)[0]
    called = []
    monkeypatch.setattr(packed, "varlen_attn", lambda *args, **options: called.append(1) or _flash(*args, **options))
    monkeypatch.setattr(packed, "_on_gpu", lambda query, dropout: True)
    monkeypatch.setattr(packed, "SHORT", 0)
    torch.testing.assert_close(passed(model, table, batch)[0], by_products, rtol=1e-4, atol=1e-4)
    assert len(called) == table.num_layers
    monkeypatch.setattr(packed, "_on_gpu", lambda query, dropout: False)
    torch.testing.assert_close(passed(model, table, batch)[0], by_products, rtol=1e-4, atol=1e-4)
    assert len(called) == table.num_layers  # of long texts on a CPU, each goes through the model's own kernel


# ----- batches and memory -----


@pytest.mark.quick
def test_global_batches_are_random_and_micro_batches_have_as_many_tokens():
    lengths = [1 + (place * 37) % 100 for place in range(64)]
    plan, other = (BatchSampler(values, 8, 2, seed=0, packed=True) for values in (lengths, lengths[::-1]))
    steps, others = ([sampler.step(step) for step in range(4)] for sampler in (plan, other))
    assert sorted(place for step in steps for batch in step for place in batch) == list(range(64))
    # Who meets whom does not depend on lengths.
    assert [sorted(one + two) for one, two in steps] == [sorted(one + two) for one, two in others]
    for step in steps:
        assert [len(batch) for batch in step] == [8, 8]
        one, two = (sum(lengths[place] for place in batch) for batch in step)
        assert abs(one - two) < 0.1 * (one + two)


@pytest.mark.quick
def test_memory_is_that_of_tokens(box):
    model, table, _ = adapted(box, "qwen2", "float32")
    inputs = [{"input_ids": text["input_ids"]} for text in texts()]
    peaks = []
    for packed_ in (False, True):
        batch = collate(inputs, zoo.PAD, packed=packed_)
        with LiveTensors([*model.parameters()]) as live:
            passed(model, table, batch)
        peaks.append(live.peak)
    assert peaks[1] / peaks[0] == pytest.approx(sum(LENGTHS) / len(LENGTHS) / max(LENGTHS), abs=0.2)


# ----- what auto means -----


@pytest.mark.quick
def test_auto_is_for_cpus_and_goes_on_as_a_run_began(box, monkeypatch):
    def packs(began: bool | None = None, **options) -> bool:
        classifier = load_classifier(ModelConfig(name_or_path=str(zoo.build("bert", box))), list(zoo.LABELS))
        config = tiny.tiny_config(box / "bert", box, box / "run", data__padding_free="auto", **options)
        return leave_out_padding(config, classifier, add_adapters(classifier, config.adapter)[1], began)

    assert packs() and packs(True) and not packs(False)
    assert not packs(optim__micro_batch_tokens="64")
    monkeypatch.setattr(runtime, "read_world", lambda: SimpleNamespace(device=torch.device("cuda")))
    assert packs(True) and not packs()


@pytest.mark.quick
def test_an_older_run_keeps_its_padding(tmp_path):
    saved: dict[str, Any] = {"data": {"length_bucket": 50}}
    (tmp_path / "state.json").write_text(json.dumps({"run": saved, "progress": {}}))
    assert began_without_padding(None) is None and began_without_padding(tmp_path) is False
    (tmp_path / "state.json").write_text(json.dumps({"run": saved | {"padding_free": True}, "progress": {}}))
    assert began_without_padding(tmp_path) is True
    corpus, sampler = Corpus({"train": []}, ["a", "b"]), BatchSampler([5] * 8, 4, 1, 0)
    config = tiny.tiny_config(tmp_path / "model", tmp_path, tmp_path / "run", data__padding_free="auto")
    now = run_identity(config, corpus, sampler, 3)
    older = {name: value for name, value in now.items() if name != "padding_free"}
    check_same_run(older, now, tmp_path)
    without = run_identity(config, corpus, BatchSampler([5] * 8, 4, 1, 0, packed=True), 3)
    with pytest.raises(CheckpointError, match="padding_free was None and is True"):
        check_same_run(older, without, tmp_path)
