"""Token ids of a corpus, kept between runs: encoded once per node, not once per rank and start.

IRTUNE_CACHE/tokens/KEY/SPLIT.safetensors   ids, and where each example's begin; a checksum in the header
KEY: digest of the examples, of everything the encoder does with them, and of the tokenizer
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from irtune.data.corpus import Corpus, Example
from irtune.data.prompts import Encoder
from irtune.files import remove_oldest

Encoded = dict[str, list[dict[str, list[int]]]]  # by split: what `Encoder.encode` makes of each example
FORMAT = 1
ENTRIES = 20  # corpora, models and lengths that are kept; the one longest unused goes first
IDS, STARTS, TYPES = "input_ids", "starts", "token_type_ids"
log = logging.getLogger("irtune")


def encoder_digest(encoder: Encoder) -> str:
    """SHA-256 of the tokenizer and of what the encoder does around it."""
    tokenizer = encoder.tokenizer
    found = hashlib.sha256(type(tokenizer).__name__.encode())
    around = [encoder.head, encoder.middle, encoder.tail, encoder.budget, encoder.token_types, encoder.has_pair]
    around += [encoder.tail_types] if encoder.tail_types is not None else []
    found.update(json.dumps(around).encode())
    if tokenizer.is_fast:
        found.update(tokenizer.backend_tokenizer.to_str().encode())
        return found.hexdigest()
    found.update(json.dumps([sorted(tokenizer.get_vocab().items()), repr(tokenizer.init_kwargs)]).encode())
    for name in tokenizer.vocab_files_names:
        file = getattr(tokenizer, name, None)
        if isinstance(file, str) and Path(file).is_file():
            found.update(Path(file).read_bytes())
    return found.hexdigest()


class TokenCache:
    """The entry of one corpus under one encoder."""

    def __init__(self, folder: Path, encoder: Encoder, digest: str):
        """`folder`: of all entries; `digest`: the corpus's."""
        self.encoder = encoder
        self.key = hashlib.sha256(
            json.dumps([FORMAT, transformers.__version__, digest, encoder_digest(encoder)]).encode()
        ).hexdigest()[:32]
        self.folder = folder / self.key

    def is_usable(self) -> bool:
        """Whether files may appear in the folder, so that it is worth waiting for another rank's."""
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        return os.access(there, os.W_OK | os.X_OK)

    def load_or_encode(self, corpus: Corpus) -> Encoded:
        """Token ids of every split: read where they are kept, else encoded, and kept if the folder takes them.

        Two ranks or nodes may do this at the same time: a file appears whole or not at all, and each writes the same.

        Raises:
            DataError: for an example without a single token.
        """
        encoded = {split: self._read(split, len(examples)) for split, examples in corpus.splits.items()}
        fresh = {split: self._encode(examples) for split, examples in corpus.splits.items() if encoded[split] is None}
        whole: Encoded = {split: fresh.get(split) or encoded[split] or [] for split in encoded}
        try:
            for split, items in fresh.items():
                self._write(split, items)
            if fresh:
                remove_oldest(self.folder.parent, ENTRIES)
        except OSError as error:
            log.info("token ids are not kept for later runs: %s: %s", self.folder.parent, error.strerror)
        with contextlib.suppress(OSError):
            os.utime(self.folder)  # used now
        return whole

    def _encode(self, examples: Sequence[Example]) -> list[dict[str, list[int]]]:
        return [self.encoder.encode(example) for example in examples]

    def _read(self, split: str, count: int) -> list[dict[str, list[int]]] | None:
        """The `count` examples of a split; None where they are not kept, or damaged, which is said."""
        file = self.folder / f"{split}.safetensors"
        if not file.is_file():
            return None
        try:
            with safe_open(file, "np") as kept:
                arrays = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118 - no iterator
                wanted = (kept.metadata() or {}).get("sha256")
            if wanted != _checksum(arrays):
                raise ValueError("another checksum than when it was written")
            return _unpack(arrays, count)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            log.warning("%s is damaged and made anew: %s", file, error)
            return None

    def _write(self, split: str, items: list[dict[str, list[int]]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / f".{split}-{os.getpid()}-{os.urandom(4).hex()}"
        arrays = _pack(items)
        try:
            with contextlib.ExitStack() as cleanup:
                cleanup.callback(scratch.unlink, missing_ok=True)
                save_file(arrays, scratch, metadata={"sha256": _checksum(arrays)})
                scratch.replace(self.folder / f"{split}.safetensors")
        except SafetensorError as error:  # its word for a full disk
            raise OSError(None, str(error)) from error


def _pack(items: list[dict[str, list[int]]]) -> dict[str, Any]:
    """All examples end to end: ids int32 [tokens], starts int64 [examples + 1], types uint8 [tokens] if there are."""
    lengths = [len(item[IDS]) for item in items]
    arrays: dict[str, np.ndarray] = {
        IDS: np.fromiter((token for item in items for token in item[IDS]), np.int32, sum(lengths)),
        STARTS: np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    }
    if items and TYPES in items[0]:
        arrays[TYPES] = np.fromiter((kind for item in items for kind in item[TYPES]), np.uint8, sum(lengths))
    return arrays


def _unpack(arrays: dict[str, np.ndarray], count: int) -> list[dict[str, list[int]]]:
    starts = arrays[STARTS].tolist()
    if len(starts) != count + 1:
        raise ValueError(f"{len(starts) - 1} examples instead of {count}")
    ids = arrays[IDS].tolist()
    kinds = arrays[TYPES].tolist() if TYPES in arrays else None
    items = []
    for start, end in itertools.pairwise(starts):
        item = {IDS: ids[start:end]}
        if kinds is not None:
            item[TYPES] = kinds[start:end]
        items.append(item)
    return items


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].dtype} {arrays[name].shape} ".encode())
        found.update(np.ascontiguousarray(arrays[name]).tobytes())
    return found.hexdigest()
