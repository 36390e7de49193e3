"""Bad inputs, one `Case` each: what it is, how it is made, what the user is told."""

from tests.support.bad_input import adapters, checkpoints, configuration, corpora, engine_files, models, spreadsheets
from tests.support.bad_input.case import Case

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
