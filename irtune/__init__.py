"""irtune: layer-wise fine-tuning of language models with IR-Tuning under DeepSpeed ZeRO."""

import logging

__version__ = "0.1.0"

# Said by every rank when peft imports it, about kernels that irtune does not use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
