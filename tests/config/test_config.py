"""Configuration: all errors at once, nearest names, presets, the DeepSpeed JSON."""

import json

import pytest
import yaml

from irtune.config import load_config, write_config
from irtune.config.deepspeed_json import read_engine_json
from irtune.config.keys import known_keys
from irtune.errors import ConfigError
from tests.support import ROOT

pytestmark = pytest.mark.quick


def problems(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    return caught.value.problems


def test_all_errors_are_reported_at_once(tmp_path):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("optim: {lr: fast, micro_batch_size: 0}\nmodel: {dtype: int4}\ntunning: {method: ir}\n")
    found = problems("--config", str(recipe), "--tuning.intervall", "3", "--run.seed", "-1")
    text = "\n".join(found)
    for expected in (
        "optim.lr",
        "'fast'",
        "int4",
        "micro_batch_size is 0",
        "tunning",
        "intervall",
        "run.seed",
        "corpus",
    ):
        assert expected in text
    assert len(found) == 7


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("--tuning.methods", "tuning.method"), ("--optim.rl", "optim.lr"), ("--model.name", "model.name_or_path")],
)
def test_unknown_options_name_the_nearest(wrong, right):
    assert problems(wrong, "1", "--data.path", "x") == [f"unknown option '{wrong[2:]}'; did you mean {right}?"]


def test_a_section_that_is_no_mapping(tmp_path):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("optim: 3\n")
    assert "section 'optim'" in problems("--config", str(recipe), "--data.path", "x")[0]


def test_a_file_that_is_not_yaml(tmp_path):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("optim: [1\n")
    assert "not valid YAML" in problems("--config", str(recipe), "--data.path", "x")[0]


def test_a_missing_file_and_a_missing_value():
    found = problems("--config", "no/such.yaml", "--optim.lr")
    assert any("no/such.yaml" in problem for problem in found)
    assert any("--optim.lr needs a value" in problem for problem in found)


def test_presets_fill_in_and_given_keys_win():
    config = load_config(["--data.path", "x", "--tuning.preset", "reference", "--tuning.interval", "5"])
    assert (config.tuning.score, config.tuning.scores, config.tuning.rule) == ("reference", "stale", "reference")
    assert config.tuning.first == "random_half"
    assert config.tuning.interval == 5
    config = load_config(["--data.path", "x", "--data.preset", "iterater-human", "--model.name_or_path", "phi-2"])
    assert (config.data.before, config.data.label, config.data.drop_labels) == ("before_sent", "labels", ["others"])
    assert config.model.name_or_path == "microsoft/phi-2"


def test_launcher_options_are_accepted():
    assert load_config(["--local_rank=1", "--data.path", "x"]).data.path == "x"


def test_overrides_beat_the_file(tmp_path):
    recipe = tmp_path / "good.yaml"
    recipe.write_text("data: {path: x}\noptim: {lr: 1.0e-3, betas: [0.8, 0.9]}\n")
    config = load_config(["--config", str(recipe), "--optim.lr=2e-4", "--data.labels", "[a, b]"])
    assert config.optim.lr == 2e-4
    assert config.optim.betas == [0.8, 0.9]
    assert config.data.labels == ["a", "b"]


def test_a_written_configuration_reads_back(tmp_path):
    config = load_config(["--data.path", "x", "--data.labels", "{one: a, two: b}", "--optim.max_steps", "7"])
    write_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_help_lists_every_option_with_its_meaning(capsys):
    with pytest.raises(SystemExit):
        load_config(["--help"])
    text = capsys.readouterr().out
    for key in known_keys():
        assert f"--{key}" in text
    assert "Optimizer steps between selections" in text
    assert "default: 10" in text


@pytest.mark.parametrize("recipe", sorted((ROOT / "launch/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads(recipe):
    config = load_config(["--config", str(recipe), "--data.path", "x"])
    settings, found = read_engine_json(config, world_size=2)
    assert found == []
    assert settings["train_batch_size"] == 2 * config.optim.micro_batch_size * config.optim.gradient_accumulation_steps
    assert yaml.safe_load(recipe.read_text())


@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_engine_file_is_accepted(file):
    settings, found = read_engine_json(load_config(["--data.path", "x", "--deepspeed", str(file)]), world_size=4)
    assert found == []
    assert settings["zero_optimization"]["stage"] == int(file.stem[4])


ENGINE = {
    "clipping": ({"gradient_clipping": 5.0}, "gradient_clipping is 5.0, but optim.max_grad_norm makes it 1.0"),
    "precision": (
        {"bf16": {"enabled": True}},
        "bf16.enabled is True, but adapter.dtype with model.dtype makes it False",
    ),
    "optimizer": ({"optimizer": {"type": "Adam"}}, "'optimizer' belongs to the optim section"),
    "unknown": (
        {"zero_optimisation": {"stage": 2}},
        "unknown key 'zero_optimisation'; did you mean 'zero_optimization'?",
    ),
    "stage": ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4; accepted: 0, 1, 2, 3"),
    "stage type": ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is True"),
    "section": ({"zero_optimization": 2}, "zero_optimization must hold an object, not 2"),
    "list": ([1], "must hold an object, not a list"),
}


@pytest.mark.parametrize("case", ENGINE)
def test_bad_engine_files_are_refused_with_the_other_errors(tmp_path, case):
    content, message = ENGINE[case]
    file = tmp_path / "engine.json"
    file.write_text(json.dumps(content))
    found = problems("--data.path", "x", "--deepspeed", str(file), "--optim.lr", "-1")
    assert len(found) == 2
    assert message in found[1]


def test_the_batch_depends_on_the_ranks(tmp_path):
    file = tmp_path / "engine.json"
    file.write_text(json.dumps({"train_batch_size": 16}))
    config = load_config(["--data.path", "x", "--deepspeed", str(file)])
    assert read_engine_json(config, world_size=2)[1] == []
    (found,) = read_engine_json(config, world_size=3)[1]
    assert "train_batch_size is 16, but optim.micro_batch_size x" in found
    assert "3 ranks makes it 24" in found


def test_an_empty_engine_file_is_stage_0(tmp_path):
    (tmp_path / "engine.json").write_text("{}")
    config = load_config(["--data.path", "x", "--deepspeed", str(tmp_path / "engine.json")])
    assert read_engine_json(config, 1)[0]["zero_optimization"]["stage"] == 0


def test_an_engine_file_that_is_missing_or_broken(tmp_path):
    assert problems("--data.path", "x", "--deepspeed", "no/such.json") == ["deepspeed: there is no file 'no/such.json'"]
    (tmp_path / "engine.json").write_text("{")
    assert "not valid JSON" in problems("--data.path", "x", "--deepspeed", str(tmp_path / "engine.json"))[0]


def test_zero_keys_are_checked_against_deepspeed():
    from irtune.engine.deepspeed_private import unknown_zero_keys

    assert unknown_zero_keys({"zero_optimization": {"stage": 2, "overlap_com": True}}) == [
        "deepspeed: unknown key zero_optimization.overlap_com; did you mean 'overlap_comm'?"
    ]


def test_labels_that_yaml_reads_as_numbers_are_names(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: {path: x, labels: {0: a, 1: b}, drop_labels: [3]}\n")
    config = load_config(["--config", str(recipe)])
    assert (config.data.labels, config.data.drop_labels) == ({"0": "a", "1": "b"}, ["3"])


@pytest.mark.parametrize(
    ("option", "near"),
    [("--tuning.method=rts", "rst"), ("--tuning.score=rsm", "rms"), ("--adapter.type=lorra", "lora"),
     ("--tuning.method=spectrun", "spectrum"), ("--model.dtype=bfloat", "bfloat16")],
)  # fmt: skip
def test_unknown_names_get_the_known_ones_and_the_nearest(option, near):
    with pytest.raises(ConfigError) as raised:
        load_config(["--data.path=x", option])
    said = str(raised.value)
    assert f"did you mean {near}?" in said and option.partition("=")[2] in said
    assert said.count(",") > 2  # the others too


@pytest.mark.quick
@pytest.mark.parametrize(
    "options, prompt, pooling",
    [
        ([], "diff", "mean+edit"),
        (["--data.preset=argrewrite"], "diff", "mean+edit"),
        (["--model.pooling=last"], "diff", "last"),
        (["--data.prompt=tagged"], "tagged", "class"),
        (["--data.prompt=instruction", "--model.pooling=mean"], "instruction", "mean"),
        (["--data.after=null"], "plain", "class"),
        (["--data.template={before} > {after}"], "diff", "class"),  # which takes the prompt's place
    ],
)
def test_a_pair_is_a_diff_that_is_read_at_its_edits_unless_something_else_is_asked_for(options, prompt, pooling):
    config = load_config(["--data.path=x", *options])
    assert (config.data.prompt, config.model.pooling) == (prompt, pooling)
