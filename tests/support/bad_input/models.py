"""Model folders that are damaged, do not fit, or bring code."""

# ruff: noqa: E501 - tables

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.support.bad_input.case import Box, Case


def model(change: Callable[[Path], object], *options: str):
    """Train on a copy of the tiny model that `change` has spoilt."""

    def build(box: Box) -> list[str]:
        folder = box.folder / "model"
        shutil.copytree(box.llama, folder)
        change(folder)
        return box.train("--model.name_or_path", str(folder), *options)

    return build


def settings(**values: object):
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def shards(index: Callable[[list[str]], dict[str, str]]):
    """Weights in two shards, and an index that says where each weight is."""

    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(weights)
        half = len(names) // 2
        for number, part in enumerate((names[:half], names[half:]), 1):
            file = folder / f"model-0000{number}-of-00002.safetensors"
            save_file({name: weights[name] for name in part}, file, {"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index(names)}))

    return change


def two(names: list[str]) -> dict[str, str]:
    half = len(names) // 2
    return {name: f"model-0000{1 + (number >= half)}-of-00002.safetensors" for number, name in enumerate(names)}


def missing_shard(folder: Path) -> None:
    shards(two)(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def outside_shard(folder: Path) -> None:
    shards(two)(folder)
    shutil.move(folder / "model-00002-of-00002.safetensors", folder.parent / "other.safetensors")
    file = folder / "model.safetensors.index.json"
    file.write_text(file.read_text().replace("model-00002-of-00002.safetensors", "../other.safetensors"))


def spoilt_index(folder: Path) -> None:
    shards(two)(folder)
    (folder / "model.safetensors.index.json").write_text("[]")


def pickled(folder: Path) -> None:
    import os
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {folder.parent / 'executed'}",)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def flipped_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[20] ^= 0xFF
    file.write_bytes(bytes(content))


def lost_layer(folder: Path) -> None:
    weights = {
        name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if ".layers.3." not in name
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def without(name: str):
    return lambda folder: [file.unlink() for file in folder.glob(name)]


def spoilt(name: str, content: str):
    return lambda folder: (folder / name).write_text(content)


def own_code(where: str):
    """A model whose classes are in a file beside it. The file makes `executed` beside the model's folder."""

    def change(folder: Path) -> None:
        (folder / "evil.py").write_text(f"open({str(folder.parent / 'executed')!r}, 'w').close()\n")
        file = folder / where
        auto = {
            "AutoConfig": "evil.C",
            "AutoModelForSequenceClassification": "evil.M",
            "AutoTokenizer": ["evil.T", "evil.T"],
        }
        kind = {"model_type": "evil"} if where == "config.json" else {"tokenizer_class": "EvilTokenizer"}
        file.write_text(json.dumps(json.loads(file.read_text()) | kind | {"auto_map": auto}))

    return change


CASES = [
    Case("no such model folder", lambda box: box.train("--model.name_or_path", "./no/model"), "model.name_or_path: there is no folder ..."),
    Case("a file as model", lambda box: box.train("--model.name_or_path", str(box.write("model", ""))), "model.name_or_path: there is no folder ..."),
    Case("a model folder without config.json", model(without("config.json")), "model.name_or_path: no ... can be loaded from ..."),
    Case("a config.json that is cut", model(spoilt("config.json", '{"model_type": ')), "model.name_or_path: no ... can be loaded from ..."),
    Case("a model type that nobody knows", model(settings(model_type="evil")), "model.name_or_path: no ... can be loaded from ..."),
    Case("a model without a tokenizer", model(without("tokenizer*")), "model.name_or_path: no tokenizer can be loaded from ..."),
    Case("a tokenizer.json that is cut", model(spoilt("tokenizer.json", '{"version": ')), "model.name_or_path: no tokenizer can be loaded from ..."),
    Case("a model without weights", model(without("model.safetensors")), "model.name_or_path: no model can be loaded from ..."),
    Case("weights that are cut", model(cut_weights), "model.name_or_path: no model can be loaded from ..."),
    Case("weights with a damaged header", model(flipped_header), "model.name_or_path: no model can be loaded from ..."),
    Case("a missing shard", model(missing_shard), "lacks ... (... of the ... files that ... names are missing)"),
    Case("an index whose shards are outside of the folder", model(outside_shard), "names ..., which is outside of the folder"),
    Case("an index that is a list", model(spoilt_index), "does not say which file holds which weight: ..."),
    Case("pickled weights", model(pickled), "has no weights in safetensors files, and pickles (...) can run code when they are read"),
    Case("a layer that is in no file", model(lost_layer), "... is not in the files (... such weights in the layers)"),
    Case("weights of another shape", model(settings(intermediate_size=48)), "has another shape in the files than in config.json"),
    Case("a tokenizer of another model", model(settings(vocab_size=3)), "tokenizer and model do not belong together"),
    Case("an encoder-decoder model", model(settings(is_encoder_decoder=True)), "is an encoder-decoder model, which has two lists of layers"),
    Case("inputs longer than the model has positions", model(settings(max_position_embeddings=64)), "has positions for ... tokens; accepted: at most ..."),
    Case("a model that brings code", model(own_code("config.json")), "model.name_or_path: no ... can be loaded from ..."),
    Case("a tokenizer that brings code", model(own_code("tokenizer_config.json")), "model.name_or_path: no tokenizer can be loaded from ..."),
    Case("target modules that the model has not", model(lambda folder: None, "--adapter.target_modules=[nothing]"),
         "matches no linear module of a layer; they are: ..."),
]  # fmt: skip
