"""One look at the gradients before training, and the layers of highest score train to the end.

The rule of Aletheia (arXiv 2604.15351) as a second-hand summary has it (S), without its larger ranks for some layers.
"""

from irtune.config.declarations import Method
from irtune.selection.methods.topk import TopKChooser

METHOD = Method(
    name="probe",
    summary="the highest scores of the first batch, to the end",
    from_config=lambda tuning, candidates: TopKChooser(
        candidates.num_layers, interval=0, seed=candidates.seed, count=candidates.count
    ),
    takes_budget=True,
    budget=0.5,
    repeats=False,
    refuses=(
        ({"tuning.first": "random_half"}, "tuning.method probe looks at the first batch; set tuning.first to probe"),
    ),
)
