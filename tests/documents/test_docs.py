"""The pages of docs/ say what the code does: made pages are up to date, names and links exist, examples run."""

import ast
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import irtune
from docs.make_configuration import reference
from irtune.commands import COMMANDS
from irtune.config.declarations import adapter_kinds, methods
from irtune.config.keys import SECTIONS, known_keys
from irtune.config.load import load_config
from irtune.config.presets import MODELS
from irtune.data.corpus import SPLITS
from irtune.data.prompts import PAIR_SEPARATOR, PIECES
from irtune.data.readers.tables import SUFFIXES
from tests.documents.test_architecture import LEVEL
from tests.support import ROOT

pytestmark = pytest.mark.quick
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    ROOT / "benchmarks" / "README.md",
]
SCRIPTS = sorted(path for path in (ROOT / "launch").rglob("*") if path.suffix in (".sh", ".yaml", ".py"))
RECIPES = sorted((ROOT / "launch/recipes").glob("*.yaml"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


# ----- made pages, links and names -----


def test_the_configuration_page_is_up_to_date():
    made = "python docs/make_configuration.py > docs/configuration.md"
    assert page("configuration.md") == reference(), f"out of date; run: {made}"


def test_the_reference_needs_no_torch():
    code = "import sys, docs.make_configuration as r; r.reference(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_reference_has_every_key_with_its_meaning():
    rows = [line.split(" | ") for line in reference().splitlines() if line.startswith("| `")]
    table = {row[0].removeprefix("| ").strip("`"): row[1:] for row in rows if len(row) == 4}
    assert list(table) == known_keys()
    assert all(len(meaning.removesuffix(" |")) > 5 for _, _, meaning in table.values())
    assert table["optim.lr"][:2] == ["a number above 0", "`0.0005`"]
    assert table["tuning.num_splits"][0] == "a whole number from 1 to 8"
    assert table["run.best_metric"][0].startswith("`macro_f1`, `macro_f1_present`, `accuracy`, `auprc`, `loss`, ")
    assert all(f"`{name}`" in table["adapter.type"][0] for name in adapter_kinds())


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", PAGES, ids=relative)
def test_links_lead_somewhere(file):
    text = BLOCK.sub("", file.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        there = file.parent / name if name else file
        assert there.exists(), f"{relative(file)}: {target}"
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), f"{relative(file)}: {target}"


def test_every_page_can_be_reached_from_the_readme():
    reached, queue = set(), [ROOT / "README.md"]
    while queue:
        file = queue.pop()
        if file in reached or file.suffix != ".md" or not file.is_file():
            continue
        reached.add(file)
        targets = re.findall(r"\]\(([^)#\s]+)", BLOCK.sub("", file.read_text(encoding="utf-8")))
        queue += [(file.parent / target).resolve() for target in targets if "://" not in target]
    assert not {relative(file) for file in set(PAGES) - reached}
    direct = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [file.name for file in DOCS if f"](docs/{file.name})" not in direct]


@pytest.mark.parametrize("file", [*PAGES, *SCRIPTS], ids=relative)
def test_every_key_and_command_that_is_mentioned_exists(file):
    text = file.read_text(encoding="utf-8")
    keys = set(re.findall(r"--([a-z]+\.[a-z_]+)", text)) - {"section.key"}
    keys |= set(re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_]+)[`:]", text))
    assert keys <= set(known_keys()), f"{relative(file)}: {keys - set(known_keys())}"
    commands = set(re.findall(r"python -m irtune ([a-z]+)", text))
    assert commands <= set(COMMANDS), f"{relative(file)}: {commands - set(COMMANDS)}"


def test_every_adapter_type_and_method_is_described():
    text = page("adapters.md") + page("method.md")
    rows = set(re.findall(r"^\| `?([a-z0-9_-]+)`?(?: \(default\))? \|", text, re.MULTILINE))
    missing = {*adapter_kinds(), *methods()} - rows
    assert not missing, f"no row in a table of docs/adapters.md or docs/method.md: {missing}"


def test_pages_are_short_enough_to_be_read():
    lines = {file: file.read_text(encoding="utf-8").count("\n") for file in PAGES}
    assert lines[ROOT / "README.md"] <= 150
    written = [count for file, count in lines.items() if file.is_relative_to(ROOT / "docs")]
    assert sum(written) - lines[ROOT / "docs/configuration.md"] <= 3000


# ----- the README and the paper -----


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_published_command_and_ours_agree_row_by_row():
    text = page("reproducing.md")
    (command,) = [content for language, content in BLOCK.findall(text) if language == "bash"]
    line = shlex.split(command.replace("\\\n", " "), comments=True)
    config = load_config(line[line.index("train.py") + 1 :])
    table = section(text, "The published command, option by option")
    rows = [row.strip("| ").split(" | ") for row in table.splitlines() if row.startswith("| ") and "`" in row]
    said = [re.match(r"([a-z_]+)\.([a-z_]+): (.+)$", item) for row in rows for item in re.findall(r"`([^`]+)`", row[2])]
    settings = [match.groups() for match in said if match is not None]
    assert len(rows) >= 15 and len(settings) >= 25
    for part, key, value in settings:
        assert getattr(getattr(config, part), key) == yaml.safe_load(value), f"{part}.{key}"
    published = {option for row in rows for option in re.findall(r"`(--[a-z0-9-]+)`", row[0])}
    wanted = "model-name dataset-name adapter-name importance-metric-name tuning-method batch-size " \
             "per-device-train-batch-size use-instruction"  # fmt: skip
    assert {f"--{name}" for name in wanted.split()} <= published


def test_the_page_of_the_paper_has_every_recipe():
    named = set(re.findall(r"\b[\w.-]+\.yaml\b", page("reproducing.md")))
    assert {recipe.name for recipe in RECIPES} - {"quickstart.yaml", "search-autopeft.yaml"} <= named


def test_the_readmes_results_are_those_of_their_files():
    text = section((ROOT / "README.md").read_text(encoding="utf-8"), "Results so far")
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in text.splitlines()
        if "MPNet" in row or "Smol" in row
    ]
    assert len(rows) >= 3
    for row in rows:
        (file,) = re.findall(r"\]\((docs/results/.*?\.json)\)", row[1])
        results = json.loads((ROOT / file).read_text(encoding="utf-8"))
        wanted = [f"{results['dev'][name]:.3f}".removeprefix("0") for name in ("accuracy", "macro_f1", "auprc")]
        assert row[2:5] == wanted
        assert row[5] == f"{results['optimizer_state_bytes_at_selections']['mean'] / 2**20:.1f} MiB"


def test_older_results_have_the_commands_that_made_them():
    lines = section(page("results/README.md"), "The commands of the older tables").splitlines()
    commands = [line for line in lines if line.startswith("python -m irtune compare ")]
    made = [file.read_text(encoding="utf-8") for file in (ROOT / "docs/results").glob("*/compare.md")]
    assert len(commands) == 2
    assert all(sum(f"Command: `{command}`" in text for text in made) == 1 for command in commands)


# ----- design -----


def test_the_page_of_the_design_has_every_room_from_the_top_floor_down():
    rows = re.findall(r"^\| ([a-z, ]+) \| .+ \|$", section(page("design.md"), "Rooms"), re.MULTILINE)
    rooms = [row.split(", ") for row in rows if row != "room"]
    assert sorted(itertools.chain(*rooms)) == sorted(set(LEVEL) - {"__main__"})
    levels = [max(LEVEL[room] for room in row) for row in rooms]
    assert levels == sorted(levels, reverse=True)


def test_every_invariant_names_a_test_that_exists():
    rows = re.findall(r"^\| .+ \| (.+) \|$", section(page("design.md"), "What must hold"), re.MULTILINE)
    rows = [row for row in rows if row != "test"]
    assert len(rows) >= 9
    for row in rows:
        file, _, function = row.partition(": ")
        assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), row


@pytest.mark.parametrize("file", PAGES, ids=relative)
def test_every_file_of_the_project_that_is_mentioned_exists(file):
    text = file.read_text(encoding="utf-8")
    for name in re.findall(r"(?<![\w/.])(?:tests|irtune|launch|ds_configs|benchmarks)/[\w./-]*\w", text):
        assert file.name == "extending.md" or (ROOT / name).exists(), f"{relative(file)}: {name}"


# ----- data formats -----


def test_the_page_of_data_formats_has_every_ending_split_and_prompt():
    text = page("data-formats.md")
    assert all(f"`{suffix}`" in text for suffix in SUFFIXES)
    assert all(f"`{stem}`" in text for stems in SPLITS.values() for stem in stems)
    before, after, labels = "He go home.", "He goes home.", "clarity, fluency, coherence"
    (head, middle, tail), tagged = PIECES["instruction"], PIECES["tagged"]
    seen = (
        f"{tagged[0]}{before}{tagged[1]}{after}{tagged[2]}",
        f"{head.format(labels=labels)}{before}{middle}{after}{tail}",
        f"{before}{PAIR_SEPARATOR}{after}",
        f"{tagged[0]}{tagged[1]}It was late.{tagged[2]}",
    )
    blocks = [content for _, content in BLOCK.findall(text)]
    assert all(f"{example}\n" in blocks for example in seen)


# ----- recipes -----


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_start_with_their_launch_line(recipe):
    text = recipe.read_text(encoding="utf-8")
    comment = text[: text.index("deepspeed: ")]
    assert all(line.startswith("#") for line in comment.splitlines())
    assert f"train.py --config {relative(recipe)} --data.path " in comment
    for options in re.findall(r"^# .*train\.py (--config .*)$", comment, re.MULTILINE):
        load_config(shlex.split(options))
    model = yaml.safe_load(text)["model"]["name_or_path"]
    if model in MODELS:
        assert f"preset: {MODELS[model]}" in text, "the comment names another model than the preset"
        assert "GPU" in comment and "hub" in comment


def test_every_model_preset_has_a_recipe():
    used = {yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]["name_or_path"] for recipe in RECIPES}
    assert set(MODELS) <= used


# ----- troubleshooting -----


def said_by_irtune() -> list[str]:
    """Every string in the code, the parts of an f-string on their own."""
    strings = []
    for file in (ROOT / "irtune").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    return strings


def test_every_message_of_the_troubleshooting_page_is_in_the_code():
    cells = re.findall(r"^\| (`.+?`) \| .+ \|$", page("troubleshooting.md"), re.MULTILINE)
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) >= 70 and len(messages) == len(set(messages))
    known = said_by_irtune()
    for message in messages:
        for part in message.split("..."):
            wanted = part.strip(" '")
            assert any(wanted in text for text in known), f"{message!r}: no message has {wanted!r}"


# ----- extending -----


def test_the_examples_of_the_extending_page_work(llama, tmp_path):
    for name in ("irtune", "ds_configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for language, content in BLOCK.findall(page("extending.md")):
        if language == "python":
            (tmp_path / content.split("\n", 1)[0].removeprefix("# ")).write_text(content, encoding="utf-8")
    scripts = sorted(file.name for file in tmp_path.glob("try_*.py"))
    assert scripts == ["try_corpus.py", "try_rescale.py", "try_window.py"]
    # One process for all: most of its time goes into importing torch.
    code = f"import runpy, sys; [runpy.run_path(name) for name in {scripts}]"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(llama)], cwd=tmp_path, env=environment, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


# ----- citation -----


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "type", "license"} <= set(citation)
    assert citation["version"] == irtune.__version__
    (paper,) = citation["references"]
    assert paper["type"] == "conference-paper"
    assert [author["family-names"] for author in paper["authors"]] == ["Liu", "Litman"]
    assert f"## {irtune.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
