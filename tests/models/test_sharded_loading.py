"""Under ZeRO 3 a rank loads its share of the model and no more."""

import contextlib
import ctypes
import gc
import json
import logging
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from irtune.adapters import Suppression, add_adapters, write_adapter
from irtune.config import AdapterConfig, ModelConfig
from irtune.distributed import runtime
from irtune.distributed.partitioned import is_partitioned, whole
from irtune.evaluation.start import start_from
from irtune.models import load_classifier
from irtune.models.anatomy import output_projections
from irtune.models.head_words import start_from_words
from irtune.selection.signal_noise import layer_ratios
from tests.support.ranks import run_ranks
from tests.support.tiny import save_model

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


@contextlib.contextmanager
def growth():
    """By how many bytes this process's memory grew at most inside: a list of what was seen."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)  # freed tensors go back to the system at once
    gc.collect()
    before, grown, ended = anonymous(), [0], threading.Event()

    def look():
        while not ended.wait(0.001):
            grown.append(anonymous() - before)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield grown
    finally:
        ended.set()
        watcher.join()


def values(parameters):
    """Shape, format, sum and last values of each parameter, one whole at a time."""
    found = {}
    for name, parameter in parameters.items():
        with whole([parameter]):
            found[name] = (tuple(parameter.shape), str(parameter.dtype), parameter.detach().double().sum().item(),
                           parameter.detach().flatten()[-3:].tolist())  # fmt: skip
    return found


def kept_bytes(parameters):
    return sum(getattr(p, "ds_tensor", p).numel() * p.element_size() for p in parameters.values())


def load(model, dtype, sharded):
    """Bytes that a rank keeps, by how much its memory grew at most, the whole model's values, and what was said."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("irtune").addHandler(handler)
    runtime.start(runtime.read_world(), 60)
    torch.manual_seed(0)
    with growth() as grown:
        config = ModelConfig(name_or_path=str(model), dtype=dtype)
        classifier = load_classifier(config, ["a", "b", "c"], sharded=sharded)
    parameters = dict(classifier.model.named_parameters())
    found = values(parameters)
    apart = [name for name, parameter in parameters.items() if not hasattr(parameter, "ds_tensor")]
    runtime.stop()
    return kept_bytes(parameters), max(grown), found, apart, [text for text in said if "every rank" in text]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_rank_loads_its_share(large, dtype):
    size = {"float32": 4, "bfloat16": 2}[dtype]
    plain = run_ranks(load, 1, large, dtype, None)[0]
    total = sum(torch.Size(shape).numel() for shape, *_ in plain[2].values()) * size
    assert plain[0] == total
    for kept, peak, sums, apart, said in run_ranks(load, 2, large, dtype, ZERO):
        assert sums == plain[2]  # the head that is drawn at random too
        assert apart == ["score.weight"]
        assert not said
        head = 3 * 512 * size
        assert kept == (total - head) // 2 + head
        print(f"{dtype}: a share of {kept / 1e6:.1f} MB, memory grew by {peak / 1e6:.1f} MB at most")
        assert peak <= kept + 20e6 + 10e6  # its share, one file, and what Python takes


def test_a_head_for_other_labels_is_replaced_under_every_stage(tmp_path):
    folder = save_model(tmp_path / "model")
    classifier = load_classifier(ModelConfig(name_or_path=str(folder), dtype="float32"), ["a", "b"])
    classifier.model.save_pretrained(folder)
    for kept, _, sums, apart, said in run_ranks(load, 2, folder, "float32", ZERO):
        assert sums["score.weight"][0] == (3, 32)
        assert len(apart) == len(sums) and kept == sum(torch.Size(shape).numel() * 4 for shape, *_ in sums.values())
        (sentence,) = said
        assert sentence.startswith("score.weight has shape (2, 32) in the files and (3, 32) in the model: every rank")


def put_in(model, cases, sharded, terms=None):
    """For each case, a name and settings of the adapter: what reading, adding and remembering made of the model.

    With the file `terms`, its head is made of words first.

    Returns:
        Per case: all values, those of the layers turned down, what was read of weights, bytes kept, growth of memory.
    """
    runtime.start(runtime.read_world(), 60)
    results = {}
    for name, (settings, ratios) in cases.items():
        torch.manual_seed(0)
        with growth() as grown:
            config = ModelConfig(name_or_path=str(model), dtype="float32", head_init=terms)
            classifier = load_classifier(config, ["a", "b_c", "d"], sharded=sharded)
            if terms is not None:
                start_from_words(classifier, config, ["a", "b_c", "d"])
            read = layer_ratios(classifier.model, classifier.anatomy) if ratios else None
            weights = output_projections(classifier.model, classifier.anatomy)
            model_, table = add_adapters(classifier, AdapterConfig(**settings))
            norms = [weight.norm().item() for weight in weights]
            suppression = Suppression(table)
        parameters = dict(model_.named_parameters())
        kept = kept_bytes(parameters) + sum(origin.numel() * 4 for origin in suppression.origins.values())
        first = values(parameters)
        buffers = {key: buffer.tolist() for key, buffer in model_.named_buffers() if key in ("states", "attends")}
        own = [(key, parameter) for layer in table.layers for key, parameter in layer if key in suppression.origins]
        for _, parameter in own:  # as if it had been trained
            with whole([parameter], write=True):
                parameter.data += 1
        with suppression.suppressed(range(table.num_layers)):
            down = values(dict(own))
        del weights, classifier, table, suppression
        results[name] = (first, down, (read, norms, buffers), kept, max(grown), len(own))
        del model_, parameters, own
    runtime.stop()
    return results


TYPES = {
    "llama": {
        "dora": {"r": 4},
        "pissa": {"r": 4},
        "prefix": {"num_tokens": 3},
        "prompt": {"num_tokens": 3},
        "ltuning-prefix": {"r": 4, "num_tokens": 2},
        "ltuning-prompt": {"size": 8},
        "none": {"embeddings": True},
    },
    # Stores matrices the other way round, and has biases of its own.
    "gpt2": {"dora": {"r": 4}, "pissa": {"r": 4}, "bitfit": {}, "spafit": {"r": 4}, "none": {}},
}


@pytest.mark.parametrize("kind", TYPES)
def test_all_types_and_scores_find_the_whole_model_in_its_shares(request, kind, tmp_path):
    folder = request.getfixturevalue(kind)
    terms = None
    if kind == "gpt2":  # its language-model head is its embeddings, of which each rank holds a share
        words = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens([5, 9, 20])
        (tmp_path / "terms.yaml").write_text(json.dumps(dict(zip(["a", "b_c", "d"], ({word: 1} for word in words)))))
        terms = str(tmp_path / "terms.yaml")
    cases = {name: ({"type": name} | settings, name == "none") for name, settings in TYPES[kind].items()}
    (plain,) = run_ranks(put_in, 1, folder, cases, None, terms)
    for results in run_ranks(put_in, 2, folder, cases, ZERO, terms):
        for name, (first, down, read, *_, own) in plain.items():
            assert results[name][:3] == (first, down, read), name
            assert own == results[name][-1]
            assert (own > 0) == (name not in ("prompt", "ltuning-prompt")), name


@pytest.mark.slow
def test_memory_while_adapters_are_put_in_stays_near_the_share(large):
    """One type of each way to need weights: read, taken apart, run, trained themselves."""
    cases = {
        "dora": ({"type": "dora", "r": 4}, False),
        "pissa": ({"type": "pissa", "r": 4, "target_modules": ["k_proj"]}, False),
        "ltuning-prefix": ({"type": "ltuning-prefix", "r": 4, "num_tokens": 2}, False),
        "none": ({"type": "none"}, False),
    }
    results = run_ranks(put_in, 2, large, cases, ZERO)
    for name in cases:
        for *_, kept, peak, _ in (result[name] for result in results):
            print(f"{name}: a rank keeps {kept / 1e6:.1f} MB, memory grew by {peak / 1e6:.1f} MB at most")
            assert peak <= kept + 20e6 + 10e6, name


def start_under_zero_3(model, folder):
    runtime.start(runtime.read_world(), 60)
    adapter = AdapterConfig(type="spafit", r=4, strata=[1, 3], dtype="model")
    config = ModelConfig(name_or_path=str(model), dtype="float32")
    module, table = add_adapters(load_classifier(config, ["a", "b", "c"], sharded=ZERO), adapter)
    start_from(str(folder), module, table, adapter, ["a", "b", "c"])
    held = sum(is_partitioned(parameter) for _, parameter in table.all())
    values = {}
    for name, parameter in table.all():
        with whole([parameter]):
            values[name] = parameter.tolist()
    runtime.stop()
    return held, values


def test_a_run_under_zero_3_starts_from_biases_of_the_model_itself(gpt2, tmp_path):
    adapter = AdapterConfig(type="spafit", r=4, strata=[1, 3], dtype="model")
    config = ModelConfig(name_or_path=str(gpt2), dtype="float32")
    _, table = add_adapters(load_classifier(config, ["a", "b", "c"]), adapter)
    torch.manual_seed(3)
    learnt = {name: torch.randn_like(parameter) for name, parameter in table.all()}
    write_adapter(tmp_path / "adapter", learnt, adapter, ["a", "b", "c"])
    for held, values in run_ranks(start_under_zero_3, 2, gpt2, tmp_path):
        assert held and values.keys() == learnt.keys()
        for name, wanted in learnt.items():
            assert values[name] == wanted.tolist(), name
