"""What a run will need, counted before it starts: nothing is loaded, nothing computed.

parts: a model's parameters and one step's tensors, counted on the meta device. estimate: bytes per rank under a ZeRO
stage and a format of the base. report: the plan of one run in words, and beside the measured peak. labels,
attention, step: what `parts` counts with.
"""

from irtune.memory.count import Parts, count, worst_selection
from irtune.memory.estimate import Estimate, estimate, state_bytes
from irtune.memory.report import RunPlan, compare, describe, plan_run, shortage

__all__ = [
    "Estimate",
    "Parts",
    "RunPlan",
    "compare",
    "count",
    "describe",
    "estimate",
    "plan_run",
    "shortage",
    "state_bytes",
    "worst_selection",
]
