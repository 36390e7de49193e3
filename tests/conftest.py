"""Shared fixtures: tiny models and corpora on disk, made once per session."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

from tests.support import tiny

torch.set_num_threads(1)
if "IRTUNE_CACHE" not in os.environ:  # token ids of tiny corpora are not for the user's cache
    _cache = tempfile.TemporaryDirectory(prefix="irtune-tests-")
    os.environ["IRTUNE_CACHE"] = _cache.name


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a byte-level tokenizer, which splits the marks of a diff."""
    return tiny.save_model(tmp_path_factory.mktemp("bpe"), tokenizer=tiny.byte_tokenizer())


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def base(llama: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 ranks x 2 accumulation steps under ZeRO 2: what other splits and stages must equal. With plan and pictures."""
    from tests.support.runs import launch  # here: tests without processes need none of what it imports

    folder = tmp_path_factory.mktemp("base") / "run"
    return launch(tiny.tiny_config(llama, corpus, folder, optim__gradient_accumulation_steps=2), 2, whole=True)


@pytest.fixture(scope="session")
def gpu(tmp_path_factory: pytest.TempPathFactory):
    """Runs on a CUDA device that is not there: a `Server` of tests/support/simulated."""
    from tests.support.simulated.client import serving

    with serving(tmp_path_factory.getbasetemp()) as server:
        yield server


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real corpora."""
    folder = os.environ.get("IRTUNE_DATA")
    if folder is None:
        pytest.skip("IRTUNE_DATA is not set, so there are no real corpora to read")
    return Path(folder)


def pytest_collection_modifyitems(items):
    """Tests of kills, nodes and launches wait for time-outs, and benchmarks measure: they run by themselves."""
    for item in items:
        patient = item.path.name in ("test_simulated_matrix.py", "test_gpu_day.py")
        if item.path.parent.name in ("jobs", "benchmarks") and not patient:
            item.add_marker("alone")
