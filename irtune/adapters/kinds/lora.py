"""LoRA (Hu et al., ICLR 2022): W x + (alpha / r) B A x."""

from irtune.adapters.low_rank import add_low_rank
from irtune.config.declarations import AdapterKind

KIND = AdapterKind(name="lora", summary="low-rank updates of linear modules", build=add_low_rank, peft_format=True)
