"""Folders of finished runs, as somebody else may have sent them."""

# ruff: noqa: E501 - tables

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.support.bad_input.case import Box, Case

ADAPTER, WEIGHTS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"


def run(change: Callable[[Path], object], command: str = "predict", kind: str = "lora"):
    """Predict with a finished run that `change` has spoilt."""

    def build(box: Box) -> list[str]:
        folder = box.folder / "finished"
        shutil.copytree(getattr(box, kind), folder)
        change(folder)
        more = []
        if command == "predict":
            more = [
                "--input",
                str(box.lines("new.jsonl", [{"before": "a", "after": "b"}])),
                "--output",
                str(box.folder / "out.jsonl"),
            ]
        elif command == "export":
            more = ["--to", str(box.folder / "exported")]
        return [command, "--run", str(folder), *more]

    return build


def rows(row: dict, output: str, *options: str, change: Callable[[Path], object] = lambda folder: None):
    """Predict one row with a good run, or with what `change` makes of it."""

    def build(box: Box) -> list[str]:
        folder = box.folder / "finished"
        shutil.copytree(box.lora, folder)
        change(folder)
        source = str(box.lines("new.jsonl", [row]))
        target = output if output == "-" else str(box.folder / output)
        return ["predict", "--run", str(folder), "--input", source, "--output", target, *options]

    return build


def no_input(box: Box) -> list[str]:
    (box.folder / "finished").mkdir()
    target = box.write("out.csv", "mine")
    return ["predict", "--run", str(box.lora), "--input", str(box.folder / "no.csv"), "--output", str(target)]


def single(folder: Path) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["after"] = None
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def kept_half(output: str, box: Box) -> None:
    assert "\\ud800" in output and json.loads(output)["note"] == "\ud800"


def edited(name: str, **values: object):
    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def text(name: str, content: str | bytes):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def gone(name: str):
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def flipped(folder: Path) -> None:
    """One bit of one weight: only a checksum can tell."""
    content = bytearray((folder / WEIGHTS).read_bytes())
    digest = hashlib.sha256(content).hexdigest()
    edited("results.json", adapter_sha256={"adapter_model.safetensors": digest})(folder)
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(content))


def shapes(folder: Path) -> None:
    weights = {name: torch.zeros(*tensor.shape, 2) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS)


def link(name: str):
    def change(folder: Path) -> None:
        outside = folder.parent / "secret"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)

    return change


def pickle_only(folder: Path) -> None:
    import os
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {folder.parent / 'executed'}",)

    (folder / WEIGHTS).unlink()
    (folder / "adapter/adapter_model.bin").write_bytes(pickle.dumps(Evil()))


def megatron(folder: Path) -> None:
    """peft imports the module that megatron_core names."""
    (folder.parent / "evil_module.py").write_text(f"open({str(folder.parent / 'executed')!r}, 'w').close()\n")
    edited(ADAPTER, megatron_config={"a": 1}, megatron_core="evil_module")(folder)


def trusts(folder: Path) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["trust_remote_code"] = True
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def selection(*lines: object):
    return text(
        "selection.jsonl", "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    )


GOOD = {"step": 0, "num_layers": 6, "scores": None, "selected": [1], "changed": True, "seconds": 0.1}
CASES = [
    Case("an input that does not exist, and an output that does", no_input, "there is no file ..."),
    Case("a line break for a .tsv file", rows({"before": "a", "after": "b", "note": "c\nd"}, "out.tsv"),
         "new.jsonl, row 1, column 'note': a line break, which a .tsv file cannot hold; accepted: .jsonl or .csv"),
    Case("half a character for a table", rows({"before": "a", "after": "b", "note": "\ud800"}, "out.csv"),
         "new.jsonl, row 1, column 'note': half of a surrogate pair, which a .csv file cannot hold; accepted: .jsonl"),
    Case("half a character in another column", rows({"before": "a", "after": "b", "note": "\ud800"}, "-"),
         "it is written as it was", check=kept_half),
    Case("a text after for a run on single texts", rows({"before": "a", "new": "b"}, "-", "--after", "new", change=single),
         "--after 'new': the run was trained on single texts (data.after is null); leave it out"),
    Case("a folder that is no run", run(lambda folder: shutil.rmtree(folder) or folder.mkdir()), "is not a run folder: it has no config.yaml"),
    Case("a run that is not finished", run(gone("results.json")), "is not finished, it has no checkpoint; continue with: ..."),
    Case("a results.json that is cut", run(text("results.json", '{"dev": ')), "results.json cannot be read: ..."),
    Case("a results.json of 100,000 brackets", run(text("results.json", "[" * 100_000)), "results.json cannot be read: ..."),
    Case("a results.json that is a list", run(text("results.json", "[]")), "is damaged: it holds a list, not an object"),
    Case("a results.json without labels", run(text("results.json", '{"dev": 3}')), "is damaged: it has no labels of the dev split"),
    Case("a config.yaml with a Python tag", run(text("config.yaml", "run: !!python/object/apply:os.getcwd []")), "is not valid YAML: ..."),
    Case("a run folder that asks to trust code", run(trusts), "sets model.trust_remote_code, which lets code that comes with a model run here"),
    Case("a run without adapter_config.json", run(gone(ADAPTER)), "holds no adapter: there is no ..."),
    Case("a run without its adapter's weights", run(gone(WEIGHTS)), "holds no adapter: there is no ..."),
    Case("an adapter_config.json that is cut", run(text(ADAPTER, '{"r": ')), "adapter_config.json cannot be read: ..."),
    Case("an adapter_config.json of 100,000 brackets", run(text(ADAPTER, "[" * 100_000)), "adapter_config.json cannot be read: ..."),
    Case("an adapter that imports a module", run(megatron), "adapter_config.json sets megatron_..., which irtune never does"),
    Case("an adapter that loads further adapters", run(edited(ADAPTER, peft_type="XLORA", adapters={"0": "../../x"})),
         "adapter_config.json sets peft_type to 'XLORA', which irtune never does"),
    Case("an adapter of rank 10^9", run(edited(ADAPTER, r=10**9)), "sets r to 1000000000, which irtune never does", most_mib=50),
    Case("an adapter's pattern that never ends", run(edited(ADAPTER, target_modules=r"(\w+\.?)+!")), "sets target_modules to ..., which irtune never does"),
    Case("an adapter that is pickled", run(pickle_only), "holds no adapter: there is no adapter/adapter_model.safetensors"),
    Case("an adapter that is cut", run(cut), "does not fit ...: ..."),
    Case("a flipped bit in an adapter's weights", run(flipped), "has a different checksum than when it was written"),
    Case("an adapter of other shapes", run(shapes), "does not fit ...: ..."),
    Case("weights that are a link out of the run", run(link(WEIGHTS)), "is a link that leads out of the run's folder, to ..."),
    Case("such a link to be exported", run(link(WEIGHTS), "export"), "is a link that leads out of the run's folder, to ..."),
    Case("an adapter of irtune's own that is cut", run(cut, kind="bottleneck"), "holds no readable adapter: ..."),
    Case("an adapter of a type that does not exist", run(edited(ADAPTER, adapter={"type": "..evil"}), kind="bottleneck"), "does not fit ...: ..."),
    Case("an adapter with settings nobody knows", run(edited(ADAPTER, adapter={"evil": 1}), kind="bottleneck"), "does not fit ...: ..."),
    Case("a selection.jsonl with a damaged line", run(selection(GOOD, "{", GOOD), "inspect"), "line 2 is damaged: it is not a record of irtune"),
    Case("a selection.jsonl of 10^12 layers", run(selection(GOOD | {"num_layers": 10**12}), "inspect"), "num_layers is ...; accepted: 1 to ...", most_mib=50),
    Case("a selection of layers that do not exist", run(selection(GOOD | {"selected": [99]}), "inspect"), "is damaged: it is not a selection among 6 layers"),
]  # fmt: skip
