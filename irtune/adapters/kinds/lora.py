"""LoRA (Hu et al., ICLR 2022): W x + (alpha / r) B A x."""

from irtune.adapters.low_rank import add_low_rank
from irtune.config.declarations import AdapterKind

KIND = AdapterKind(
    name="lora",
    family="low-rank",
    summary="low-rank updates of linear modules",
    source="Hu et al., ICLR 2022",
    licence="Apache-2.0 (peft)",
    build=add_low_rank,
    silent=True,
    peft_format=True,
    keys=("adapter.target_parameters",),
    refuses=(
        (
            {"adapter.target_parameters": ..., "adapter.dropout": ...},
            "adapter.target_parameters cannot have adapter.dropout; set it to 0",
        ),
    ),
)
