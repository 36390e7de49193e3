"""What forked test processes inherit: all that a run imports, also what irtune puts off until it is needed."""

# ruff: noqa: F401
import gc

import deepspeed.utils.nvtx
import matplotlib.backends.backend_agg
import matplotlib.figure
import torchmetrics.functional.classification
import transformers.models.bert.modeling_bert
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama

import irtune.train.run
import tests.support.runs
import tests.support.tiny

deepspeed.utils.nvtx.enable_nvtx = False  # marks for a profiler, two for each of the 10,000 calls in a step of ZeRO 3
gc.collect()
gc.freeze()  # or each process would walk through all of it, and so copy it, whenever it collects
