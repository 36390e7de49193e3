"""Token ids are made once per node, and kept between runs: equal, whole, and not for ever."""

import dataclasses
import json
import logging
import shutil
import time

import pytest

from irtune.config import DataConfig, ModelConfig
from irtune.data import Corpus, Encoder, TokenCache, corpus_digest, encoder_digest, read_corpus
from irtune.data.token_cache import ENTRIES
from irtune.errors import DataError
from irtune.models.classifier import load_tokenizer
from tests.support.ranks import run_cases
from tests.support.runs import train
from tests.support.tiny import tiny_config


def make(model, corpus, folder, **options) -> tuple[TokenCache, Corpus]:
    data = DataConfig(path=str(corpus), **{"max_length": 64} | options)
    read = read_corpus(data)
    encoder = Encoder(load_tokenizer(ModelConfig(name_or_path=str(model))), data, read.labels)
    return TokenCache(folder, encoder, corpus_digest(read)), read


def plainly(cache: TokenCache, corpus: Corpus) -> dict:
    return {split: [cache.encoder.encode(one) for one in examples] for split, examples in corpus.splits.items()}


def forbid(monkeypatch) -> None:
    def encode(self, example):
        raise AssertionError("encoded, though it is kept")

    monkeypatch.setattr(Encoder, "encode", encode)


@pytest.mark.quick
@pytest.mark.parametrize("types", [False, True])
def test_what_is_kept_is_what_was_encoded(llama, corpus, tmp_path, monkeypatch, types):
    cache, read = make(llama, corpus, tmp_path / "tokens")
    cache.encoder.token_types = types
    wanted = plainly(cache, read)
    assert cache.load_or_encode(read) == wanted
    assert sorted(file.name for file in cache.folder.iterdir()) == [
        f"{s}.safetensors" for s in ("dev", "test", "train")
    ]
    again, _ = make(llama, corpus, tmp_path / "tokens")
    forbid(monkeypatch)
    assert again.key == cache.key and again.load_or_encode(read) == wanted
    assert ("token_type_ids" in wanted["train"][0]) == types


@pytest.mark.quick
def test_everything_that_decides_token_ids_is_in_the_key(llama, corpus, tmp_path):
    cache, read = make(llama, corpus, tmp_path)
    keys = {cache.key}
    for options in ({"max_length": 63}, {"prompt": "plain"}, {"prompt": "instruction"}, {"after": None}):
        keys.add(make(llama, corpus, tmp_path, **options)[0].key)
    assert len(keys) == 5
    changed = tmp_path / "changed"
    shutil.copytree(corpus, changed)
    assert corpus_digest(read_corpus(DataConfig(path=str(changed)))) == corpus_digest(read), (
        "where it lies is no matter"
    )
    lines = (changed / "dev.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    (changed / "dev.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last | {"after": last["after"] + " a"})]))
    assert make(llama, changed, tmp_path)[0].key not in keys
    relabelled = Corpus(read.splits, list(reversed(read.labels)))
    assert corpus_digest(relabelled) != corpus_digest(read)
    cache.encoder.tokenizer.add_tokens(["entirely-new"])
    assert encoder_digest(cache.encoder) != encoder_digest(make(llama, corpus, tmp_path)[0].encoder)


@pytest.mark.quick
@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "of another corpus"])
def test_a_damaged_file_is_made_anew_and_said(llama, corpus, tmp_path, caplog, damage):
    cache, read = make(llama, corpus, tmp_path)
    wanted = cache.load_or_encode(read)
    file = cache.folder / "train.safetensors"
    content = file.read_bytes()
    flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    other = (cache.folder / "dev.safetensors").read_bytes()
    file.write_bytes({"flipped": flipped, "short": content[:-40], "empty": b"", "of another corpus": other}[damage])
    with caplog.at_level(logging.WARNING, "irtune"):
        assert cache.load_or_encode(read) == wanted
    assert "train.safetensors is damaged and made anew" in caplog.text
    assert file.read_bytes() == content


@pytest.mark.quick
def test_without_a_place_for_it_a_run_goes_on(llama, corpus, tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    cache, read = make(llama, corpus, tmp_path / "file/tokens")
    with caplog.at_level(logging.INFO, "irtune"):
        assert cache.load_or_encode(read) == plainly(cache, read)
    assert caplog.text.count("token ids are not kept for later runs") == 1


@pytest.mark.quick
def test_a_bad_example_is_an_error_and_leaves_nothing(llama, corpus, tmp_path, monkeypatch):
    cache, read = make(llama, corpus, tmp_path)

    def encode(self, example):
        raise DataError("no text")

    monkeypatch.setattr(Encoder, "encode", encode)
    with pytest.raises(DataError, match="no text"):
        cache.load_or_encode(read)
    assert not list(tmp_path.iterdir())


@pytest.mark.quick
def test_the_longest_unused_entry_goes_first(llama, corpus, tmp_path):
    caches = [make(llama, corpus, tmp_path, max_length=40 + number)[0] for number in range(ENTRIES + 1)]
    small = dataclasses.replace(make(llama, corpus, tmp_path)[1])
    for cache in caches[:-1]:
        cache.load_or_encode(small)
        time.sleep(0.01)  # the clock of a file system may be coarse
    caches[0].load_or_encode(small)  # used again
    time.sleep(0.01)
    caches[-1].load_or_encode(small)
    assert {path.name for path in tmp_path.iterdir()} == {cache.key for cache in caches} - {caches[1].key}


def counted(config, cache):
    """Train, and count what this rank encoded itself."""
    counts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IRTUNE_CACHE", str(cache))
        encode = Encoder.encode
        patch.setattr(Encoder, "encode", lambda self, one: counts.append(1) or encode(self, one))
        assert train(config) is None
    return len(counts)


def test_one_rank_of_a_node_encodes_and_the_next_run_none(llama, corpus, tmp_path):
    runs = [tiny_config(llama, corpus, tmp_path / f"run{n}", optim__max_steps=1) for n in range(2)]
    assert run_cases(counted, 2, [(config, tmp_path / "cache") for config in runs]) == [[64 + 20 + 15, 0], [0, 0]]
    files = [(tmp_path / f"run{n}/predictions.jsonl").read_text() for n in range(2)]
    assert files[0] == files[1]
