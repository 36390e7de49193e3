"""Between log lines nothing is read from the device: on a GPU the host would wait for it. Counted on the CPU."""

from collections import Counter

import pytest
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from irtune.train.run import run
from irtune.train.trainer import Trainer
from tests.support.ranks import run_ranks
from tests.support.runs import bare
from tests.support.tiny import tiny_config

FUNCTIONS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__array__", "nonzero")
OPERATIONS = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.masked_select")


class _Operations(TorchDispatchMode):
    """Counts operations whose result the host has to wait for, DeepSpeed's and the model's among them."""

    def __init__(self, seen: Counter):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).rpartition(".")[0]
        self.seen.update([name] if name in OPERATIONS else [])
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Counts calls by which Python reads a tensor; on the CPU tolist and numpy are no operations of their own."""

    def __init__(self, seen: Counter):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        self.seen.update([name] if name in FUNCTIONS else [])
        return func(*args, **(kwargs or {}))


def reads(config, first: int, last: int):
    """What is read of tensors from the beginning of step `first` to that of step `last`, between ranks' steps too."""
    original, seen = Trainer._train_step, Counter()
    modes = [_Operations(seen), _Functions(seen)]

    def step(self):
        if self.progress.step + 1 == first:
            for mode in modes:
                mode.__enter__()
        if self.progress.step + 1 == last:
            for mode in reversed(modes):
                mode.__exit__(None, None, None)
        return original(self)

    Trainer._train_step = step
    with bare():
        run(config)
    return dict(seen)


def quiet(model, corpus, folder, stage, **more):
    """A run of 10 steps whose selections, after the steps 4 and 8, and log lines, after step 10, are far apart."""
    options = {"tuning__interval": 4, "optim__max_steps": 10, "run__eval_every": 10, "run__log_every": 10} | more
    return tiny_config(model, corpus, folder, stage, **options)


OVER_BF16 = {"model__dtype": "bfloat16"}
BF16 = OVER_BF16 | {"adapter__dtype": "model"}
KINDS = [(0, {}), (1, {}), (2, {}), (0, OVER_BF16), (1, OVER_BF16), (2, OVER_BF16), (1, BF16), (2, BF16),
         (2, {"adapter__type": "prompt", "adapter__num_tokens": 4})]  # fmt: skip


@pytest.mark.parametrize(
    "stage, kind",
    KINDS,
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_a_step_reads_nothing_from_the_device(llama, corpus, tmp_path, stage, kind):
    config = quiet(llama, corpus, tmp_path / "run", stage, **kind)
    assert run_ranks(reads, 2, config, 5, 8) == [{}, {}]


def test_selections_and_log_lines_read(llama, corpus, tmp_path):
    chosen, _ = run_ranks(reads, 2, quiet(llama, corpus, tmp_path / "chosen", 2), 4, 5)
    logged, _ = run_ranks(reads, 2, quiet(llama, corpus, tmp_path / "logged", 2, run__log_every=1), 5, 6)
    assert chosen["tolist"] > 0 and logged["tolist"] > 0
