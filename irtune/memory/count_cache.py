"""Counts of a model, kept between runs: counting takes a second or two of every start.

IRTUNE_CACHE/plans/KEY.json   a `Parts`, and a checksum of it
KEY: digest of all that is counted: the model's configuration, the options about it, labels, versions, irtune's own code
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import irtune
from irtune.config import Config
from irtune.config.batch_size import longest_micro_batch
from irtune.config.declarations import adapter_kinds, methods
from irtune.distributed import environment
from irtune.distributed.versions import versions
from irtune.files import remove_oldest
from irtune.memory.count import Parts, count
from irtune.models.skeleton import model_settings

ENTRIES = 200  # that are kept, of some kilobytes each; the one longest unused goes first
log = logging.getLogger("irtune")


def kept_count(config: Config, *, device: str, labels: Sequence[str], slope: bool) -> Parts:
    """`parts.count`, or what it returned for the same before.

    Raises:
        ConfigError, ModelError: as `parts.count`.
    """
    kind, method = adapter_kinds()[config.adapter.type], methods()[config.tuning.method]
    foreign = not all(found.module.startswith("irtune.") for found in (kind, method))
    if config.model.trust_remote_code or kind.reads_labels or foreign:
        return count(config, device=device, labels=labels, slope=slope)  # other code, a tokenizer: not in the key
    file = environment.cache_folder() / "plans" / f"{_key(config, device, labels, slope)}.json"
    parts = _read(file)
    if parts is None:
        parts = count(config, device=device, labels=labels, slope=slope)
        try:
            _write(file, parts)
            remove_oldest(file.parent, ENTRIES)
        except OSError as error:
            log.info("counts of the memory plan are not kept for later runs: %s: %s", file.parent, error.strerror)
    with contextlib.suppress(OSError):
        os.utime(file)  # used now
    return parts


def _key(config: Config, device: str, labels: Sequence[str], slope: bool) -> str:
    model = {name: value for name, value in vars(config.model).items() if name != "name_or_path"}
    sections = [model, vars(config.adapter), vars(config.tuning)]
    sizes = [longest_micro_batch(config), config.data.max_length, device, list(labels), slope]
    shape = model_settings(config.model).to_dict()
    for place in ("_name_or_path", "name_or_path"):
        shape.pop(place, None)
    everything = [sections, sizes, shape, versions(), _code()]
    return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()[:32]


@cache
def _code() -> str:
    """SHA-256 of irtune's sources."""
    root = Path(irtune.__file__).parent
    found = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        found.update(f"\0{file.relative_to(root)}\0".encode() + file.read_bytes())
    return found.hexdigest()


def _read(file: Path) -> Parts | None:
    """None where there is no such file, or it is damaged, which is said."""
    if not file.is_file():
        return None
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["sha256"] != _checksum(kept["parts"]):
            raise ValueError("another checksum than when it was written")
        return Parts(**kept["parts"] | {"assumed": tuple(kept["parts"]["assumed"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged and made anew: %s", file, error)
        return None


def _write(file: Path, parts: Parts) -> None:
    """It appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    values = dataclasses.asdict(parts)
    scratch = file.with_name(f".{file.stem}-{os.getpid()}-{os.urandom(4).hex()}")
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(scratch.unlink, missing_ok=True)
        scratch.write_text(json.dumps({"sha256": _checksum(values), "parts": values}), encoding="utf-8")
        scratch.replace(file)


def _checksum(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
