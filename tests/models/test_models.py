"""Finding layers and heads in the module tree."""

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    OPTConfig,
    PhiConfig,
    Qwen3Config,
    RobertaConfig,
)

from irtune.adapters.build import add_adapters
from irtune.config import AdapterConfig, ModelConfig
from irtune.errors import ConfigError, ModelError
from irtune.models import load_classifier
from irtune.models.anatomy import find_anatomy, linear_names, output_projections
from irtune.models.limits import longest_input

pytestmark = pytest.mark.quick
SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=1),
    "phi": PhiConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=8),
    "roberta": RobertaConfig(**SMALL),
    "opt": OPTConfig(vocab_size=50, hidden_size=16, ffn_dim=32, num_hidden_layers=3, num_attention_heads=2,
                     word_embed_proj_dim=16),
}  # fmt: skip
LAST = {"llama": "o_proj", "phi": "dense", "qwen3": "o_proj", "roberta": "output.dense", "opt": "out_proj"}


@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_head_and_output_projection_are_found(kind):
    model = AutoModelForSequenceClassification.from_config(CONFIGS[kind])
    anatomy = find_anatomy(model)
    assert anatomy.num_layers == 3
    assert anatomy.head == (("classifier",) if kind == "roberta" else ("score",))
    names = {id(p): name for name, p in model.named_parameters()}
    for number, weight in enumerate(output_projections(model, anatomy)):
        name = names[id(weight)]
        assert f".{number}." in name
        assert name.endswith(f"{LAST[kind]}.weight")


def test_the_list_with_most_parameters_has_the_layers():
    """Experts are lists too, inside of layers and beside them."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))

    model = torch.nn.Module()
    model.adaptors = torch.nn.ModuleList([torch.nn.Linear(8, 8)])
    model.blocks = torch.nn.ModuleList(Layer() for _ in range(3))
    model.score = torch.nn.Linear(8, 2)
    anatomy = find_anatomy(model)
    assert (anatomy.layers, anatomy.num_layers) == ("blocks", 3)


def test_adapters_lie_in_every_layer_and_nowhere_else(bert):
    classifier = load_classifier(ModelConfig(name_or_path=str(bert), dtype="float32"), ["a", "b"])
    assert "pooler" not in " ".join(linear_names(classifier.model, classifier.anatomy))
    _, table = add_adapters(classifier, AdapterConfig(r=2))
    assert {len(layer) for layer in table.layers} == {12}  # q, k, v, attention output, two of the feed-forward; A and B
    assert all("lora_" in name for layer in table.layers for name, _ in layer)
    assert all("classifier" in name for name, _ in table.head)


def test_weights_missing_from_the_files_are_trained_with_the_head(tmp_path, bert):
    from safetensors.torch import load_file, save_file

    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(bert / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    classifier = load_classifier(ModelConfig(name_or_path=str(tmp_path), dtype="float32"), ["a", "b"])
    assert set(classifier.anatomy.head) == {"classifier", "bert.pooler.dense"}
    _, table = add_adapters(classifier, AdapterConfig(r=2))
    assert any("pooler" in name for name, _ in table.head)


def test_a_head_for_other_labels_is_replaced(tmp_path, llama):
    from transformers import AutoTokenizer

    sizes = SMALL | {"vocab_size": 400}
    model = LlamaForSequenceClassification(LlamaConfig(**sizes, num_key_value_heads=1, num_labels=7))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path)
    classifier = load_classifier(ModelConfig(name_or_path=str(tmp_path), dtype="float32"), ["a", "b"])
    assert classifier.model.score.weight.shape == (2, 16)
    same = classifier.model.model.layers[1].self_attn.q_proj.weight
    assert torch.equal(same, model.model.layers[1].self_attn.q_proj.weight)


def test_padding_is_set_in_tokenizer_and_model(tmp_path, llama):
    from transformers import AutoTokenizer

    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    classifier = load_classifier(ModelConfig(name_or_path=str(tmp_path), dtype="float32"), ["a", "b"])
    assert classifier.tokenizer.pad_token == "</s>"
    assert classifier.model.config.pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("dtype", ["float32", "model"])
def test_adapters_and_head_share_the_asked_dtype(llama, dtype):
    classifier = load_classifier(ModelConfig(name_or_path=str(llama), dtype="bfloat16"), ["a", "b"])
    _, table = add_adapters(classifier, AdapterConfig(r=2, dtype=dtype))
    wanted = torch.float32 if dtype == "float32" else torch.bfloat16
    assert {p.dtype for _, p in table.all()} == {wanted}


def test_a_new_adapter_changes_nothing(llama):
    classifier = load_classifier(ModelConfig(name_or_path=str(llama), dtype="float32"), ["a", "b"])
    batch = {"input_ids": torch.arange(4, 16).reshape(2, 6)}
    before = classifier.model.eval()(**batch).logits
    model, _ = add_adapters(classifier, AdapterConfig(r=2))
    assert torch.equal(model.eval()(**batch).logits, before)


def test_targets_that_match_nothing_list_what_exists(llama):
    classifier = load_classifier(ModelConfig(name_or_path=str(llama), dtype="float32"), ["a", "b"])
    with pytest.raises(ConfigError, match=r"'Wqkv' matches no linear module of a layer; they are: self_attn.q_proj"):
        add_adapters(classifier, AdapterConfig(target_modules=["Wqkv"]))


def test_a_model_without_layers_is_refused():
    with pytest.raises(ModelError, match="no list of transformer layers"):
        find_anatomy(torch.nn.Linear(2, 2))


def test_an_encoder_decoder_is_refused(tmp_path, llama):
    from transformers import AutoTokenizer, BartConfig, BartForSequenceClassification

    sizes = {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16,
             "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
    BartForSequenceClassification(BartConfig(**sizes)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="encoder-decoder"):
        load_classifier(ModelConfig(name_or_path=str(tmp_path)), ["a", "b"])


@pytest.mark.parametrize("damage", ["truncated", "missing layer", "tokenizer"])
def test_damaged_models_are_named(tmp_path, llama, damage):
    from safetensors.torch import load_file, save_file

    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "tokenizer":
        (tmp_path / "tokenizer.json").write_text("{}")
    else:
        kept = {name: tensor for name, tensor in load_file(weights).items() if ".layers.3." not in name}
        save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"is not in the files|can be loaded"):
        load_classifier(ModelConfig(name_or_path=str(tmp_path)), ["a", "b"])


def test_the_longest_input_is_known(bert):
    assert longest_input(load_classifier(ModelConfig(name_or_path=str(bert)), ["a", "b"])) == 512


# ----- files -----


@pytest.fixture
def pickled(tmp_path, llama):
    """The tiny model with its weights as pickles."""
    from safetensors.torch import load_file

    for file in llama.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(llama / "model.safetensors"), tmp_path / "pytorch_model.bin")
    return tmp_path


def test_pickles_are_refused_unless_they_are_allowed(pickled, llama):
    with pytest.raises(ModelError, match=r"no weights in safetensors .* set model\.allow_pickle to true"):
        load_classifier(ModelConfig(name_or_path=str(pickled), dtype="float32"), ["a", "b"])
    allowed = load_classifier(ModelConfig(name_or_path=str(pickled), dtype="float32", allow_pickle=True), ["a", "b"])
    plain = load_classifier(ModelConfig(name_or_path=str(llama), dtype="float32"), ["a", "b"])
    for name, parameter in plain.model.model.named_parameters():
        assert torch.equal(parameter, allowed.model.model.get_parameter(name))


def test_pickles_beside_safetensors_are_not_read(tmp_path, llama):
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle")
    for allow in (False, True):
        load_classifier(ModelConfig(name_or_path=str(tmp_path), allow_pickle=allow), ["a", "b"])


def test_pickles_of_the_hub_are_refused_in_the_same_words(monkeypatch, llama):
    """transformers' own message advises an option that users do not have."""

    def answer(*_arguments, **options):
        assert options["use_safetensors"] is True
        raise OSError("someone/model does not have model.safetensors. Please do not set `use_safetensors=True`.")

    monkeypatch.setattr("irtune.models.classifier.AutoModelForSequenceClassification.from_pretrained", answer)
    with pytest.raises(ModelError, match=r"no weights in safetensors .* set model\.allow_pickle to true") as caught:
        load_classifier(ModelConfig(name_or_path=str(llama)), ["a", "b"])
    assert "use_safetensors" not in str(caught.value)


@pytest.fixture
def in_shards(tmp_path, llama):
    """The tiny model in several files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_shards_that_are_missing_are_named(in_shards, quantization):
    config = ModelConfig(name_or_path=str(in_shards), dtype="float32", quantization=quantization)
    whole = load_classifier(config, ["a", "b"])
    assert whole.anatomy.num_layers == 6
    shards = sorted(in_shards.glob("*.safetensors"))
    assert len(shards) >= 3
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"lacks {shards[1].name} \(1 of the {len(shards)} files .* missing\)"):
        load_classifier(config, ["a", "b"])


def test_an_index_that_is_damaged_is_named(in_shards):
    (in_shards / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json does not say which file holds which weight"):
        load_classifier(ModelConfig(name_or_path=str(in_shards)), ["a", "b"])
