"""Bad inputs, one `Case` each: what it is, how it is made, what the user is told. They make docs/bad-inputs.md.

python -m tests.bad_input > docs/bad-inputs.md
"""

from tests.bad_input import adapters, checkpoints, configuration, corpora, engine_files, models, spreadsheets
from tests.bad_input.case import Case

SECTIONS: dict[str, list[Case]] = {
    "Configuration": configuration.CASES,
    "DeepSpeed file": engine_files.CASES,
    "Corpus: text files": corpora.CASES,
    "Corpus: .xlsx, .parquet and the hub": spreadsheets.CASES,
    "Model": models.CASES,
    "Checkpoint": checkpoints.CASES,
    "Finished run and its adapter": adapters.CASES,
}
CASES = {case.name: case for cases in SECTIONS.values() for case in cases}
INTRODUCTION = """# Bad inputs

Each row is a test: `tests/test_bad_input.py` makes the input, starts the command in an empty folder, and checks that
the exit status is 2, that the message on standard error has these words (dots stand for names, numbers and more words),
that there is no traceback, that no file was written or changed, and that nothing in the input was executed. Rows with
"handled" succeed: the test compares what was read. Rows with a number of MiB run in a process of their own, whose
memory may grow by no more than that.

The page is made: `python -m tests.bad_input > docs/bad-inputs.md`.
"""


def page() -> str:
    """The text of docs/bad-inputs.md."""
    parts = [INTRODUCTION]
    for title, cases in SECTIONS.items():
        rows = []
        for case in cases:
            said = f"handled: {case.told}" if case.handled else f"`{case.told}`"
            limit = "" if case.most_mib is None else f" ({case.most_mib} MiB)"
            rows.append(
                "| " + " | ".join(cell.replace("|", "\\|") for cell in (case.name + limit, case.where, said)) + " |"
            )
        parts.append("\n".join([f"## {title}", "", "| input | where it is caught | what the user is told |",
                                "|---|---|---|", *rows, ""]))  # fmt: skip
    return "\n".join(parts)
