"""Whether a change made irtune slower: benchmarks.speed on an older commit and on this tree, by turns, in one table.

    IRTUNE_DATA=FOLDER python -m benchmarks.speed.before_after COMMIT --sides acg --rounds 3 --steps 6

COMMIT is checked out into a temporary worktree. What follows it goes to both benchmarks, after this tree's recipe;
irtune's options must be known to both, and paths be absolute. Only ratios are compared, since examples per second drift
with the machine: sides c, d and g are other packages, as each tree calls them. Exit status 1: a ratio of side a, b or h
to one of them fell by more than 5 %.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TURNS = 2  # of each tree
SAME = ("--recipe", str(ROOT / "benchmarks/speed/recipe.yaml"), "--evaluated", "0", "--starts", "0")
PLACES = ("IRTUNE_DATA", "IRTUNE_CACHE")
TOLERANCE = 0.05
OURS, PEERS = "abh", "cdg"


def main(arguments: Sequence[str]) -> int:
    """Measure both trees and print the table."""
    if not arguments or arguments[0].startswith("-"):
        sys.stderr.write("error: name the commit to compare with, then the options of benchmarks.speed\n")
        return 2
    commit, *options = arguments
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "before"
        added = subprocess.run(
            ["git", "worktree", "add", "--detach", str(tree), commit], cwd=ROOT, capture_output=True, text=True
        )
        if added.returncode:
            sys.stderr.write(f"error: {commit!r} cannot be checked out: {added.stderr.strip()}\n")
            return 2
        try:
            found: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
            for turn in range(TURNS):
                for name, place in (("before", tree), ("after", ROOT)):
                    found[name].append(measure(place, Path(scratch) / f"{name}{turn}.json", options))
        except subprocess.CalledProcessError as error:
            sys.stderr.write(f"error: the benchmark of {Path(error.cmd[-1]).stem} ended with {error.returncode}\n")
            return 2
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    before, after = (rounds(results) for results in found.values())
    if not before.keys() & after.keys():
        sys.stderr.write(f"error: no ratio to compare; --sides needs one of {OURS} and one of {PEERS}\n")
        return 2
    text, slower = table(before, after)
    sys.stdout.write(f"{text}\n")
    return int(slower)


def measure(tree: Path, output: Path, options: Sequence[str]) -> dict[str, Any]:
    """The result of the benchmark that `tree` has, in its place of then or of now.

    Raises:
        subprocess.CalledProcessError: where it fails.
    """
    now = (tree / "benchmarks" / "speed" / "__main__.py").is_file()
    program = ["-m", "benchmarks.speed"] if now else ["benchmarks/speed.py"]
    places = {name: str(Path(os.environ[name]).expanduser().resolve()) for name in PLACES if name in os.environ}
    command = [sys.executable, *program, *SAME, *options, "--output", str(output)]
    subprocess.run(command, cwd=tree, env=os.environ | places, check=True)
    return json.loads(output.read_text(encoding="utf-8"))


def rounds(results: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """By pair of sides, such as a/c: the ratio of examples per second in each round of all `results`."""
    found: dict[str, list[float]] = {}
    for result in results:
        rates = {
            side: [one["examples_per_second"] for one in entry["rounds"]] for side, entry in result["sides"].items()
        }
        for first in (side for side in OURS if side in rates):
            for second in (side for side in PEERS if side in rates):
                ratios = [one / other for one, other in zip(rates[first], rates[second], strict=True)]
                found.setdefault(f"{first}/{second}", []).extend(ratios)
    return found


def table(before: dict[str, list[float]], after: dict[str, list[float]]) -> tuple[str, bool]:
    """The ratios' medians of rounds as Markdown, and whether one that both have fell by more than the tolerance."""
    lines, slower = ["| ratio | before | after | change | |", "|---|---|---|---|---|"], False
    for pair in (pair for pair in before if pair in after):
        old, new = (statistics.median(values[pair]) for values in (before, after))
        fell = new < old * (1 - TOLERANCE)
        slower |= fell
        lines.append(f"| {pair} | {old:.3f} | {new:.3f} | {new / old - 1:+.1%} | {'slower' if fell else ''} |")
    return "\n".join(lines), slower


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
