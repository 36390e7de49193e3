"""Corpora, prompts and batches."""

from irtune.data.augment import Augmenter, read_synonyms
from irtune.data.batches import (
    BatchSampler,
    build_sampler,
    collate,
    evaluation_batches,
    padded_lengths,
    total_steps,
)
from irtune.data.corpus import Corpus, Example, check_apart, corpus_digest, read_corpus, read_split
from irtune.data.prompts import Encoded, Encoder
from irtune.data.readers.tables import read_table

__all__ = [
    "Augmenter",
    "BatchSampler",
    "Corpus",
    "Encoded",
    "Encoder",
    "Example",
    "build_sampler",
    "check_apart",
    "collate",
    "corpus_digest",
    "evaluation_batches",
    "padded_lengths",
    "read_corpus",
    "read_split",
    "read_synonyms",
    "read_table",
    "total_steps",
]
