"""Two nodes with two ranks each on this machine: what crosses the cable, and what a bad cable costs.

    python benchmarks/nodes.py          # needs root, for network namespaces; about 4 minutes on 2 cores

The nodes are network namespaces that a veth pair joins (tests/support/hosts.py), the model is tiny (6 layers of 32,
LoRA of
rank 64). Bytes are those of the frames at the interface between two steps, so start and end are not in them; the plan
is that of irtune's planner for the layers that were trained. Results go to benchmarks/results/nodes-cpu.json.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PACKAGES = ("torch", "deepspeed")
STAGES = (0, 1, 2, 3)
CABLES = (("plain", 0.0, 0.0), ("20 ms there and back", 0.01, 0.0), ("1 % lost", 0.0, 0.01), ("both", 0.01, 0.01))


def measure(stage: int, delay: float, loss: float, last: int) -> dict[str, Any]:
    """One run on two nodes; counts from the end of step 2 to that of step `last`. Losses are of all these steps."""
    from tests.support import hosts, rank_server, tiny
    from tests.support.node_jobs import count_traffic
    from tests.support.runs import losses

    first = 2
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, corpus = tiny.save_model(folder / "model"), tiny.save_corpus(folder / "corpus")
        config = tiny.tiny_config(model, corpus, folder / "run", stage, adapter__r=64, optim__max_steps=last + 1,
                                  run__eval_every=last + 1)  # fmt: skip
        with rank_server.running(folder) as rank, hosts.joined("nodeA", "nodeB", delay=delay, loss=loss) as both:
            found = count_traffic(both, rank, config, folder, first, last)
        return found | {"steps": last - first, "losses": losses(folder / "run")[:last]}


def cases() -> Iterator[dict[str, Any]]:
    """Stages over a plain cable, then ZeRO 2 over others."""
    for stage in STAGES:
        yield {"stage": stage, "cable": "plain"} | measure(stage, 0.0, 0.0, 14)
    for name, delay, loss in CABLES:
        yield {"stage": 2, "cable": name, "delay": delay, "loss": loss} | measure(2, delay, loss, 8)


def table(rows: list[dict[str, Any]]) -> str:
    """Two tables in Markdown: bytes by stage, seconds by cable."""
    lines = ["| ZeRO | planned, kB per step | A to B | B to A | counted / planned |", "|---|---|---|---|---|"]
    stages, cables = [row for row in rows if "delay" not in row], [row for row in rows if "delay" in row]
    for row in stages:
        planned, sent = row["planned"] / row["steps"] / 1e3, [value / row["steps"] / 1e3 for value in row["sent"]]
        ratio = sum(sent) / 2 / planned
        lines.append(f"| {row['stage']} | {planned:,.0f} | {sent[0]:,.0f} | {sent[1]:,.0f} | {ratio:.3f} |")
    lines += ["", "| cable | seconds per step | losses |", "|---|---|---|"]
    for row in cables:
        same = "the same" if row["losses"] == cables[0]["losses"] else "DIFFERENT"
        lines.append(f"| {row['cable']} | {row['seconds'] / row['steps']:.2f} | {same} |")
    return "\n".join(lines)


def main() -> int:
    """Measure everything, write it, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="the JSON file", default=str(ROOT / "benchmarks/results/nodes-cpu.json"))
    file = Path(parser.parse_args().output)
    from tests import hosts

    reason = hosts.missing()
    if reason is not None:
        sys.stderr.write(f"error: {reason}\n")
        return 2
    rows = []
    for row in cases():
        rows.append(row)
        sys.stdout.write(f"ZeRO {row['stage']}, {row['cable']}: {row['seconds'] / row['steps']:.2f} s per step\n")
        sys.stdout.flush()
    found = {"nodes": 2, "ranks": 4, "versions": {name: metadata.version(name) for name in PACKAGES}}
    listed = ",\n  ".join(json.dumps(row) for row in rows)  # a case a line
    file.write_text(f'{json.dumps(found, indent=1)[:-2]},\n "cases": [\n  {listed}\n ]\n}}\n', encoding="utf-8")
    sys.stdout.write(f"\n{table(rows)}\n\nwritten to {file}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
