"""Which files of a folder are which split: plain files, the shards of a hub corpus, and what `save_to_disk` writes.

train.jsonl, dev.jsonl                          plain
data/train-00000-of-00002.parquet, ...          shards, as the hub has them; train/0000.parquet as well
CONFIG/train-00000-of-00001.parquet, ...        several configurations (data.config), also as README.md lists them
dataset_dict.json, train/state.json, ...        datasets.DatasetDict.save_to_disk; state.json: Dataset.save_to_disk
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from irtune.config.yaml_file import parse_yaml
from irtune.data.readers.cells import listed
from irtune.data.readers.tables import SUFFIXES
from irtune.errors import DataError, brief
from irtune.files import read_object

SPLITS = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}
MAX_NOTE = 2**20  # bytes of a README.md or a .json file about the files of a corpus
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?:-[0-9a-f]+)?")

Files = dict[str, list[Path]]


def find_files(folder: Path, config: str | None = None) -> Files:
    """The files of each split of the corpus in `folder`, in order; of its configuration `config`, where it has several.

    Raises:
        DataError: for two sources of one split, shards that are missing, links that lead out of the folder, and a
            configuration that is not there or not named.
    """
    if config is None:
        plain = _plain(folder)
        if plain:
            return _inside(folder, plain)
    declared = _declared(folder)
    if config is None and len(declared) > 1 and "default" not in declared:
        raise DataError(f"{folder} has several configurations; set data.config to one of {listed(declared)}")
    if declared and (config is None or config in declared):
        name = config or ("default" if "default" in declared else next(iter(declared)))
        return _inside(folder, _matching(folder, declared[name], name))
    if config is not None:
        return _inside(folder, _configuration(folder, config, declared))
    found = _saved(folder) or _sharded(folder) or _sharded(folder / "data")
    if found:
        return _inside(folder, found)
    several = _configurations(folder)
    if len(several) > 1:
        raise DataError(f"{folder} has several configurations; set data.config to one of {listed(several)}")
    return _inside(folder, several[next(iter(several))]) if several else {}


def _plain(folder: Path) -> Files:
    """train.jsonl and the like."""
    files: Files = {}
    for split, stems in SPLITS.items():
        named = [folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
        matches = [path for path in named if path.is_file()]
        if len(matches) > 1:
            raise DataError(f"{folder}: more than one {split} file: {', '.join(match.name for match in matches)}")
        wrong = [path for path in named if path.exists() and not path.is_file()]
        if wrong and not matches:
            raise DataError(f"{wrong[0]} is a folder, where a file is expected")
        if matches:
            files[split] = matches
    return files


def _sharded(folder: Path) -> Files:
    """train-00000-of-00002.parquet and the like, files in a folder named like a split, or plain files."""
    if not folder.is_dir():
        return {}
    files: Files = {}
    entries = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    for split, stems in SPLITS.items():
        sources: dict[str, list[Path]] = defaultdict(list)
        for path in entries:
            shard = _SHARD.fullmatch(path.stem)
            if shard is not None and shard["stem"] in stems:
                sources[f"{shard['stem']}-*-of-{shard['count']}{path.suffix}"].append(path)
            elif path.stem in stems:
                sources[path.name].append(path)
        for stem in stems:
            inner = folder / stem
            data = sorted(path for path in inner.iterdir() if _is_data(path)) if inner.is_dir() else []
            if data:
                sources[f"{stem}/"] = data
        if len(sources) > 1:
            raise DataError(f"{folder}: more than one {split} file: {listed(sources)}")
        for paths in sources.values():
            _check_complete(paths)
            files[split] = paths
    return files


def _is_data(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.stem not in ("state", "dataset_info") and path.is_file()


def _check_complete(paths: list[Path]) -> None:
    """Raise a DataError when one of N shards is not there: a corpus that was copied in part looks like a whole one."""
    sets: dict[tuple[Path, str, str], dict[Path, int]] = defaultdict(dict)  # a corpus may lie in several folders
    for path in paths:
        shard = _SHARD.fullmatch(path.stem)
        if shard is not None:
            sets[path.parent, shard["stem"], shard["count"]][path] = int(shard["number"])
    for (folder, stem, count), numbers in sets.items():
        there = set(numbers.values())
        if len(there) < len(numbers):
            raise DataError(f"{folder}: two files are one shard: {listed(path.name for path in numbers)}")
        missing = next((number for number in range(int(count)) if number not in there), None)
        if missing is not None:
            raise DataError(
                f"{folder}: {len(there)} of {int(count)} shards {stem}-*-of-{count} are there; number {missing} is "
                "missing"
            )


def _saved(folder: Path) -> Files:
    """What `save_to_disk` of `datasets` writes."""
    if (folder / "dataset_dict.json").is_file():
        names = read_object(folder / "dataset_dict.json", MAX_NOTE, DataError).get("splits")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{folder / 'dataset_dict.json'} is damaged: it lists no splits")
        files: Files = {}
        for split, stems in SPLITS.items():
            there = [name for name in names if name in stems]
            if len(there) > 1:
                raise DataError(f"{folder}: more than one {split} split: {listed(there)}")
            if there:
                files[split] = _saved_parts(folder / there[0])
        return files
    return {"train": _saved_parts(folder)} if (folder / "state.json").is_file() else {}


def _saved_parts(folder: Path) -> list[Path]:
    """The .arrow files of one saved split, in order."""
    parts = read_object(folder / "state.json", MAX_NOTE, DataError).get("_data_files")
    parts = parts if isinstance(parts, list) else []
    names = [str(part["filename"]) for part in parts if isinstance(part, dict) and "filename" in part]
    if not names:
        raise DataError(f"{folder / 'state.json'} is damaged: it lists no data files")
    return [folder / name for name in names]


# ----- configurations -----


def _configurations(folder: Path) -> dict[str, Files]:
    """Subfolders that hold a corpus, by name."""
    found: dict[str, Files] = {}
    for place in (folder, folder / "data"):
        for inner in sorted(path for path in place.iterdir() if path.is_dir()) if place.is_dir() else ():
            files = _saved(inner) or _sharded(inner)
            if files and not inner.name.startswith("."):
                found.setdefault(inner.name, files)
    return found


def _configuration(folder: Path, config: str, declared: dict[str, Any]) -> Files:
    found = _configurations(folder)
    if config not in found:
        known = listed({**declared, **found})
        there = f"accepted: {known}" if known else "it has none; leave data.config out"
        raise DataError(f"{folder} has no configuration {brief(config)} (data.config); {there}")
    return found[config]


def _declared(folder: Path) -> dict[str, Any]:
    """The data files of each configuration, as the head of a hub corpus' README.md lists them."""
    file = folder / "README.md"
    if not file.is_file() or file.stat().st_size > MAX_NOTE:
        return {}
    head = re.match(r"---\r?\n(.*?\n)---\r?(\n|\Z)", file.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        card = parse_yaml(head[1]) if head is not None else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}  # a README is written for people: what it says about files is a hint
    configs = card.get("configs") if isinstance(card, dict) else None
    return {
        str(one["config_name"]): one["data_files"]
        for one in (configs if isinstance(configs, list) else [])
        if isinstance(one, dict) and "config_name" in one and "data_files" in one
    }


def _matching(folder: Path, data_files: Any, config: str) -> Files:
    """Files that the patterns of a README.md name: a pattern, a list of them, or {split, path} for each split."""
    place = f"{folder / 'README.md'}, configuration {config!r}"
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    if isinstance(data_files, str) or (
        isinstance(data_files, list) and all(isinstance(item, str) for item in data_files)
    ):
        data_files = [{"split": "train", "path": data_files}]
    files: Files = {}
    for entry in data_files if isinstance(data_files, list) else ():
        name, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        patterns = [paths] if isinstance(paths, str) else paths
        split = next((split for split, stems in SPLITS.items() if name in stems), None)
        if split is None:  # a split that irtune does not use
            continue
        found: list[Path] = []
        for pattern in patterns if isinstance(patterns, list) else ():
            try:
                matches = sorted(path for path in folder.glob(str(pattern)) if _is_data(path))
            except (NotImplementedError, ValueError, OSError):  # an absolute path, an address, an empty pattern
                matches = []
            if not matches:
                raise DataError(
                    f"{place}: no file in the folder matches {brief(pattern)}; accepted: {listed(SUFFIXES)}"
                )
            found += matches
        if split in files:
            raise DataError(f"{place}: more than one {split} split")
        _check_complete(found)
        files[split] = found
    if not files:
        raise DataError(
            f"{place}: no splits that irtune knows; accepted: {listed(n for s in SPLITS.values() for n in s)}"
        )
    return files


def _inside(folder: Path, files: Files) -> Files:
    """`files`, none of them a link or path out of the folder: whoever made it would choose what is read.

    Links in the hub client's cache (datasets--NAME/snapshots/REVISION) lead to its blobs.
    """
    home = folder.resolve()
    cache = next((up.parent for up in (home, *home.parents) if up.name == "snapshots"), None)
    cached = cache is not None and cache.name.startswith("datasets--")
    roots = (home, cache / "blobs") if cache is not None and cached else (home,)
    for split, paths in files.items():
        for path in paths:
            if not any(path.resolve().is_relative_to(root) for root in roots):
                raise DataError(
                    f"{path} is a link that leads out of its folder, to {path.resolve()}; if that file is meant, "
                    f"name it with data.{split}"
                )
    return files
