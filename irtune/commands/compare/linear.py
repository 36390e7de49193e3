"""The row that is always there: a linear model, because a user must know whether the language model earns its cost.

TF-IDF of the removed and of the added words, logistic (of values, ridge) regression. The one of eight settings with
the best dev macro-F1 (of values, correlation) is reported, so that nobody compares with a weak one.
"""

import itertools
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer

from irtune.data import Corpus, Example
from irtune.evaluation.metrics import Predictions, metrics

GRID = tuple(itertools.product((1, 2), (1.0, 10.0), (None, "balanced")))


@dataclass(frozen=True)
class LinearResult:
    """Metrics by split, as a run's results.json has them, the setting that was chosen and the seconds of all eight.

    rows: examples that it was fitted to.
    """

    metrics: dict[str, dict[str, Any]]
    setting: dict[str, Any]
    seconds: float
    rows: int = 0


def changed_words(example: Example) -> tuple[str, str]:
    """Words that only the text before has, and words that only the text after has; of a single text, all its words."""
    before, after = Counter(example.before.split()), Counter((example.after or "").split())
    return " ".join((before - after).elements()), " ".join((after - before).elements())


def linear_baseline(corpus: Corpus) -> LinearResult:
    """Fit all settings on the training split; the best on dev is evaluated on the other splits."""
    started = time.perf_counter()
    words = {split: list(zip(*map(changed_words, examples))) for split, examples in corpus.splits.items()}
    task, labels = corpus.task, np.array(_targets(corpus, "train"))
    features = {longest: _features(words, longest) for longest in {longest for longest, _, _ in GRID}}
    fitted = []
    for longest, c, class_weight in GRID:
        model = task.linear(c, class_weight)
        fitted.append((model.fit(features[longest]["train"], labels), features[longest]))
    scores = [_metrics(model, matrices["dev"], corpus, "dev") for model, matrices in fitted]
    best = max(range(len(GRID)), key=lambda i: scores[i][task.main])
    model, matrices = fitted[best]
    results = {split: _metrics(model, matrices[split], corpus, split) for split in corpus.splits if split != "train"}
    setting = dict(zip(("ngrams", "C", "class_weight"), GRID[best]))
    return LinearResult(results, setting, time.perf_counter() - started, len(labels))


def _features(words: dict[str, list[tuple[str, ...]]], longest: int) -> dict[str, csr_matrix]:
    """Both sides' TF-IDF of n-grams up to `longest` words, side by side; a side without a word has no columns."""
    sides = [side for side in range(2) if any(text.strip() for text in words["train"][side])]
    vectorizers = {side: TfidfVectorizer(ngram_range=(1, longest)).fit(words["train"][side]) for side in sides}
    return {
        split: csr_matrix(hstack([vectorizers[side].transform(texts[side]) for side in sides]))
        for split, texts in words.items()
    }


def _targets(corpus: Corpus, split: str) -> list[Any]:
    return [corpus.task.target(example.label, len(corpus.labels)) for example in corpus.splits[split]]


def _metrics(model: Any, matrix: csr_matrix, corpus: Corpus, split: str) -> dict[str, Any]:
    scores = corpus.task.linear_logits(model, matrix, len(corpus.labels))
    return metrics(Predictions(scores, torch.tensor(_targets(corpus, split)), corpus.task), corpus.labels)
