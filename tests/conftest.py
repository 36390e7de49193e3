"""Shared fixtures: tiny models and corpora on disk, made once per session."""

from pathlib import Path

import pytest
import torch

from irtune.launcher import data_folder
from tests import tiny

torch.set_num_threads(1)


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
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real corpora."""
    folder = data_folder()
    if folder is None:
        pytest.skip("IRTUNE_DATA is not set, so there are no real corpora to read")
    return Path(folder)
