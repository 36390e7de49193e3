"""Counts of the memory plan that are kept between runs."""

import dataclasses
import logging

import pytest

from irtune.memory import count_cache as kept
from irtune.memory.count import count
from tests.support.tiny import tiny_config


@pytest.fixture
def config(llama, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("IRTUNE_CACHE", str(tmp_path / "cache"))
    return tiny_config(llama, corpus, tmp_path / "run")


@pytest.fixture
def counts(monkeypatch):
    """The configurations that were counted, not read."""
    seen = []

    def spy(config, **options):
        seen.append(config)
        return count(config, **options)

    monkeypatch.setattr(kept, "count", spy)
    return seen


def counted(config, **options):
    return kept.kept_count(config, **({"device": "cpu", "labels": ["a", "b"], "slope": False} | options))


def test_what_was_counted_is_not_counted_again(config, counts, tmp_path):
    first = counted(config)
    assert first == count(config, device="cpu", labels=["a", "b"], slope=False)
    assert counted(config) == first and len(counts) == 1
    assert [file.suffix for file in (tmp_path / "cache/plans").iterdir()] == [".json"]


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("model", {"gradient_checkpointing": True}),
        ("model", {"dtype": "bfloat16"}),
        ("adapter", {"r": 3}),
        ("tuning", {"max_fraction": 0.2}),
        ("optim", {"micro_batch_size": 7}),
        ("optim", {"micro_batch_tokens": 5 * 256}),
        ("data", {"max_length": 33}),
    ],
)
def test_what_is_counted_decides(config, counts, section, change):
    counted(config)
    other = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **change)})
    assert counted(other) == count(other, device="cpu", labels=["a", "b"], slope=False)
    assert len(counts) == 2


@pytest.mark.parametrize("change", [{"device": "cuda"}, {"labels": ["a", "b", "c"]}, {"slope": True}])
def test_device_labels_and_slope_decide(config, counts, change):
    assert counted(config) != counted(config, **change)
    assert len(counts) == 2


def test_other_code_counts_anew(config, counts, monkeypatch):
    counted(config)
    monkeypatch.setattr(kept, "_code", lambda: "another")
    counted(config)
    assert len(counts) == 2


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_damaged_file_is_said_and_made_anew(config, counts, tmp_path, caplog, harm):
    first = counted(config)
    (file,) = (tmp_path / "cache/plans").iterdir()
    text = file.read_text()
    broken = {"flip": text.replace(str(first.peak), str(first.peak + 1)), "cut": text[:-9], "empty": "{}"}[harm]
    assert broken != text
    file.write_text(broken)
    with caplog.at_level(logging.WARNING, "irtune"):
        assert counted(config) == first
    assert f"{file} is damaged and made anew" in caplog.text
    assert len(counts) == 2 and file.read_text() == text


def test_a_folder_that_takes_nothing_costs_nothing_but_time(config, counts, tmp_path, caplog):
    (tmp_path / "cache").write_text("no folder")
    with caplog.at_level(logging.INFO, "irtune"):
        assert counted(config) == counted(config)
    assert "counts of the memory plan are not kept" in caplog.text and len(counts) == 2


def test_the_oldest_goes_first(config, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "ENTRIES", 2)
    for length in (16, 17, 18):
        counted(dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=length)))
    assert len(list((tmp_path / "cache/plans").iterdir())) == 2
