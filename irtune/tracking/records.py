"""Records of a run on disk: JSON lines."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from irtune.files import replacing, to_json, write_text


def keep_until(file: Path, step: int) -> None:
    """Leave out the records of `file` after `step`; a last line cut short by a kill goes too.

    So does the test split's: it is evaluated once more when the run ends, with the best step's number.
    """
    if not file.exists():
        return
    kept = []
    # Lines end with \n and with nothing else: a label may hold what Unicode calls a line break. A cut line may end in
    # the middle of a character.
    for line in file.read_bytes().decode("utf-8", "replace").split("\n"):
        try:
            record = json.loads(line)
            if record["step"] <= step and record.get("split") != "test":
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            break
    write_text(file, "".join(kept) if step else "")


def write_predictions(
    path: Path, ids: Sequence[str], labels: Sequence[Any], predictions: Sequence[dict[str, Any]]
) -> None:
    """Write predictions.jsonl: id, label, predicted and the probability of each label, one object per example.

    `labels` and `predictions` are in plain JSON types, as `Task.shown` and `Task.written` give them.
    """
    with replacing(path) as scratch, scratch.open("w", encoding="utf-8") as out:
        for example, label, found in zip(ids, labels, predictions):
            kept = {name: value for name, value in found.items() if name != "probability"}
            out.write(to_json({"id": example, "label": label} | kept) + "\n")


def append_record(file: Path, record: dict[str, Any]) -> None:
    """Add one JSON line to `file`."""
    with file.open("a", encoding="utf-8") as out:
        out.write(to_json(record) + "\n")
