"""Outputs of the layers that stay frozen below the lowest trained one, computed once for every training example.

Where layers are chosen once, what those below the lowest of them make of an example is the same in every epoch, as long
as there is no dropout. So it is computed before the first step and kept, and training steps begin above. The values
depend on the examples that are computed together, which are the same on any number of ranks and after a restart.
"""

import itertools
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from irtune.adapters import AdapterTraits, LayerTable
from irtune.config import Config
from irtune.distributed import runtime
from irtune.distributed.node_facts import node_number
from irtune.engine import Engine
from irtune.engine.replaced_layers import ReplacedLayers
from irtune.errors import ConfigError
from irtune.tracking.tracker import Tracker
from irtune.train.training_data import TrainingData

KEY = "tuning.keep_frozen_outputs"
CHECKED = 2  # examples


def check_frozen_outputs(
    config: Config, model: Any, table: LayerTable, traits: AdapterTraits, selected: Sequence[int] | None
) -> None:
    """Refuse `tuning.keep_frozen_outputs` where it can keep nothing, of a run that is set up otherwise.

    Args:
        config: of the run.
        model: the classifier without adapters, for its configuration.
        table: its layers with adapters.
        traits: of the adapters.
        selected: layers that train first; None where scores decide.

    Raises:
        ConfigError: with what stands against it.
    """
    if not config.tuning.keep_frozen_outputs:
        return
    settings = model.config.get_text_config().to_dict()
    drops = [
        f"{name} {value}" for name, value in settings.items() if "drop" in name and "classif" not in name and value
    ]
    problems = []
    if drops:
        problems.append(
            f"{KEY}: the layers of {config.model.name_or_path} have dropout, which differs from epoch to epoch "
            f"({', '.join(drops)} in its config.json); set that to 0 there, or {KEY} to false"
        )
    if traits.below or traits.connected:
        problems.append(
            f"{KEY}: adapter.type {config.adapter.type} trains what the lowest layers read; set it to false"
        )
    if selected is not None and _lowest(table, selected) == 0:
        problems.append(f"{KEY}: layer 0 trains, so that there is nothing to keep; set tuning.layers to higher ones")
    if problems:
        raise ConfigError(problems)


def _lowest(table: LayerTable, selected: Sequence[int]) -> int:
    """The lowest of the `selected` layers that has parameters; L where none has."""
    return min((layer for layer in selected if table.layers[layer]), default=table.num_layers)


def keep_frozen_outputs(config: Config, engine: Engine, data: TrainingData, tracker: Tracker) -> None:
    """Compute what the layers below the lowest trained one make of all training examples, and let `data` hand it on.

    From then on, `engine` does not compute those layers in a step. Without `tuning.keep_frozen_outputs`, or when
    layer 0 trains, nothing happens. Collective.

    Args:
        config: of the run, whose folder's file system has room for all tokens x the hidden size. The file there has
            no name after this function, so that nothing is left when the run ends, however it ends.
        engine: with the layers selected that train to the end of the run.
        data: of the run, whose training batches get `attention_mask.kept`.
        tracker: tells the user.

    Raises:
        ConfigError: without room.
        TrainingError: when the layers above compute something else from what was kept, or cannot do without the others.
    """
    if not config.tuning.keep_frozen_outputs:
        return
    frozen = _lowest(engine.table, engine.selected)
    if frozen == 0:
        tracker.say(f"{KEY}: layer 0 trains, so that there is nothing to keep")
        return
    runtime.doing("outputs of the frozen layers")
    began, folder = time.perf_counter(), Path(config.run.output_dir).expanduser()
    layers = ReplacedLayers(engine.module, engine.table.modules, frozen)
    lengths = [len(item["input_ids"]) for item in data.encoded["train"]]
    groups = _groups(lengths, data.evaluation_batch)
    example = layers.outputs(data.batch(groups[0]))
    kept = KeptStates(lengths, example, folder)
    for group in _mine(groups):
        runtime.moving()
        kept.put(group, layers.outputs(data.batch(group)))
    runtime.barrier()
    data.kept = kept.rows
    layers.check(data.batch(groups[len(groups) // 2][:CHECKED]))
    size, seconds = kept.states.nbytes / 2**20, time.perf_counter() - began
    tracker.say(
        f"outputs of the frozen layers 0 to {frozen - 1} are kept: {size:,.0f} MiB on disk, computed in {seconds:.0f} s"
    )


class KeptStates:
    """Hidden states of all training examples, in a file without a name that the ranks of a node share.

    states: [tokens of all examples, width], in the model's dtype.
    """

    def __init__(self, lengths: Sequence[int], example: torch.Tensor, folder: Path):
        """Make the file. Collective.

        Args:
            lengths: tokens of each example.
            example: some states, for their width and dtype.
            folder: where.

        Raises:
            ConfigError: when there is no room.
        """
        self.ends = list(itertools.accumulate(lengths))
        shape = (self.ends[-1], example.shape[-1])
        elements = math.prod(shape)
        file = folder / f".frozen_outputs_{node_number()}"
        with runtime.shared_errors():
            if _ranks_here()[0] == runtime.rank():
                _make(file, elements * example.dtype.itemsize)
        self.states = torch.from_file(str(file), shared=True, size=elements, dtype=example.dtype).view(shape)
        runtime.barrier()
        file.unlink(missing_ok=True)

    def put(self, places: Sequence[int], states: torch.Tensor) -> None:
        """Keep `states` [tokens, width] of the examples at `places`."""
        host, start = states.cpu(), 0
        for place in places:
            own = self.states[self._tokens(place)]
            own.copy_(host[start : start + len(own)])
            start += len(own)

    def rows(self, places: Sequence[int], width: int, *, packed: bool) -> torch.Tensor:
        """States of the examples at `places`: packed [1, tokens, dim]; else [examples, `width`, dim], padded with 0."""
        found = [self.states[self._tokens(place)] for place in places]
        if packed:
            return torch.cat(found)[None]
        padded = found[0].new_zeros((len(found), width, found[0].shape[-1]))
        for row, states in zip(padded, found):
            row[: len(states)] = states
        return padded

    def _tokens(self, place: int) -> slice:
        return slice(self.ends[place - 1] if place else 0, self.ends[place])


def _make(file: Path, size: int) -> None:
    """An empty file of `size` bytes whose space is taken.

    Raises:
        ConfigError: when there is no room.
    """
    free = shutil.disk_usage(file.parent).free
    try:
        file.unlink(missing_ok=True)
        with file.open("wb") as opened:
            os.posix_fallocate(opened.fileno(), 0, size)
    except OSError as error:
        file.unlink(missing_ok=True)
        raise ConfigError(
            f"{KEY}: {size / 2**30:.1f} GiB do not fit into run.output_dir {str(file.parent)!r}, which has "
            f"{free / 2**30:.1f} GiB free ({error.strerror}); set it to false"
        ) from error


def _groups(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Examples that are computed together: of like lengths, the same on any number of ranks."""
    order = sorted(range(len(lengths)), key=lambda place: (lengths[place], place))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _ranks_here() -> list[int]:
    """The ranks on this node."""
    nodes = runtime.all_gather_object(node_number())
    return [rank for rank, node in enumerate(nodes) if node == node_number()]


def _mine(groups: list[list[int]]) -> list[list[int]]:
    """What this rank computes for its node, as much as any rank of the others: under ZeRO 3 they compute together."""
    here = _ranks_here()
    most = max(runtime.all_gather_object(math.ceil(len(groups) / len(here))))
    mine = groups[here.index(runtime.rank()) :: len(here)]
    return mine + [groups[0]] * (most - len(mine))
