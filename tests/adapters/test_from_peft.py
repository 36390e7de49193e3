"""Types that peft computes: that each keeps what irtune promises of an adapter."""

import pytest
import torch
from peft import PeftModel
from torch import nn

from irtune.adapters import Suppression, load_adapter, write_adapter
from irtune.adapters.build import add_adapters
from irtune.adapters.guard import watch
from irtune.config import AdapterConfig, Config, ModelConfig, load_config
from irtune.config.checks import check_config
from irtune.config.declarations import adapter_kinds
from irtune.errors import ConfigError
from irtune.evaluation.saved_run import is_peft_adapter
from irtune.memory.estimate import state_bytes
from irtune.models import Classifier, load_classifier
from irtune.models.quantization import dequantize
from irtune.models.skeleton import empty_classifier
from tests.support import tiny
from tests.support.quantized import batch_for
from tests.support.quantized import load as load_quantized
from tests.support.ranks import run_cases

quick = pytest.mark.quick
LABELS = ["one thing", "other", "third"]
SETTINGS = {
    "hira": {},
    "ia3": {},
    "ln_tuning": {"dtype": "model"},
    "c3a": {"size": 20},
    "fourierft": {"size": 20, "scale": 150.0},
    "waveft": {"size": 20, "scale": 25.0},
    "oft": {"size": 8},
    "hra": {},
    "road": {"size": 8},
    "miss": {},
    "delora": {"alpha": 15.0},
    "loha": {},
    "lokr": {},
    "shira": {"r": 2},
    "vera": {},
    "randlora": {"alpha": 80.0},
}
TEXTS = [{"input_ids": list(range(4, 4 + length))} for length in (5, 9)]
BATCH = {"input_ids": torch.tensor([[4, 9, 11, 7, 5, 8], [6, 12, 10, 9, 5, 7]]), "attention_mask": torch.ones(2, 6)}


def settings(name, **others):
    return AdapterConfig(**{"type": name, "r": 4} | SETTINGS[name] | others)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("two layers"), layers=2)


def classifier_config(folder, dtype="float32"):
    return ModelConfig(name_or_path=str(folder), dtype=dtype)


def load(folder, dtype="float32"):
    torch.manual_seed(3)  # the head
    return load_classifier(classifier_config(folder, dtype), LABELS)


def logits(model):
    with torch.no_grad():
        return model.eval()(**BATCH).logits


def train(model, table, layers, steps=3):
    """Steps of AdamW on `layers` and the head; returns its state."""
    table.set_trainable(layers)
    named = [item for layer in layers for item in table.layers[layer]] + table.head
    optimizer = torch.optim.AdamW([parameter for _, parameter in named], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(**BATCH).logits, torch.tensor([0, 2])).backward()
        assert [name for name, parameter in named if parameter.grad is None] == []
        optimizer.step()
    return optimizer.state


@quick
@pytest.mark.parametrize("name", SETTINGS)
def test_it_starts_silent_trains_what_is_selected_and_loads_in_plain_peft(folder, tmp_path, name):
    classifier, adapter = load(folder), settings(name)
    guard = watch(classifier, TEXTS, patient=True)
    plain = logits(classifier.model)
    model, table = add_adapters(classifier, adapter)
    assert torch.allclose(logits(model), plain, atol=0 if name != "hra" else 1e-6, rtol=0)  # reflections round
    guard.check(model, table, adapter)
    suppression = Suppression(table)

    first = {full: parameter.detach().clone() for full, parameter in model.named_parameters()}
    state = train(model, table, [1])
    moved = {full for full, parameter in model.named_parameters() if not torch.equal(parameter, first[full])}
    assert moved == {full for full, _ in [*table.layers[1], *table.head]}
    groups = [[p.numel() for _, p in group] for group in (table.layers[1], table.head)]
    moments = sum(entry[moment].nbytes for entry in state.values() for moment in ("exp_avg", "exp_avg_sq"))
    assert moments == state_bytes(groups, 0, 1, 4)

    wanted = logits(model)
    with torch.no_grad(), suppression.suppressed([0, 1], factor=0.0):
        head = model.eval()(**BATCH).logits
    assert not torch.allclose(head, wanted, atol=1e-4)
    assert torch.equal(logits(model), wanted)

    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    assert is_peft_adapter(tmp_path / "peft", tmp_path)
    torch.manual_seed(99)  # other random first values
    loaded = PeftModel.from_pretrained(load_classifier(classifier_config(folder), LABELS).model, tmp_path / "peft")
    assert torch.allclose(logits(loaded), wanted, atol=1e-6, rtol=0)
    assert torch.allclose(logits(loaded.merge_and_unload()), wanted, atol=1e-5, rtol=0)

    write_adapter(tmp_path / "own", {full: p.detach() for full, p in table.all()}, adapter, LABELS)
    own = load_adapter(load_classifier(classifier_config(folder), LABELS), tmp_path / "own")
    assert torch.equal(logits(own), wanted)


@quick
@pytest.mark.parametrize("name", SETTINGS)
def test_it_is_counted_without_weights(folder, name):
    classifier = load(folder)
    _, table = add_adapters(classifier, settings(name))
    model, anatomy = empty_classifier(classifier_config(folder), LABELS, lambda kind: "sdpa")
    adapter = settings(adapter_kinds()[name].shapes_of or name, **SETTINGS[name])
    with torch.device("meta"):
        _, counted = add_adapters(Classifier(model, classifier.tokenizer, anatomy), adapter)
    for real, meta in zip([*table.layers, table.head], [*counted.layers, counted.head]):
        assert sum(p.numel() for _, p in real) == sum(p.numel() for _, p in meta)


@quick
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", ["float32", "model"])
def test_it_trains_beside_a_base_in_bf16(folder, name, dtype):
    dtype = SETTINGS[name].get("dtype", dtype)
    model, table = add_adapters(load(folder, "bfloat16"), settings(name, dtype=dtype))
    assert {p.dtype for _, p in table.all()} == {torch.float32 if dtype == "float32" else torch.bfloat16}
    train(model, table, [0, 1], steps=1)
    assert logits(model).isfinite().all()


@quick
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("name", [name for name in SETTINGS if not adapter_kinds()[name].unquantised])
def test_it_trains_beside_a_quantised_base(folder, tmp_path, name, quantization):
    base = load_quantized(folder, quantization)
    batch = batch_for(base.model)
    with torch.no_grad():
        plain = base.model.eval()(**batch).logits
    model, table = add_adapters(load_quantized(folder, quantization), settings(name))
    with torch.no_grad():
        assert torch.allclose(model.eval()(**batch).logits, plain, atol=1e-4)
    train(model, table, [0, 1])
    with torch.no_grad():
        wanted = model.eval()(**batch).logits
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(base.model, tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(**batch).logits, wanted, atol=1e-5)
    if quantization == "nf4":  # int8 rounds the inputs of its products too
        whole = load_quantized(folder, quantization)
        dequantize(whole.model, torch.float32)
        merged = PeftModel.from_pretrained(whole.model, tmp_path).merge_and_unload()
        with torch.no_grad():
            assert torch.allclose(merged.eval()(**batch).logits, wanted, atol=1e-5)


@quick
def test_hira_multiplies_each_weight():
    """W = ((1, 2), (3, 4)), A = (1, 2), B = (.5, 0)^T, x = (1, 1): (5.5, 7) by hand."""
    from peft import HiraConfig, get_peft_model

    net = nn.Sequential(nn.Linear(2, 2, bias=False))
    net[0].weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    model = get_peft_model(net, HiraConfig(r=1, target_modules=["0"]))
    model.base_model.model[0].hira_A["default"].data = torch.tensor([[1.0, 2.0]])
    model.base_model.model[0].hira_B["default"].data = torch.tensor([[0.5], [0.0]])
    assert model(torch.ones(1, 2)).tolist() == [[5.5, 7.0]]


@quick
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--adapter.type=fourierft", "--model.quantization=nf4"],
         "adapter.type fourierft is not there for a base of model.quantization nf4; set model.quantization to none"),
        (["--adapter.type=oft", "--adapter.dropout=0.1"], "adapter.type oft has no dropout; set adapter.dropout to 0"),
        (["--adapter.type=ln_tuning", "--adapter.dtype=float32"], "it needs adapter.dtype model, not float32"),
        (["--adapter.type=ln_tuning", "--adapter.target_modules=[norm]"], "leave adapter.target_modules out"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(options, sentence):
    with pytest.raises(ConfigError) as refusal:
        load_config([*options, "--data.path=x"])
    assert sentence in str(refusal.value)


@quick
@pytest.mark.parametrize("name", ["delora", "loha", "ln_tuning"])
def test_types_that_read_whole_weights_are_refused_under_zero_3(tmp_path, name):
    with pytest.raises(ConfigError, match=f"adapter.type {name} needs whole weights, which zero_optimization.stage 3"):
        load_config([f"--adapter.type={name}", "--data.path=x", f"--deepspeed={tiny.engine_json(tmp_path, 3)}"])


@quick
@pytest.mark.parametrize(
    ("model", "adapter", "sentence"),
    [
        ("llama", {"type": "hra", "r": 3}, "adapter.r is 3; adapter.type hra accepts even numbers"),
        (
            "llama",
            {"type": "road", "size": 24},
            r"does not fit Llama.* divisible by group_size.*; change adapter.size, ",
        ),
        ("llama", {"type": "miss", "r": 64}, r"does not fit Llama.*; change adapter.r, adapter.target_modules, or set"),
        ("llama", {"type": "waveft", "size": 4096}, r"does not fit Llama.* the product is .*; change adapter.size, "),
        ("gpt2", {"type": "oft", "size": 8}, r"does not fit GPT2.* Conv1D.* is not supported.*adapter.type to lora"),
    ],
)
def test_models_that_a_type_does_not_fit(request, model, adapter, sentence):
    with pytest.raises(ConfigError, match=sentence):
        add_adapters(load(request.getfixturevalue(model)), AdapterConfig(**adapter))


@quick
def test_an_unknown_type_is_answered_with_all_by_family():
    said = "\n".join(check_config(Config(adapter=AdapterConfig(type="hirra"))))
    assert "did you mean hira? accepted: " in said
    assert "; spectrum: c3a, fourierft, waveft" in said and "own weights: bitfit, " in said


def _selected_layers_train(model, stage, name, adapter):
    """Losses, whether state has the bytes of the formula, and the groups that moved, for two selections."""
    options = {key: value for key, value in adapter.items() if key != "dtype"}
    rig = tiny.Rig(model, stage, adapter={"type": name, **options}, sharded=True)
    losses, moved, exact = [], [], []
    for selected in ([0], [1]):
        rig.engine.reselect(selected)
        before = rig.layer_weights()
        losses += rig.train(1)
        moved.append([i for i, (a, b) in enumerate(zip(before, rig.layer_weights())) if not torch.equal(a, b)])
        whole = rig.engine.trainable()
        groups = [[whole[full].numel() for full, _ in group] for group in (*map(rig.table.layers.__getitem__, selected),
                                                                          rig.table.head)]  # fmt: skip
        exact.append(rig.engine.optimizer_state_bytes() == state_bytes(groups, stage, 2, 4))
    rig.close()
    return losses, moved, exact


@pytest.mark.slow
def test_selections_hold_on_two_ranks(folder):
    cases = [(folder, stage, name, SETTINGS[name]) for stage in (2, 3) for name in SETTINGS
             if stage == 2 or not adapter_kinds()[name].whole_weights]  # fmt: skip
    first: dict = {}
    for (_, stage, name, _), (one, other) in zip(cases, run_cases(_selected_layers_train, 2, cases, timeout=900)):
        assert one == other, (name, stage)
        losses, moved, exact = one
        assert moved == [[0, 2], [1, 2]] and exact == [True, True], (name, stage)
        assert losses == pytest.approx(first.setdefault(name, losses), abs=1e-4), (name, stage)
