"""What a bad input is, and the folder in which it is made."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
TRAIN = [
    {"before": "a b", "after": "a c", "label": "x"},
    {"before": "c", "after": "d", "label": "y"},
    {"before": "e f", "after": "e", "label": "x"},
    {"before": "g", "after": "h", "label": "y"},
]
DEV = [{"before": "a", "after": "b", "label": "x"}, {"before": "c", "after": "", "label": "y"}]


@dataclass(frozen=True)
class Box:
    """An empty folder to make inputs in, and good inputs to spoil copies of."""

    folder: Path
    llama: Path  # a tiny pretrained model
    lora: Path  # a finished run of it, with an adapter in peft's format
    bottleneck: Path  # another, with an adapter of irtune's own

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def lines(self, name: str, rows: Sequence[Row]) -> Path:
        return self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    def corpus(self, train: Sequence[Row] = TRAIN, dev: Sequence[Row] = DEV) -> Path:
        self.lines("corpus/train.jsonl", train)
        self.lines("corpus/dev.jsonl", dev)
        return self.folder / "corpus"

    def train(self, *options: str) -> list[str]:
        """A command that would train on a good model and corpus, if it were not for `options`."""
        good = ["--model.name_or_path", self.llama, "--model.dtype", "float32", "--run.output_dir", self.folder / "run",
                "--optim.micro_batch_size", "2", "--optim.max_steps", "1"]  # fmt: skip
        corpus = [] if any("data.path" in option for option in options) else ["--data.path", self.corpus()]
        return ["train", *map(str, good), *map(str, corpus), *options]

    def on(self, corpus: Path, *options: str) -> list[str]:
        return self.train("--data.path", str(corpus), *options)

    def stats(self, *options: str) -> list[str]:
        return ["data", "stats", "--json", "--data", str(self.folder / "corpus"), *options]

    def canary(self) -> str:
        """A shell command that nothing may run: it makes the file `executed`."""
        return f"touch {self.folder / 'executed'}"

    def python_canary(self) -> str:
        return f"open({str(self.folder / 'executed')!r}, 'w').close()\n"

    def snapshot(self) -> dict[str, Any]:
        """Every file below the folder, with what shows that it was touched."""
        return {
            os.path.join(place, name): os.lstat(os.path.join(place, name))[6:9:2]
            for place, folders, files in os.walk(self.folder)
            for name in [*folders, *files]
        }


@dataclass(frozen=True)
class Case:
    """A bad input.

    build: makes it and returns the command to start.
    told: words of the message, dots for the rest; or, where it is handled, how.
    check: for handled ones: gets standard output and the box.
    most_mib: MiB by which the process may grow.
    """

    name: str
    build: Callable[[Box], list[str]]
    told: str
    check: Callable[[str, Box], None] | None = None
    most_mib: int | None = None

    @property
    def handled(self) -> bool:
        return self.check is not None
