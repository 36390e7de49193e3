"""What forked test processes inherit: all that a run imports and works out once, also what is put off until needed."""

# ruff: noqa: F401
import gc
import tempfile
from pathlib import Path

import deepspeed.utils.nvtx
import matplotlib.backends.backend_agg
import matplotlib.figure
import torch
import torchmetrics.functional.classification
import transformers.models.bert.modeling_bert
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama

import irtune.train.run
import tests.support.runs
import tests.support.tiny
from irtune.adapters.build import add_adapters
from irtune.config import AdapterConfig, ModelConfig
from irtune.models import load_classifier

deepspeed.utils.nvtx.enable_nvtx = False  # marks for a profiler, two for each of the 10,000 calls in a step of ZeRO 3


def _build_once() -> None:
    """Load a model and put adapters in: transformers and peft build tables then, half a second in each process."""
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        model = tests.support.tiny.save_model(Path(folder), layers=1)
        add_adapters(
            load_classifier(ModelConfig(name_or_path=str(model), dtype="float32"), ["a", "b"]), AdapterConfig()
        )


torch.set_num_threads(1)  # threads would not be there after a fork
_build_once()
gc.collect()
gc.freeze()  # or each process would walk through all of it, and so copy it, whenever it collects
