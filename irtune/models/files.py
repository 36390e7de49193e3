"""The files of a pretrained model: where they are, and whether they are whole and safe to read."""

import json
from pathlib import Path

from huggingface_hub import snapshot_download

from irtune.config.schema import ModelConfig
from irtune.errors import ModelError

INDEX, PICKLE_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"


def find_source(config: ModelConfig) -> str:
    """Where the model is: a folder, the folder of a hub model in the local cache, or a hub id."""
    source = str(Path(config.name_or_path).expanduser())
    if Path(source).is_dir():
        return source
    if config.name_or_path.startswith(("~", "/", ".")):
        raise ModelError(
            f"model.name_or_path: there is no folder {config.name_or_path!r}; accepted: a folder with config.json, "
            "or a hub id (launch/quickstart.sh makes the folder of the small model)"
        )
    return cached_folder(source, config.allow_pickle) or source


def check_files(folder: Path, allow_pickle: bool) -> None:
    """Look at the names of a model's files before any of them is read.

    Raises:
        ModelError: when shards are missing, or there are pickles only and they are not allowed.
    """
    if any(folder.glob("model*.safetensors")) or (folder / INDEX).is_file():
        index = folder / INDEX
    elif any(folder.glob("pytorch_model*.bin")):
        if not allow_pickle:
            raise without_safetensors(str(folder))
        index = folder / PICKLE_INDEX
    else:
        return
    if not index.is_file() or (folder / "model.safetensors").is_file():
        return
    try:
        shards = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} does not say which file holds which weight: {error!r}") from error
    outside = sorted(name[:200] for name in shards if Path(name).name != name)
    if outside:
        raise ModelError(f"{index} names {outside[0]!r}, which is outside of the folder; accepted: files beside it")
    missing = sorted(name for name in shards if not (folder / name).is_file())
    if missing:
        raise ModelError(
            f"{folder} lacks {missing[0]} ({len(missing)} of the {len(shards)} files that {index.name} names are "
            "missing); copy or download the model again"
        )


def without_safetensors(source: str) -> ModelError:
    """The error for a model that has pickles only."""
    return ModelError(
        f"{source} has no weights in safetensors files, and pickles (pytorch_model.bin) can run code when they are "
        "read; convert them, or, for a model that you trust, set model.allow_pickle to true"
    )


def cached_folder(name: str, allow_pickle: bool) -> str | None:
    """Folder of a hub model that is wholly in the local cache, so that no network is asked; None where it is not."""
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):  # not cached; or no hub id, which loading will say
        return None
    weights = any(folder.glob("*.safetensors")) or (allow_pickle and any(folder.glob("pytorch_model*.bin")))
    parts = ("config.json", "tokenizer*")
    return str(folder) if weights and all(any(folder.glob(part)) for part in parts) else None
