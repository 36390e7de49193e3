"""What a run will need, counted before it starts: nothing is loaded, nothing computed.

count: a model's parameters and one step's tensors, on the meta device. estimate: bytes per rank under a ZeRO stage and
a format of the base. report: the plan of one run in words, and beside the measured peak. meta_attention, meta_step:
what `count` counts with. measure: what a run really needed.
"""

from irtune.memory.count import Parts, count, worst_selection
from irtune.memory.estimate import Estimate, estimate, state_bytes
from irtune.memory.report import MemoryEstimate, compare, describe, estimate_memory, shortage

__all__ = [
    "Estimate",
    "MemoryEstimate",
    "Parts",
    "compare",
    "count",
    "describe",
    "estimate",
    "estimate_memory",
    "shortage",
    "state_bytes",
    "worst_selection",
]
