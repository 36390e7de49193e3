"""What a node says of itself, and what is unequal between nodes. Without torch: launch scripts ask before a start."""

import hashlib
import json
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from irtune.distributed import environment
from irtune.distributed.network import port_problem
from irtune.distributed.versions import versions

CLOCK_SECONDS = 5.0  # difference between two nodes above which records cannot be put in order
LISTED = 8  # nodes or options that a message names


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What must be equal on all nodes, as one rank, or one host before a start, sees it.

    node: its name in messages.
    versions: as `versions`.
    digest: of the configuration, see `digest`.
    clock: seconds since 1970; 0 where it was not asked for.
    expected: number of nodes that the launch script expects, as `N` or `MIN:MAX`; empty without one.
    options: the configuration, where digests differ, see `flat`.
    """

    node: str
    versions: Mapping[str, str]
    digest: str
    clock: float = 0.0
    expected: str = ""
    options: Mapping[str, str] = field(default_factory=dict)


def node_number() -> int:
    """This node's number by the launcher: torchrun's GROUP_RANK, deepspeed's CROSS_RANK; or by counting its ranks."""
    given = environment.variable("GROUP_RANK", environment.variable("CROSS_RANK", ""))
    if given.isdecimal():
        return int(given)
    here = environment.variable("LOCAL_WORLD_SIZE", environment.variable("LOCAL_SIZE", "1"))
    rank = environment.variable("RANK", "0")
    return int(rank) // max(1, int(here)) if rank.isdecimal() and here.isdecimal() else 0


def node_name() -> str:
    """Number and host name, for messages: two nodes may have one host name."""
    return f"node {node_number()} ({socket.gethostname()})"


def flat(config: Any, settings: Mapping[str, Any]) -> dict[str, str]:
    """Option -> value as text, of a configuration and of the completed DeepSpeed settings.

    Not where the corpus lies, which may be another place on each node: its content is compared when it is read.
    """
    options = {
        f"{name}.{key}": json.dumps(value, default=str)
        for name, section in vars(config).items()
        if hasattr(section, "__dataclass_fields__")
        for key, value in vars(section).items()
    }
    for name in ("path", "train", "dev", "test", "pseudo"):
        options.pop(f"data.{name}", None)

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{prefix}{'.' if prefix[-1] != ' ' else ''}{key}", inner)
        else:
            options[prefix] = json.dumps(value, default=str)

    add("DeepSpeed file: ", settings)
    return options


def digest(value: Any) -> str:
    """SHA-256 of something made of JSON's types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def unequal_versions(facts: Sequence[NodeFacts]) -> list[str]:
    """A sentence per package that is not the same everywhere."""
    return _unequal(facts, [one.versions for one in facts], "install the same requirements on every node")


def unequal_options(facts: Sequence[NodeFacts]) -> list[str]:
    """A sentence per option that is not the same everywhere; `facts` must carry them."""
    found = _unequal(facts, [one.options for one in facts], "give the same recipe and options on every node")
    more = len(found) - LISTED
    return found if more <= 0 else [*found[:LISTED], f"{more} other options differ between nodes as well"]


def _unequal(facts: Sequence[NodeFacts], values: Sequence[Mapping[str, str]], advice: str) -> list[str]:
    names = dict.fromkeys(name for each in values for name in each)
    said = {name: _by_value(facts, [each.get(name, "missing") for each in values]) for name in names}
    return [f"{name} is {text}; {advice}" for name, text in said.items() if text is not None]


def _by_value(facts: Sequence[NodeFacts], values: Sequence[str]) -> str | None:
    """`4 on node 0 (a), 5 on node 1 (b)`; None where all are equal."""
    nodes: dict[str, dict[str, None]] = defaultdict(dict)
    for one, value in zip(facts, values):
        nodes[value][one.node] = None
    if len(nodes) <= 1:
        return None
    return ", ".join(f"{value[:100]} on {listed(list(names))}" for value, names in nodes.items())


def wrong_count(facts: Sequence[NodeFacts]) -> list[str]:
    """A sentence if there are not as many nodes as the launch scripts expect, or if they expect different numbers."""
    said = _by_value(facts, [one.expected or "not given" for one in facts])
    if said is not None:
        return [f"the number of nodes is {said}; start every node with the same NNODES"]
    least, _, most = facts[0].expected.partition(":")
    nodes = list(dict.fromkeys(one.node for one in facts))
    if not least.isdecimal() or int(least) <= len(nodes) <= int(most or least):
        return []
    return [f"{facts[0].expected} nodes were asked for, but there are {len(nodes)}: {listed(nodes)}"]


def clock_difference(facts: Sequence[NodeFacts]) -> str | None:
    """A sentence for a warning if clocks are further apart than `CLOCK_SECONDS`."""
    first, last = min(facts, key=lambda one: one.clock), max(facts, key=lambda one: one.clock)
    apart = last.clock - first.clock
    if apart <= CLOCK_SECONDS:
        return None
    return f"the clock of {last.node} is {apart:.0f} s ahead of that of {first.node}; logs will not line up"


def listed(names: Sequence[str]) -> str:
    """Names with commas, the last ones counted where there are many."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


# ----- the network -----


def nearest_folder(path: str) -> str:
    """`path`, or the nearest folder above it that exists."""
    here = os.path.abspath(os.path.expanduser(path))
    while not os.path.isdir(here):
        here = os.path.dirname(here)
    return here


def about_host(config: Any, settings: Mapping[str, Any], port: int | None) -> dict[str, Any]:
    """What a launch script asks a host before the start, in JSON's types."""
    folder = nearest_folder(config.run.output_dir)
    return {
        "host": socket.gethostname(),
        "python": sys.executable,
        "versions": versions(),
        "options": flat(config, settings),
        "clock": time.time(),
        "port": None if port is None else port_problem(port),
        "folder": None if os.access(folder, os.W_OK) else folder,
    }
