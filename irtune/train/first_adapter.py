"""After the first evaluation: what the run writes, `evaluate` will load, or weeks of training would be lost."""

import logging
import tempfile
from pathlib import Path

from irtune.config import Config
from irtune.distributed import runtime
from irtune.engine import Engine
from irtune.evaluation.round_trip import compare_loaded, is_quickly_loaded
from irtune.memory.measure import uncounted
from irtune.models import RunFacts
from irtune.train.training_data import TrainingData

log = logging.getLogger("irtune")


def check_what_is_written(config: Config, engine: Engine, data: TrainingData, layers: list[int] | None) -> None:
    """Write the adapter as it is to a temporary folder, load it as `evaluate` does, and compare logits. Collective.

    Rank 0 loads the base a second time, which takes up to 2 s; where it would take longer, the log says that `validate`
    does it. Its memory does not count as the run's.

    Args:
        config: of the run.
        engine: with weights that have been evaluated.
        data: of the run.
        layers: see `Engine.save_adapter`.

    Raises:
        ModelError, RunError, CheckpointError: on all ranks, when what was written is not what was trained.
    """
    if engine.stage == 3 or not is_quickly_loaded(config, engine.module):
        log.info(
            "what this run writes is not loaded again here, since its model is large, quantised or held in shares: "
            "`python -m irtune validate` tries that"
        )
        return
    runtime.doing("loading what the run writes")
    labels = list(data.corpus.labels)
    with tempfile.TemporaryDirectory() as place:
        engine.save_adapter(Path(place) / "adapter", config.adapter, labels, layers, RunFacts.of(config))
        with runtime.shared_errors(), uncounted(data.device):
            if runtime.rank() == 0:
                compare_loaded(Path(place), config, engine.module, labels, data.encoded["dev"])
    engine.module.train()
