"""Under ZeRO 3 a rank loads its share of the model and no more."""

import ctypes
import threading
from pathlib import Path

import deepspeed
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from irtune import runtime
from irtune.config import ModelConfig
from irtune.models import load_classifier
from tests.ranks import run_ranks
from tests.tiny import save_model

M_MMAP_THRESHOLD = -3  # of mallopt
ZERO = {"stage": 3, "stage3_param_persistence_threshold": 0}


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """About 90 MB in five files."""
    folder = save_model(tmp_path_factory.mktemp("large"))
    (folder / "model.safetensors").unlink()
    size = LlamaConfig.from_pretrained(folder).vocab_size
    config = LlamaConfig(vocab_size=size, hidden_size=512, intermediate_size=1408, num_hidden_layers=7,
                         num_attention_heads=8, num_key_value_heads=8, pad_token_id=3)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20MB")
    return folder


def anonymous() -> int:
    """Bytes of memory that belong to this process alone: without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def load(model, dtype, sharded):
    """Bytes that a rank keeps, by how much its memory grew at most, and the whole model's values."""
    runtime.start(runtime.read_world(), 60)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)  # freed tensors go back to the system at once
    torch.manual_seed(0)
    before, grown, ended = anonymous(), [0], threading.Event()

    def look():
        while not ended.wait(0.001):
            grown.append(anonymous() - before)

    watcher = threading.Thread(target=look)
    watcher.start()
    classifier = load_classifier(ModelConfig(name_or_path=str(model), dtype=dtype), ["a", "b", "c"], sharded=sharded)
    ended.set()
    watcher.join()
    parameters = dict(classifier.model.named_parameters())
    kept = sum(getattr(p, "ds_tensor", p).numel() * p.element_size() for p in parameters.values())
    sums = {}
    for name, parameter in parameters.items():
        gather = [parameter] if hasattr(parameter, "ds_tensor") else []
        with deepspeed.zero.GatheredParameters(gather):
            sums[name] = (tuple(parameter.shape), str(parameter.dtype), parameter.detach().double().sum().item(),
                          parameter.detach().flatten()[-3:].tolist())  # fmt: skip
    whole = [name for name, parameter in parameters.items() if not hasattr(parameter, "ds_tensor")]
    runtime.stop()
    return kept, max(grown), sums, whole


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_rank_loads_its_share(large, dtype):
    size = {"float32": 4, "bfloat16": 2}[dtype]
    plain = run_ranks(load, 1, large, dtype, None)[0]
    total = sum(torch.Size(shape).numel() for shape, *_ in plain[2].values()) * size
    assert plain[0] == total
    for kept, peak, sums, whole in run_ranks(load, 2, large, dtype, ZERO):
        assert sums == plain[2]  # the head that is drawn at random too
        assert whole == ["score.weight"]
        head = 3 * 512 * size
        assert kept == (total - head) // 2 + head
        print(f"{dtype}: a share of {kept / 1e6:.1f} MB, memory grew by {peak / 1e6:.1f} MB at most")
        assert peak <= kept + 20e6 + 10e6  # its share, one file, and what Python takes


def test_a_head_for_other_labels_is_replaced_under_every_stage(tmp_path):
    folder = save_model(tmp_path / "model")
    classifier = load_classifier(ModelConfig(name_or_path=str(folder), dtype="float32"), ["a", "b"])
    classifier.model.save_pretrained(folder)
    for kept, _, sums, whole in run_ranks(load, 2, folder, "float32", ZERO):
        assert sums["score.weight"][0] == (3, 32)
        assert len(whole) == len(sums) and kept == sum(torch.Size(shape).numel() * 4 for shape, *_ in sums.values())
