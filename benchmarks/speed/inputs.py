"""Models of random weights and corpora for benchmarks/speed, where the real ones do not matter."""

import json
import random
from pathlib import Path

import torch

from benchmarks.memory.cases import LABELS, SHAPES, save_model
from irtune.data.synthetic import write_corpus


def write_inputs(folder: Path, shape: str, tokens: int, device: str | None) -> tuple[Path, Path]:
    """Write a model of `shape` and a corpus; returns their folders.

    tokens: every text is at least that long, to be cut there; 0: the synthetic corpus with its own lengths.

    Raises:
        ValueError: for an unknown shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"--shape is {shape!r}; accepted: {', '.join(SHAPES)}")
    model, data = folder / shape, folder / f"corpus-{tokens}"
    if not (model / "config.json").is_file():
        save_model(model, shape, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if tokens:
        _write_long(data, tokens)
    else:
        write_corpus(data, train=240, dev=24, test=8)
    return model, data


def _write_long(folder: Path, tokens: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for split, count in (("train", 2000), ("dev", 100)):
        rows = []
        for number in range(count):
            before, after = (" ".join(rng.choice(("word", "other")) for _ in range(tokens)) for _ in range(2))
            label = LABELS[number % len(LABELS)]
            rows.append({"id": f"{split}-{number}", "before": before, "after": after, "label": label})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
