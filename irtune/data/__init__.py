"""Corpora, prompts and batches."""

from irtune.data.batches import BatchPlan, collate, evaluation_batches
from irtune.data.corpus import Corpus, Example, read_corpus
from irtune.data.prompts import Encoder

__all__ = ["BatchPlan", "Corpus", "Encoder", "Example", "collate", "evaluation_batches", "read_corpus"]
