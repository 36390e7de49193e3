"""LoRA (Hu et al., ICLR 2022): W x + (alpha / r) B A x."""

from irtune.adapters.low_rank import add_low_rank

build = add_low_rank
