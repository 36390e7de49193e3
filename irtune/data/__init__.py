"""Corpora, prompts and batches."""

from irtune.data.batches import BatchSampler, build_sampler, collate, evaluation_batches, total_steps
from irtune.data.corpus import Corpus, Example, corpus_digest, read_corpus, read_split
from irtune.data.prompts import Encoder
from irtune.data.readers.tables import NumberedRows, parse_json_lines, read_table
from irtune.data.token_cache import TokenCache, encoder_digest

__all__ = [
    "BatchSampler",
    "Corpus",
    "Encoder",
    "Example",
    "NumberedRows",
    "TokenCache",
    "build_sampler",
    "collate",
    "corpus_digest",
    "encoder_digest",
    "evaluation_batches",
    "parse_json_lines",
    "read_corpus",
    "read_split",
    "read_table",
    "total_steps",
]
