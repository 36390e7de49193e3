"""`python -m irtune predict`: labels and probabilities for new texts."""

import csv
import dataclasses
import io
import math
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from irtune.commands.common import a_path, add_run, parser, ranks, trusted
from irtune.config.schema import DataConfig
from irtune.data import Example
from irtune.data.readers.cells import as_text, listed
from irtune.data.readers.tables import NumberedRows, parse_json_lines, read_table
from irtune.errors import ConfigError, DataError
from irtune.evaluation.ensemble import Ensemble, open_runs
from irtune.evaluation.saved_run import LoadedRun
from irtune.files import to_json, write_text, writing
from irtune.tasks.base import Label

OUTPUT_SUFFIXES = (".jsonl", ".csv", ".tsv")
TEXTS = {"before": "text before", "after": "text after", "context": "context"}  # columns of a run's texts


def main(arguments: Sequence[str]) -> int:
    """Read texts, predict, write the input's columns with `predicted` and `probabilities`."""
    options = parser(
        "predict",
        "Label texts with a finished run, or with the mean of several (--run A --run B). Input in any format of a "
        "corpus, or JSON lines on standard input (-); the columns are those of the (first) run's configuration. "
        "Output: the input's columns with predicted, probability, and probabilities (in tables p_LABEL for each "
        "label); of a set of labels no single probability, and of a value predicted only. Where the input has a column "
        "of such a name, it is kept and the new ones end with _2.",
        "python -m irtune predict --run runs/mine --input new.csv --output labelled.csv",
    )
    add_run(options, several=True)
    options.add_argument(
        "--input", required=True, type=_path_or_dash, help="file, or - for JSON lines on standard input"
    )
    options.add_argument(
        "--output", required=True, type=_path_or_dash, help=f"file ({', '.join(OUTPUT_SUFFIXES)}), or - for JSON lines"
    )
    for name, what in TEXTS.items():
        options.add_argument(f"--{name}", help=f"column of the {what}, where it is not the run's")
    given = options.parse_args(list(arguments))
    target = None if given.output == "-" else given.output
    if target is not None and target.suffix.lower() not in OUTPUT_SUFFIXES:
        raise ConfigError(f"--output {str(given.output)!r}: accepted: {', '.join(OUTPUT_SUFFIXES)}, or -")
    if target is not None and given.input != "-" and _is_same_file(target, given.input):
        raise ConfigError(f"--output {str(target)!r} is the input, which would be written over; name another file")
    with ranks() as world:
        if given.input == "-" and world.size > 1:
            raise ConfigError("--input - is for one process: several ranks cannot share standard input; give a file")
        rows = _rows(given.input)
        if target is not None:
            _check_cells(rows, given.input, target)
        run = open_runs(given.run, world.device, trusted(given))
        for name, trained in (("after", "on single texts"), ("context", "without context")):
            if getattr(given, name) is not None and getattr(run.config.data, name) is None:
                raise ConfigError(
                    f"--{name} {getattr(given, name)!r}: the run was trained {trained} (data.{name} is null); leave it "
                    "out"
                )
        named = {name: getattr(given, name) for name in TEXTS if getattr(given, name) is not None}
        data = dataclasses.replace(run.config.data, **named)
        examples = to_examples(rows, str(given.input), data, run.task.blank)
        started = time.perf_counter()
        scores = run.predict(examples, given.batch_size).probabilities
        seconds = time.perf_counter() - started
        if world.is_main:
            _write(target, rows, [run.task.written(row, run.labels) for row in scores], run)
            counted = f"{len(rows)} example{'s' if len(rows) > 1 else ''}"
            sys.stderr.write(f"{counted} in {seconds:.1f} s ({len(rows) / seconds:.1f} examples/s)\n")
    return 0


def _is_same_file(target: Path, source: Path) -> bool:
    return target.exists() and source.exists() and target.samefile(source)


def _path_or_dash(text: str) -> Path | str:
    return text if text == "-" else a_path(text)


def _rows(source: Path | str) -> NumberedRows:
    if isinstance(source, Path):
        return read_table(source)
    try:
        rows = parse_json_lines(sys.stdin.read(), "standard input")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    if not rows:
        raise DataError("standard input has no rows; expected JSON lines such as "
                        '{"before": "I has a cat.", "after": "I have a cat."}')  # fmt: skip
    return rows


def _check_cells(rows: NumberedRows, source: Path | str, target: Path) -> None:
    """Raise a DataError for a cell of the input that a table `target` cannot hold, before the time is spent."""
    suffix = target.suffix.lower()
    if suffix == ".jsonl":
        return
    where = "standard input" if source == "-" else source
    for number, row in rows:
        for column, value in row.items():
            place = f"{where}, row {number}, column {column!r}"
            for text in (column, value if isinstance(value, str) else ""):
                if suffix == ".tsv" and ("\n" in text or "\r" in text):
                    raise DataError(f"{place}: a line break, which a .tsv file cannot hold; accepted: .jsonl or .csv")
                try:
                    text.encode()
                except UnicodeEncodeError:
                    what = f"half of a surrogate pair, which a {suffix} file cannot hold"
                    raise DataError(f"{place}: {what}; accepted: .jsonl") from None


def to_examples(
    rows: NumberedRows,
    where: str,
    data: DataConfig,
    label: Label = 0,
    advice: str = "",
) -> list[Example]:
    """Examples from rows, whose ids are the rows' numbers; their label, which nobody knows, is `label`.

    data: names the columns with their texts. advice: what to do about one that is missing; "": name another on the
    command line.

    Raises:
        DataError: for a column that is missing or a cell that is not text; names file, row and column.
    """
    options = ", ".join(f"--{name}" for name in TEXTS if getattr(data, name) is not None)
    examples = []
    for number, row in rows:
        texts: dict[str, Any] = {}
        for name in TEXTS:
            column = getattr(data, name)
            if column is not None and column not in row:
                known = f"columns: {listed(row)}; {advice or f'name others with {options}'}"
                raise DataError(f"{where}, row {number}: no column {column!r}; {known}")
            place = f"{where}, row {number}, column {column!r}"
            texts[name] = None if column is None else as_text(row[column], place)
        examples.append(Example(str(number), label=label, **texts))
    return examples


def _write(target: Path | None, rows: NumberedRows, found: list[dict[str, Any]], run: LoadedRun | Ensemble) -> None:
    """Write rows and what `Task.written` gave to `target`, complete or not at all; None: standard output."""
    lists = target is None or target.suffix.lower() == ".jsonl"
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    if not lists:
        found = [_flat(values, run.config.data.label_separator) for values in found]
    new = list(found[0])
    suffix = free_suffix(new, names)
    records = [
        row | {f"{name}{suffix}": value for name, value in values.items()} for (_, row), values in zip(rows, found)
    ]
    if suffix:
        kept = [name for name in new if name in names]
        columns = f"column {listed(kept)} is" if len(kept) == 1 else f"columns {listed(kept)} are"
        sys.stderr.write(f"the input's {columns} kept; the new ones are {listed(f'{name}{suffix}' for name in new)}\n")
    if target is None or lists:
        lines = [to_json(record, other=str) + "\n" for record in records]
        if target is None:
            sys.stdout.writelines(lines)
            return
        text = "".join(lines)
    else:
        header = [*names, *(f"{name}{suffix}" for name in new)]
        text = _table(header, records, "\t" if target.suffix.lower() == ".tsv" else ",")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, text)


def _flat(values: dict[str, Any], separator: str | None) -> dict[str, Any]:
    """A prediction as cells of a table: a set of labels as the run's corpus has it, a column for each probability."""
    flat = {name: value for name, value in values.items() if name != "probabilities"}
    if isinstance(flat["predicted"], list) and separator is not None:
        flat["predicted"] = separator.join(flat["predicted"])
    return flat | {f"p_{label}": value for label, value in values.get("probabilities", {}).items()}


def _table(header: list[str], records: list[dict[str, Any]], delimiter: str) -> str:
    """Columns of the input, then the prediction, then a column for each label."""
    text = io.StringIO(newline="")
    writer: Any = csv.DictWriter(text, header, delimiter=delimiter)
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in record.items()} for record in records)
    return text.getvalue()


def free_suffix(new: Sequence[str], taken: Collection[str]) -> str:
    """What the names `new` end with so that none of them is `taken`: nothing, or _2, _3 and so on."""
    suffix, number = "", 1
    while any(f"{name}{suffix}" in taken for name in new):
        number += 1
        suffix = f"_{number}"
    return suffix


def _cell(value: Any) -> Any:
    """A value in a table: lists and objects of JSON lines as JSON, what is not a number as an empty cell."""
    if isinstance(value, list | dict):
        return to_json(value, other=str)
    return "" if isinstance(value, float) and not math.isfinite(value) else value
