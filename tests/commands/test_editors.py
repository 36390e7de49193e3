"""What editors and shells know of irtune: the schema of a recipe, and completion."""

import functools
import subprocess

import pytest
import yaml

from irtune import cli
from irtune.commands.completion import script
from irtune.commands.schema import recipe_schema
from irtune.config.keys import SECTIONS, known_keys
from irtune.config.packaged import packaged
from tests.support import ROOT

pytestmark = pytest.mark.quick
FIRST = "# yaml-language-server: $schema=recipe.schema.json"


schema_once = functools.cache(recipe_schema)


def of(key: str) -> dict:
    section, _, name = key.rpartition(".")
    known = schema_once()["properties"]
    return (known[section]["properties"] if section else known)[name]


def test_the_schema_beside_the_recipes_is_up_to_date(capsys):
    assert cli.main(["schema"]) == 0
    made = "python -m irtune schema > launch/recipes/recipe.schema.json"
    assert capsys.readouterr().out == (ROOT / "launch/recipes/recipe.schema.json").read_text(), f"run: {made}"


def test_the_schema_has_every_key_with_range_default_and_help():
    schema = schema_once()
    assert set(schema["properties"]) == {*SECTIONS, "deepspeed", "search"} and schema["additionalProperties"] is False
    assert all(len(of(key)["description"]) > 5 and "default" in of(key) for key in known_keys())
    lr, eps, steps = of("optim.lr"), of("optim.eps"), of("optim.max_steps")
    assert (lr["type"], lr["exclusiveMinimum"], lr["default"]) == ("number", 0.0, 5e-4)
    assert (eps["exclusiveMinimum"], eps["exclusiveMaximum"]) == (0.0, 1.0)
    assert steps["anyOf"] == [{"type": "integer", "minimum": 1}, {"type": "null"}] and steps["default"] is None
    assert "lora" in of("adapter.type")["enum"] and of("model.dtype")["enum"] == ["float32", "bfloat16", "float16"]
    assert of("data.drop_labels")["items"] == {"type": ["string", "number", "boolean"]}  # YAML reads 1 as a number


@pytest.mark.parametrize("recipe", packaged("recipes"), ids=lambda file: file.stem)
def test_recipes_name_the_schema_and_keep_to_it(recipe):
    text = recipe.read_text(encoding="utf-8")
    assert text.splitlines()[0] == FIRST
    for section, keys in yaml.safe_load(text).items():
        for key in keys if isinstance(keys, dict) else ():
            assert of(key if section == "search" else f"{section}.{key}")


def test_a_shell_completes_commands_options_and_values():
    asked = {
        "irtune cros": "crossvalidate",
        "irtune train --tuning.met": "--tuning.method",
        "irtune train --adapter.type do": "dora",
        "irtune train --model.compile t": "true",
        "irtune validate --config quick": "quickstart",
        "irtune compare --seed": "--seeds",
        "irtune predict --optim.l": "",
    }
    for shell in ("bash", "zsh"):
        text = script(shell)
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    ask = 'COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _irtune; echo "${{COMPREPLY[*]}}"'
    lines = [text, *(ask.format(words=words) for words in asked)]
    done = subprocess.run(["bash", "--norc"], input="\n".join(lines), text=True, capture_output=True, check=True)
    assert dict(zip(asked, done.stdout.split("\n"))) == asked


def test_other_shells_are_named(capsys):
    assert cli.main(["completion", "fish"]) == 2
    assert "fish" in capsys.readouterr().err
