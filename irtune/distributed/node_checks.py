"""Before anything is loaded or written: do all nodes run the same programs, the same configuration, the same corpus?"""

import contextlib
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from irtune.config import Config
from irtune.distributed import environment, node_facts, runtime
from irtune.distributed.node_facts import NodeFacts
from irtune.distributed.runtime import World
from irtune.distributed.versions import versions
from irtune.errors import NodesError

log = logging.getLogger("irtune")
SECONDS_TO_APPEAR = 5.0  # for a file of another node on a network file system


def check(config: Config, settings: dict[str, Any], world: World) -> None:
    """Compare all ranks' programs and configuration, count the nodes, and look whether all see the output folder.

    Collective; nothing is left behind. Clocks that differ are a warning.

    Raises:
        NodesError: on all ranks alike, with every problem and the nodes.
    """
    if world.size == 1:
        return
    options = node_facts.flat(config, settings)
    mine = NodeFacts(
        node=node_facts.node_name(),
        versions=versions(),
        digest=node_facts.digest(options),
        expected=environment.variable("IRTUNE_NNODES", ""),
    )
    facts: list[NodeFacts] = runtime.all_gather_object(mine)
    problems = node_facts.unequal_versions(facts) + node_facts.wrong_count(facts)
    if len({one.digest for one in facts}) > 1:  # only then is it worth sending
        problems += node_facts.unequal_options(runtime.all_gather_object(replace(mine, options=options)))
    nodes = [one.node for one in facts]
    if len(set(nodes)) > 1:
        runtime.watch().nodes = nodes
        # The ranks have just met, so they read their clocks at the same time.
        warning = node_facts.clock_difference(runtime.all_gather_object(replace(mine, clock=time.time())))
        if warning and world.is_main:
            log.warning("%s", warning)
        problems += _unseen(Path(config.run.output_dir).expanduser().absolute(), nodes, world)
    if problems:
        raise NodesError(problems)


def check_equal(what: dict[str, str]) -> None:
    """Compare digests or names, such as those of a corpus, across ranks. Collective.

    Raises:
        NodesError: on all ranks alike, naming what differs and the nodes.
    """
    mine = NodeFacts(node=node_facts.node_name(), versions={}, digest=node_facts.digest(what), options=what)
    facts = runtime.all_gather_object(mine)
    problems = []
    for name in what:
        values = dict.fromkeys(one.options[name] for one in facts)
        if len(values) > 1:
            groups = [[one.node for one in facts if one.options[name] == value] for value in values]
            sides = "; ".join(f"{value[:40]} on {node_facts.listed(list(dict.fromkeys(group)))}"
                              for value, group in zip(values, groups))  # fmt: skip
            problems.append(f"{name} is not the same on all nodes: {sides}")
    if problems:
        raise NodesError(problems)


def _unseen(folder: Path, nodes: list[str], world: World) -> list[str]:
    """A sentence if a node does not see what rank 0 writes where the run folder is, or will be."""
    base = Path(node_facts.nearest_folder(str(folder)))
    probe, error = base / f".irtune-probe-{os.getpid()}-{time.time_ns()}", None
    if world.is_main:
        try:
            probe.write_bytes(b"")
        except OSError as failure:
            error = failure.strerror
    # Relative: below what is there on rank 0's node, another node may have more or less.
    above = len(folder.parts) - len(base.parts)
    name, above, error, there = runtime.all_gather_object((probe.name, above, error, str(folder)))[0]
    seen = error is not None or _appears([folder, *folder.parents][above] / name)
    found = runtime.all_gather_object(seen)
    if world.is_main:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    if error is not None:
        return [f"run.output_dir: cannot write to {there!r}: {error} (on {nodes[0]})"]
    blind = list(dict.fromkeys(node for node, sees in zip(nodes, found) if not sees))
    if not blind:
        return []
    return [
        f"run.output_dir {there!r} of {nodes[0]} is not visible from {node_facts.listed(blind)}; choose a folder on a "
        "disk that all nodes share, since every rank reads checkpoints"
    ]


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
