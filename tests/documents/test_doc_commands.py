"""Every command of README.md, CONTRIBUTING.md, docs/ and benchmarks/ is run here on a tiny model and corpus, or says
what it needs, or is run by a test that is named here. No command escapes: one of an unknown kind fails.

A command is a line of a shell block, or an indented line that starts with the name of a program. What it needs stands
in its comment (`# needs a GPU`, `# needs a hub`) or in the paragraph before its block.
"""

import ast
import contextlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from irtune import cli
from irtune.commands.compare.command import command_options as compare_options
from irtune.commands.compare.grid import build_grid, parse_corpora, parse_variants
from irtune.config import load_config
from irtune.data.synthetic import synthetic_pairs
from tests.support import ROOT
from tests.support.ranks import free_port, run_ranks

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
SHELLS = ("bash", "sh", "shell", "console")
PROGRAM = r"(?:python3?|deepspeed|torchrun|bash|sbatch|source|pytest|pip|git|export|\.venv/bin/\w+)"
STARTS_WITH_A_PROGRAM = re.compile(rf"\s*(?:\$ )?(?:\w+=\S* )*{PROGRAM} ")
NEEDS = re.compile(r"needs an? (GPUs?|hub)\b")
TRAIN = re.compile(r"(?P<launcher>deepspeed|torchrun|python) .*?train\.py(?P<options> .*|$)")
TENSORBOARD_SECONDS = 60  # until it must answer


class Command(NamedTuple):
    """A command of a page, on one line, without its comment."""

    page: str
    text: str
    needs: bool


# ----- finding them -----


def logical_lines(block: str) -> list[str]:
    """Lines with those that end in a backslash joined to the next, without empty ones and pure comments."""
    joined = re.sub(r"\\\n\s*", "", block)
    lines = [line.strip().removeprefix("$ ") for line in joined.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def blocks(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each block with commands: the paragraph before it, and its logical lines."""
    before: list[str] = []
    for part in re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL):
        fence = re.match(r"```(\w*)\n(.*)```$", part, re.DOTALL)
        if fence is not None:
            # In a console, lines without a prompt are what the command printed.
            typed = "".join(re.findall(r"^\$ .*\n", fence[2], re.MULTILINE)) if fence[1] == "console" else fence[2]
            found = logical_lines(typed)
            known = found if fence[1] in SHELLS else [line for line in found if STARTS_WITH_A_PROGRAM.match(line)]
            yield before[-1] if before else "", known if fence[1] != "python" else []
            continue
        for paragraph in re.split(r"\n[ \t]*\n", part):
            indented = "\n".join(line for line in paragraph.splitlines() if line.startswith(("    ", "\t")))
            found = [line for line in logical_lines(indented) if STARTS_WITH_A_PROGRAM.match(line)]
            if found:
                yield before[-1] if before else "", found
            if paragraph.strip():
                before.append(paragraph)


def commands_of(page: Path) -> list[Command]:
    """All commands of a page; `A && B` is two, and a row `Command: ...` of a comparison is one."""
    name, text = str(page.relative_to(ROOT)), page.read_text(encoding="utf-8")
    found = [Command(name, command, needs=False) for command in re.findall(r"^Command: `(.+)`$", text, re.MULTILINE)]
    for before, lines in blocks(text):
        for line in lines:
            command, _, comment = line.partition("  #") if "  #" in line else line.partition(" # ")
            needs = bool(NEEDS.search(comment) or NEEDS.search(before))
            found += [Command(name, part.strip(), needs) for part in command.split(" && ")]
    return found


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))


def test_every_kind_of_line_is_found():
    page = """Some text with `python -m irtune plan` in it.

```bash
# a comment
python -m irtune plan --gpus 8 \\
    --zero 3   # needs a GPU
make && bash launch/test.sh
```

This one needs a hub:

    HF_HOME=x python train.py --config FILE
    not a command, though indented

```
runs/NAME   a tree
$ deepspeed train.py
```
"""
    found = [(line, bool(NEEDS.search(before))) for before, lines in blocks(page) for line in lines]
    assert found == [
        ("python -m irtune plan --gpus 8 --zero 3   # needs a GPU", False),
        ("make && bash launch/test.sh", False),
        ("HF_HOME=x python train.py --config FILE", True),
        ("deepspeed train.py", False),
    ]


def test_the_readme_has_commands_of_every_kind():
    readme = [command for command in COMMANDS if command.page == "README.md"]
    assert len(readme) >= 15 and len(COMMANDS) >= 35
    assert sum(command.needs for command in readme) <= 3  # the mark is for what cannot be run, not a way out


# ----- those that another test runs -----

ELSEWHERE = {
    r"python -m irtune compare ": "tests/commands/test_compare.py::test_a_comparison_writes_table_numbers_and_picture",
    r"(IRTUNE_DATA=\S+ )?python -m benchmarks\.speed": "tests/benchmarks/test_speed.py::test_all_sides_ran_on_as_many_examples",  # noqa: E501
    r"(OUT=\S+ )?bash benchmarks/gpu_(pack|day)\.sh": "tests/jobs/test_gpu_day.py::test_a_rehearsal",
    r"python benchmarks/growth\.py": "tests/benchmarks/test_growth.py::test_a_point_of_each_kind_is_measured",
    r"python benchmarks/serve\.py": "tests/commands/test_serve.py::test_the_benchmark_counts_what_is_lost_or_wrong",
    r"python benchmarks/nodes\.py": "tests/jobs/test_nodes.py::test_the_cable_carries_what_the_plan_says",
    r"python benchmarks/scaling\.py": "tests/benchmarks/test_scaling.py::test_the_page_has_the_table",
    r"python -m irtune crossvalidate ": "tests/commands/test_commands.py::test_crossvalidation_holds_every_example_out_once",  # noqa: E501
    r"python -m irtune data curate ": "tests/commands/test_curate.py::test_the_new_corpus_is_read_like_the_old_one",
    r"python -m irtune data (terms|baseline .*--model\.head_init) ": "tests/models/test_head_words.py::"
    "test_a_run_starts_with_it_and_baseline_tells_what_it_predicts",
    r"python -m irtune data select ": "tests/commands/test_select.py::test_the_most_uncertain_come_first",
    r"python -m irtune search ": "tests/commands/test_search.py::test_a_search_trains",
    r"python -m irtune pseudo ": "tests/commands/test_pseudo.py::"
    "test_the_mean_of_the_runs_labels_and_data_pseudo_reads_it",
    r"python -m irtune doctor$": "tests/commands/test_doctor.py::test_it_measures_between_ranks",
    r"pip install |irtune (recipes|train)\b|deepspeed .*--module irtune|torchrun .* -m irtune train": "tests/documents/"
    "test_package.py::test_a_wheel_works_without_a_checkout",
    r"irtune schema ": "tests/commands/test_editors.py::test_the_schema_beside_the_recipes_is_up_to_date",
    r"irtune completion ": "tests/commands/test_editors.py::test_a_shell_completes_commands_options_and_values",
    r"docker build ": "tests/documents/test_package.py::test_the_image_is_pinned_and_explained",
    r"(\w+=\S+ )*bash launch/multinode_deepspeed\.sh ": "tests/jobs/test_launch.py::test_two_hosts_train",
    r"(\w+=\S+ )*bash launch/torchrun_node\.sh ": "tests/jobs/test_launch.py::"
    "test_two_nodes_meet_and_a_failing_rank_is_shown",
    r"sbatch (--\S+ \d+ )*launch/slurm\.sbatch ": "tests/jobs/test_launch.py::"
    "test_a_slurm_job_ends_saved_and_is_queued_again_at_its_limit",
    r"(IRTUNE_KILLS=\d+ )?python -m pytest tests/jobs/test_kills\.py\b": "tests/jobs/test_kills.py",
    r"(IRTUNE_SOAK_STEPS=\d+ )?python -m pytest tests/jobs/test_soak\.py\b": "tests/jobs/test_soak.py",
    r"python docs/make_configuration\.py > docs/configuration\.md": "tests/documents/test_docs.py::"
    "test_the_configuration_page_is_up_to_date",
    # Not tests, but what .ci/run starts after each change, with the real model.
    r"bash launch/quickstart\.sh": ".ci/run",
    r"bash launch/test\.sh": ".ci/run",
    r"\.venv/bin/(ruff|mypy)": ".ci/run",
}


@pytest.mark.quick
@pytest.mark.parametrize("pattern", ELSEWHERE)
def test_the_tests_that_are_named_exist(pattern):
    file, _, name = ELSEWHERE[pattern].partition("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    if file.endswith(".py"):
        names = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
        assert name in names if name else any(known.startswith("test_") for known in names)
    else:
        lines = text.replace('"$IRTUNE_VENV', ".venv").splitlines()
        assert any(re.match(rf"\s*({pattern})", line) for line in lines)


def check_options(text: str, folder: Path) -> None:
    """Read the options of a command that trains, as the command itself would: every mistake in them is an error."""
    words = shlex.split(text)
    if TRAIN.match(text):
        load_config(words[next(i for i, word in enumerate(words) if word.endswith("train.py")) + 1 :])
    elif re.search(r"launch/(multinode_deepspeed\.sh|torchrun_node\.sh|slurm\.sbatch) ", text):
        load_config(words[next(i for i, word in enumerate(words) if word.startswith("launch/")) + 1 :])
    elif " compare " in text:
        given, trainer = compare_options().parse_known_args(words[words.index("compare") + 1 :])
        corpora, adapters = parse_corpora(given.data), given.adapters.split(",") if given.adapters else [None]
        build_grid(variants=parse_variants(given.methods), adapters=adapters, corpora=corpora, seeds=given.seeds,
                   budget=given.budget, folder=folder, arguments=trainer)  # fmt: skip
    elif " crossvalidate " in text or " search " in text:
        rest = re.sub(r"--(folds|trials|ranks|output_dir) \S+", "", re.split(" crossvalidate | search ", text)[1])
        load_config(shlex.split(rest))


# ----- those that are run here -----


class Workshop:
    """A tiny model, a corpus that has the columns of every preset, and a finished run, made by the README's command."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self.model, self.corpus = folder, model, folder / "corpus"
        self.finished: dict[tuple, Path] = {}
        self.corpus.mkdir()
        rows = [
            row | {"before_sent": row["before"], "after_sent": row["after"], "labels": row["label"],
                   "source": row["before"], "target": row["after"], "doc": f"d{number % 20}"}
            for number, row in enumerate(synthetic_pairs(100))
        ]  # fmt: skip
        for split, part in (("train", rows[:64]), ("dev", rows[64:84]), ("test", rows[84:])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (self.corpus / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        self.run = self.trained(next(c.text for c in COMMANDS if c.page == "README.md" and TRAIN.match(c.text)))

    def tiny(self) -> list[str]:
        """Options that make a training short; they come last, so they win."""
        return ["--model.name_or_path", str(self.model), "--model.dtype", "float32", "--optim.max_steps", "2",
                "--optim.micro_batch_size", "4", "--run.eval_every", "0", "--data.max_length", "64"]  # fmt: skip

    def words(self, text: str) -> list[str]:
        """The words of a command, with the folders of pages replaced by those that exist here."""
        text = re.sub(r"\$IRTUNE_DATA/\w+|\bFOLDER\b", str(self.corpus), text)
        text = re.sub(r"\bnew\.(?:csv|jsonl)\b", str(self.corpus / "test.jsonl"), text)
        words = shlex.split(text)
        for place, word in enumerate(words[:-1]):
            if word in ("--output", "--to", "--output_dir", "--run.output_dir") and words[place + 1] != "-":
                words[place + 1] = str(
                    self.folder / f"{len(list(self.folder.iterdir()))}-{Path(words[place + 1]).name}"
                )
            elif word == "--run":
                words[place + 1] = str(self.run)
        return words

    def trained(self, text: str) -> Path:
        """Train as a command of a page says, with as many ranks, but short; returns the run folder."""
        match = TRAIN.search(text)
        ranks = re.search(r"--(?:num_gpus|nproc_per_node)[ =](\d+)", text)
        world = int(ranks[1]) if ranks else 1
        options = self.words(re.sub(r"--run\.output_dir \S+", "", match["options"]))
        key = (world, *options)
        if key not in self.finished:
            folder = self.folder / f"run-{len(self.finished)}"
            arguments = [*options, *self.tiny(), "--run.output_dir", str(folder)]
            assert run_ranks(cli.train, world, arguments) == [0] * world
            self.finished[key] = folder
        folder = self.finished[key]
        assert json.loads((folder / "results.json").read_text())["steps"] == 2
        return folder

    def environment(self) -> dict[str, str]:
        """What the scripts of launch/ need: this environment as one they made, and the tiny model as the pretrained."""
        venv, cache = self.folder / "venv", self.folder / "cache"
        if not venv.exists():
            venv.mkdir()
            for entry in Path(sys.prefix).iterdir():
                (venv / entry.name).symlink_to(entry)
            wanted = (ROOT / "requirements.txt").read_text()
            stamp = subprocess.run(["cksum"], input=wanted, capture_output=True, text=True, check=True)
            marker = venv / ".irtune-requirements"
            marker.unlink(missing_ok=True)
            marker.write_text(stamp.stdout)
            cache.mkdir()
            (cache / "SmolLM2-135M-Instruct").symlink_to(self.model)
        here = {name: value for name, value in os.environ.items() if name != "IRTUNE_DATA"}
        return here | {"IRTUNE_VENV": str(venv), "IRTUNE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def workshop(llama, tmp_path_factory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("commands"), llama)


def run_training(workshop: Workshop, text: str) -> None:
    workshop.trained(text)


def run_irtune(workshop: Workshop, text: str) -> None:
    """In this process. Commands that read a recipe get the tiny model; `plan` keeps its own."""
    words = workshop.words(text)[3:]
    if words[0] == "validate" or (words[0] == "data" and "--tokens" in words):
        words += workshop.tiny()
    assert cli.main(words) == 0


def run_launcher(workshop: Workshop, text: str) -> None:
    """As the shell does, on one rank, with options that keep it short."""
    folder = workshop.folder / f"local-{zlib.crc32(text.encode())}"
    words = [*workshop.words(text), *workshop.tiny(), "--run.output_dir", str(folder)]
    environment = workshop.environment()
    while "=" in words[0]:
        environment.update([words.pop(0).split("=", 1)])
    environment["RANKS"] = "1"
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (folder / "results.json").is_file() and "dev accuracy" in done.stdout


def run_tensorboard(workshop: Workshop, text: str) -> None:
    """Until it answers."""
    port = free_port()
    words = [word.replace("runs/NAME", str(workshop.run)) for word in shlex.split(text)]
    process = subprocess.Popen([*words, "--port", str(port)], cwd=ROOT, env=workshop.environment(),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        for _ in range(TENSORBOARD_SECONDS):
            with contextlib.suppress(OSError):
                page = urllib.request.urlopen(f"http://localhost:{port}/data/environment", timeout=5).read()
                assert str(workshop.run) in json.loads(page)["data_location"]
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                pytest.fail(f"ended with status {process.wait(1)}")
    finally:
        process.terminate()
        process.wait(10)


def run_synthetic(workshop: Workshop, text: str) -> None:
    folder = workshop.folder / "made"
    module, target = shlex.split(text.replace("FOLDER", str(folder)))[2:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, target])
        runpy.run_path(str(ROOT / f"{module.replace('.', '/')}.py"), run_name="__main__")
    assert all((folder / f"{split}.jsonl").is_file() for split in ("train", "dev", "test"))


def run_shell(workshop: Workshop, text: str) -> None:
    """`source .venv/bin/activate`, after which the programs of the other commands must be found."""
    line = text.replace(".venv", str(workshop.folder / "venv"))
    command = f"{line} && command -v python deepspeed torchrun"
    environment = workshop.environment()
    assert (
        subprocess.run(["bash", "-c", command], env=environment, stdout=subprocess.DEVNULL, check=False).returncode == 0
    )


RUN: dict[str, Callable[[Workshop, str], None]] = {
    TRAIN.pattern: run_training,
    r"python -m irtune (data stats|data baseline|validate|plan|inspect|evaluate|predict|export|report) ": run_irtune,
    r"python -m irtune\.data\.synthetic ": run_synthetic,
    r"(RANKS=\d+ )?bash launch/local\.sh ": run_launcher,
    r"bash launch/tensorboard\.sh ": run_tensorboard,
    r"source \.venv/bin/activate$": run_shell,
}


def marks(command: Command) -> list[pytest.MarkDecorator]:
    """Whatever starts a launcher or TensorBoard by itself takes its time."""
    return [pytest.mark.slow] if re.search(r"bash launch/(local|tensorboard)\.sh ", command.text) else []


@pytest.mark.parametrize(
    "command",
    [pytest.param(command, marks=marks(command)) for command in COMMANDS],
    ids=lambda command: f"{command.page}: {command.text[:60]}",
)
def test_every_command_runs(command, request, tmp_path):
    text = command.text
    runner = next((run for pattern, run in RUN.items() if re.match(pattern, text)), None)
    if command.needs or any(re.match(pattern, text) for pattern in ELSEWHERE):
        check_options(text, tmp_path)
        return
    assert runner is not None, (
        f"{command.page}: nothing runs {text!r}; mark what it needs, or add it to RUN or ELSEWHERE"
    )
    runner(request.getfixturevalue("workshop"), text)
