"""Low-rank updates where peft or the model has its own idea of what they stand beside."""

import logging

import pytest
import torch
import transformers
from peft import PeftModel

from irtune.adapters.build import add_adapters
from irtune.config import AdapterConfig, ModelConfig, load_config
from irtune.errors import ConfigError
from irtune.evaluation.saved_run import is_peft_adapter
from irtune.models import load_classifier
from tests.support import tiny, zoo

pytestmark = pytest.mark.quick
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.arange(20).view(2, 10) + 4
SETTINGS = {
    "lora": {},
    "dora": {"type": "dora"},
    "pissa": {"type": "pissa"},
    "experts": {"target_parameters": EXPERTS},
    "only experts": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """mixtral and jamba of the zoo; and a model with experts in every second layer, whose names peft knows.

    Its 24 modules of attention are more than the 20 from which on peft rewrites a list of names.
    """
    folder = tmp_path_factory.mktemp("zoo")
    for name in ("mixtral", "jamba"):
        zoo.build(name, folder)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 2,
               "num_hidden_layers": 6}  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**zoo.DECODER | experts)).save_pretrained(
        folder / "qwen3moe"
    )
    zoo.tokenizer().save_pretrained(folder / "qwen3moe")
    return folder


def load(models, name):
    return load_classifier(ModelConfig(name_or_path=str(models / name), dtype="float32"), list(zoo.LABELS))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


@pytest.mark.parametrize(
    ("name", "setting"),
    [(name, setting) for name in ("mixtral", "qwen3moe", "jamba") for setting in SETTINGS
     if name == "mixtral" or setting != "only experts"],
)  # fmt: skip
def test_updates_start_at_zero_learn_and_load_in_plain_peft(models, name, setting, tmp_path):
    classifier = load(models, name)
    before = logits(classifier.model)
    model, table = add_adapters(classifier, AdapterConfig(r=4, **SETTINGS[setting]))
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    table.set_trainable(range(len(table.layers)))
    torch.manual_seed(0)
    for parameter_name, parameter in table.all():
        if "lora_B" in parameter_name:
            parameter.data.normal_(0, 0.05)
    loss = model.train()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.square().sum()
    loss.backward()
    assert [name for name, parameter in table.all() if parameter.grad is None] == []
    wanted = logits(model)
    assert not torch.allclose(wanted, before, atol=1e-3)
    model.save_pretrained(tmp_path)
    assert is_peft_adapter(tmp_path, tmp_path)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(models / name, num_labels=3)
    base.config.pad_token_id = zoo.PAD
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path)), wanted, rtol=1e-5, atol=1e-5)


def test_what_gets_no_adapter_is_named(models, caplog):
    with caplog.at_level(logging.WARNING, "irtune"):
        for name in ("mixtral", "qwen3moe", "jamba"):
            add_adapters(load(models, name), AdapterConfig(r=4))
    assert "mlp.experts.gate_up_proj, mlp.experts.down_proj are not linear modules and get no adapter" in caplog.text
    assert "peft would turn the modules mlp.down_proj, mlp.gate_proj, mlp.up_proj of Qwen3Moe" in caplog.text
    assert "reads the weights of mamba.dt_proj and never calls them: they get no adapter" in caplog.text


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("mixtral", {"target_modules": ["up_proj"]}, "adapter.target_parameters can name .*mlp.experts.gate_up_proj"),
        ("qwen3moe", {"target_modules": ["up_proj"]}, "adapter.target_parameters can name mlp.up_proj.weight$"),
        ("jamba", {"target_modules": ["dt_proj"]}, "never calls them, so an adapter beside them would do nothing"),
        ("mixtral", {"target_parameters": ["experts.w1"]}, "'experts.w1' matches no weight of a layer; .*down_proj"),
    ],
)
def test_targets_that_cannot_be_are_refused(models, name, settings, reason):
    with pytest.raises(ConfigError, match=reason):
        add_adapters(load(models, name), AdapterConfig(r=4, **settings))


def test_weights_of_experts_need_lora_without_dropout_on_whole_weights(tmp_path):
    options = [f"--data.path={tmp_path}", "--adapter.target_parameters=[experts.down_proj]"]
    stage3 = f"--deepspeed={tiny.engine_json(tmp_path, 3)}"
    with pytest.raises(ConfigError) as refusal:
        load_config([*options, "--adapter.dropout=0.1", stage3])
    assert "adapter.target_parameters cannot have adapter.dropout; set it to 0" in str(refusal.value)
    assert "adapter.target_parameters does not go with zero_optimization.stage 3" in str(refusal.value)
    with pytest.raises(ConfigError, match=r"target_parameters goes with adapter\.type lora or rslora, not dora"):
        load_config([*options, "--adapter.type=dora"])
