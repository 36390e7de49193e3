"""Corpora, prompts and batches."""

from irtune.data.batches import BatchPlan, collate, evaluation_batches, plan_batches
from irtune.data.corpus import Corpus, Example, corpus_digest, read_corpus, read_split
from irtune.data.prompts import Encoder
from irtune.data.readers.tables import NumberedRows, parse_json_lines, read_table

__all__ = [
    "BatchPlan",
    "Corpus",
    "Encoder",
    "Example",
    "NumberedRows",
    "collate",
    "corpus_digest",
    "evaluation_batches",
    "parse_json_lines",
    "plan_batches",
    "read_corpus",
    "read_split",
    "read_table",
]
