"""How a pair is written: a user's own template, and the tokenizer's own format for `plain`."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from irtune.config import DataConfig, load_config, write_config
from irtune.config.template import read_template, template_pieces, template_problems
from irtune.data import Encoder, Example
from irtune.errors import ConfigError

pytestmark = pytest.mark.quick
WORDS = ("<unk>", "<s>", "</s>", "[CLS]", "[SEP]", "<sep>", "<cls>", "a", "b", "c", "d", "old", ":", "new", "x", "y",
         "{", "}")  # fmt: skip
LABELS = ["x", "y"]


def tokenizer(single=None, pair=None, *, types=False, **special):
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if single is not None:
        used = [word for word in WORDS if word in f"{single} {pair}".replace(":1", "").replace(":2", "").split()]
        raw.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[(word, WORDS.index(word)) for word in used]
        )
    inputs = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<unk>", model_input_names=inputs, **special
    )


OWN = {
    "bert": (("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
             {"sep_token": "[SEP]", "cls_token": "[CLS]", "types": True}),
    "roberta": (("<s> $A </s>", "<s> $A </s> </s> $B </s>"), {"sep_token": "</s>", "cls_token": "<s>"}),
    "mpnet": (("<s> $A </s>", "<s> $A </s> </s> $B </s>"), {"sep_token": "</s>", "bos_token": "<s>"}),
    "xlnet": (("$A <sep> <cls>:2", "$A <sep> $B:1 <sep>:1 <cls>:2"), {"sep_token": "<sep>", "types": True}),
}  # fmt: skip


@pytest.mark.parametrize("kind", OWN)
def test_a_plain_pair_is_written_as_the_tokenizer_itself_does(kind):
    templates, options = OWN[kind]
    own = tokenizer(*templates, **options)
    encoder = Encoder(own, DataConfig(prompt="plain", max_length=16), LABELS)
    wanted = own("a b", "c d d")
    found = encoder.encode(Example("1", "a b", "c d d", 0))
    assert found["input_ids"] == wanted["input_ids"]
    assert found.get("token_type_ids") == wanted.get("token_type_ids")
    long = encoder.encode(Example("2", "a b " * 20, "c", 0))["input_ids"]
    fixed = len(wanted["input_ids"]) - 5
    assert len(long) == 16 and long == own("a b " * ((15 - fixed) // 2) + "a " * ((15 - fixed) % 2), "c")["input_ids"]


@pytest.mark.parametrize("kind", OWN)
def test_a_context_belongs_to_the_first_text_of_a_plain_pair(kind):
    templates, options = OWN[kind]
    own = tokenizer(*templates, **options)
    encoder = Encoder(own, DataConfig(prompt="plain", max_length=16, context="around"), LABELS)
    wanted = own(f"d d {own.sep_token} a b", "c d")
    found = encoder.encode(Example("1", "a b", "c d", 0, context="d d"))
    assert found["input_ids"] == wanted["input_ids"]
    assert found.get("token_type_ids") == wanted.get("token_type_ids")


@pytest.mark.parametrize(
    ("templates", "special", "wanted"),
    [
        ((), {"bos_token": "<s>"}, "a c"),  # GPT-2: no post-processor, no separator
        (("<s> $A", "<s> $A <s> $B"), {"bos_token": "<s>"}, "<s> a c"),  # Llama
        (("<s> $A </s>", "<s> $A </s> <s> $B </s>"), {"bos_token": "<s>", "eos_token": "</s>"}, "<s> a c </s>"),
        (("<s> $A", "<s> $A <s> $B"), {"bos_token": "<s>", "sep_token": "<sep>"}, "<s> a <sep> c"),  # never in a pair
    ],
)
def test_language_models_keep_the_line_break(templates, special, wanted):
    own = tokenizer(*templates, **special)  # whose vocabulary has no line break
    found = Encoder(own, DataConfig(prompt="plain", max_length=16), LABELS).encode(Example("1", "a", "c", 0))
    assert own.decode(found["input_ids"]) == wanted


def test_tokens_of_a_llama_like_model_are_what_they_were(llama):
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(llama)
    encoder = Encoder(own, DataConfig(prompt="plain", max_length=64), LABELS)

    def ids(text):
        return own(text, add_special_tokens=False)["input_ids"]

    found = encoder.encode(Example("1", "The work", "A teacher", 0))["input_ids"]
    assert found == ids("The work") + ids("\n") + ids("A teacher")


# ----- data.template -----


def test_a_template_stands_around_the_texts():
    own = tokenizer("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", sep_token="[SEP]", cls_token="[CLS]")
    data = DataConfig(template="{{ {labels} }} old : {before} new : {after} : ", max_length=24)
    encoder = Encoder(own, data, ["x", "y"])
    ids = encoder.encode(Example("1", "a", "b c", 0))["input_ids"]
    assert own.decode(ids) == "[CLS] { <unk> y } old : a new : b c : [SEP]"  # "x," is no word of this vocabulary
    single = Encoder(own, DataConfig(template="old : {before} :", after=None, max_length=16), ["x", "y"])
    assert own.decode(single.encode(Example("1", "a b", None, 0))["input_ids"]) == "[CLS] old : a b : [SEP]"


def test_a_template_is_never_cut_and_fits():
    own = tokenizer()
    encoder = Encoder(own, DataConfig(template="old : {before} new : {after} x", max_length=16), LABELS)
    ids = encoder.encode(Example("1", "a " * 50, "b " * 50, 0))["input_ids"]
    assert own.decode(ids) == "old : " + "a " * 6 + "new : " + "b " * 5 + "x"
    with pytest.raises(
        ConfigError, match=r"but your template \(data\.template\) alone takes 20 tokens; accepted: at least 22"
    ):
        Encoder(own, DataConfig(template="old " * 20 + "{before}{after}", max_length=16), LABELS)


def test_pieces_of_a_template():
    assert template_pieces("{labels}: {{{before}}} -> {after}", ["x", "y"]) == ["x, y: {", "} -> ", ""]
    assert template_pieces("{before}", ["x"]) == ["", ""]


BAD = {
    "{before} {afer}": ("{afer}", "{after} nowhere"),
    "{before}": ("{after} nowhere; accepted: once",),
    "{after} {labels}": ("{before} nowhere",),
    "{before} {before} {after}": ("{before} 2 times; accepted: once",),
    "{after} then {before}": ("{after}, {before} in this order; accepted: {before}, {after}",),
    "{before} {} {after}": ("holds {}; accepted: {before}, {after} and {labels}",),
    "{before} {0} {after}": ("holds {0}",),
    "{before!r} {after}": ("holds {before!r}",),
    "{before:>9} {after}": ("holds {before:>9}",),
    "{before.__class__} {after}": ("holds {before.__class__}", "{before} nowhere"),
    "{before} {after} {": ("Single '{' encountered in format string; write a brace that is text twice: {{ or }}",),
    "{before} } {after}": ("Single '}' encountered",),
    "{before}\0{after}": ("a NUL character",),
    "{before} {after}" + "x" * 20_000: ("20,016 characters; accepted: at most 20,000",),
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:30].replace("\0", "NUL"))
def test_a_template_that_does_not_fit_is_named(text):
    said = "\n".join(template_problems(text, pair=True))
    assert all(words in said for words in BAD[text]), said
    with pytest.raises(ConfigError, match=r"data\.template"):
        load_config(["--data.path", "x", "--data.template", text])


def test_a_single_text_has_no_text_after():
    assert template_problems("{before} {labels}", pair=False) == []
    (said,) = template_problems("{before} {after}", pair=False)
    assert "{after}; accepted: {before} and {labels}, since data.after is null" in said


def test_a_template_comes_from_a_file_and_goes_into_the_configuration(tmp_path):
    (tmp_path / "own.txt").write_text("Old: {before}\nNew: {after}\n")
    config = load_config(["--data.path", "x", "--data.template", str(tmp_path / "own.txt")])
    assert config.data.template == "Old: {before}\nNew: {after}"
    write_config(config, tmp_path / "config.yaml")
    (tmp_path / "own.txt").unlink()
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config
    for value, words in (
        (str(tmp_path / "none.txt"), "names a file, which cannot be read: No such file"),
        (str(tmp_path), "cannot be read: it is not a file"),
    ):
        assert words in read_template(value)[1][0]
    (tmp_path / "empty.txt").write_text("before and after")
    assert "has no {before}" in read_template(str(tmp_path / "empty.txt"))[1][0]
    (tmp_path / "latin.txt").write_bytes("{before} \u00e9 {after}".encode("latin-1"))
    assert "it is not UTF-8" in read_template(str(tmp_path / "latin.txt"))[1][0]


def test_a_template_beside_a_prompt_is_a_contradiction():
    with pytest.raises(ConfigError, match=r"data\.template takes the place of data\.prompt plain"):
        load_config(["--data.path", "x", "--data.template", "{before} {after}", "--data.prompt", "plain"])


@pytest.mark.parametrize("count", [4_097, 20_000])
def test_a_long_template_is_read_back_from_the_run(tmp_path, count):
    around = "{before} -> {after}"
    (tmp_path / "template.txt").write_text("x" * (count - len(around)) + around)
    config = load_config(["--data.path=x", f"--data.template={tmp_path / 'template.txt'}"])
    assert config.data.template is not None and len(config.data.template) == count
    write_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config
