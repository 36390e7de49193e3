"""`python -m irtune predict`: labels and probabilities for new texts."""

import csv
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from irtune.commands.common import a_path, add_run, parser, ranks, trusted
from irtune.data import Example, NumberedRows, parse_json_lines, read_table
from irtune.data.readers.cells import as_text, listed
from irtune.errors import ConfigError, DataError
from irtune.evaluation.saved_run import LoadedRun, load_run
from irtune.files import write_text, writing

OUTPUT_SUFFIXES = (".jsonl", ".csv", ".tsv")


def main(arguments: Sequence[str]) -> int:
    """Read texts, predict, write the input's columns with `predicted` and `probabilities`."""
    options = parser(
        "predict",
        "Label texts with a finished run. Input in any format of a corpus, or JSON lines on standard input (-); the "
        "columns are those of the run's configuration. Output: the input's columns with predicted, probability, and "
        "probabilities of all labels.",
        "python -m irtune predict --run runs/mine --input new.csv --output labelled.csv",
    )
    add_run(options)
    options.add_argument(
        "--input", required=True, type=_path_or_dash, help="file, or - for JSON lines on standard input"
    )
    options.add_argument(
        "--output", required=True, type=_path_or_dash, help=f"file ({', '.join(OUTPUT_SUFFIXES)}), or - for JSON lines"
    )
    options.add_argument("--before", help="column of the text before, where it is not the run's")
    options.add_argument("--after", help="column of the text after, where it is not the run's")
    given = options.parse_args(list(arguments))
    target = None if given.output == "-" else given.output
    if target is not None and target.suffix.lower() not in OUTPUT_SUFFIXES:
        raise ConfigError(f"--output {str(given.output)!r}: accepted: {', '.join(OUTPUT_SUFFIXES)}, or -")
    with ranks() as world:
        if given.input == "-" and world.size > 1:
            raise ConfigError("--input - is for one process: several ranks cannot share standard input; give a file")
        rows = _rows(given.input)
        run = load_run(given.run, world.device, trusted=trusted(given))
        columns = (given.before or run.config.data.before, given.after or run.config.data.after)
        examples = to_examples(rows, str(given.input), *columns)
        started = time.perf_counter()
        probabilities = run.predict(examples, given.batch_size).probabilities.tolist()
        seconds = time.perf_counter() - started
        if world.is_main:
            _write(target, rows, probabilities, run)
            sys.stderr.write(f"{len(rows)} examples in {seconds:.1f} s ({len(rows) / seconds:.1f} examples/s)\n")
    return 0


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


def to_examples(rows: NumberedRows, where: str, before: str, after: str | None) -> list[Example]:
    """Examples without labels from rows.

    Raises:
        DataError: for a column that is missing or a cell that is no text; names file, row and column.
    """
    examples = []
    for number, row in rows:
        texts = []
        for column in (before, after) if after is not None else (before,):
            if column not in row:
                known = f"columns: {listed(row)}; name others with --before and --after"
                raise DataError(f"{where}, row {number}: no column {column!r}; {known}")
            texts.append(as_text(row[column], f"{where}, row {number}, column {column!r}"))
        examples.append(Example(str(number), texts[0], texts[1] if after is not None else None, 0))
    return examples


def _write(target: Path | None, rows: NumberedRows, probabilities: list[list[float]], run: LoadedRun) -> None:
    """Write to `target`, complete or not at all; None: standard output."""
    records = []
    for (_, row), values in zip(rows, probabilities):
        best = max(range(len(values)), key=values.__getitem__)
        found = {"predicted": run.labels[best], "probability": round(values[best], 6)}
        records.append((row, found, dict(zip(run.labels, (round(value, 6) for value in values)))))
    if target is None or target.suffix.lower() == ".jsonl":
        lines = [json.dumps({**row, **found, "probabilities": every}, ensure_ascii=False, default=str) + "\n"
                 for row, found, every in records]  # fmt: skip
        if target is None:
            sys.stdout.writelines(lines)
            return
        text = "".join(lines)
    else:
        text = _table(records, run.labels, "\t" if target.suffix.lower() == ".tsv" else ",")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, text)


def _table(records: list[tuple[dict, dict, dict]], labels: list[str], delimiter: str) -> str:
    """Columns of the input, then the prediction, then a column p_LABEL for each label."""
    names = dict.fromkeys(name for row, _, _ in records for name in row)
    header = [*names, "predicted", "probability", *(f"p_{label}" for label in labels)]
    text = io.StringIO(newline="")
    writer: Any = csv.DictWriter(text, header, delimiter=delimiter)
    writer.writeheader()
    writer.writerows({**row, **found, **{f"p_{k}": v for k, v in every.items()}} for row, found, every in records)
    return text.getvalue()
