"""A linear model on the dev split of a corpus: TF-IDF of the removed and the added words, logistic regression.

Reports the best of eight settings by dev macro-F1, so that nobody compares with a weak one.

python -m benchmarks.linear_baseline --data.preset iterater-human --data.path FOLDER
"""

import itertools
import json
import sys
import time
from collections import Counter

import torch
from scipy.sparse import hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from irtune.config import load_config
from irtune.data import Corpus, Example, read_corpus
from irtune.evaluation import Predictions, metrics

GRID = tuple(itertools.product((1, 2), (1.0, 10.0), (None, "balanced")))


def changed_words(example: Example) -> tuple[str, str]:
    """Words that only the text before has, and words that only the text after has."""
    before, after = Counter(example.before.split()), Counter((example.after or "").split())
    return " ".join((before - after).elements()), " ".join((after - before).elements())


def evaluate(corpus: Corpus, longest: int, c: float, class_weight: str | None) -> dict:
    """Metrics on dev of one setting: n-grams up to `longest` words, inverse regularisation `c`, class weights."""
    words = {split: list(zip(*map(changed_words, examples))) for split, examples in corpus.splits.items()}
    labels = {split: [example.label for example in examples] for split, examples in corpus.splits.items()}
    vectorizers = [TfidfVectorizer(ngram_range=(1, longest)).fit(texts) for texts in words["train"]]
    features = {s: hstack([v.transform(t) for v, t in zip(vectorizers, texts)]) for s, texts in words.items()}
    model = LogisticRegression(C=c, class_weight=class_weight, max_iter=2000).fit(features["train"], labels["train"])
    scores = torch.tensor(model.predict_log_proba(features["dev"]), dtype=torch.float32)
    result = metrics(Predictions(scores, torch.tensor(labels["dev"])), corpus.labels)
    return {name: result[name] for name in ("examples", "accuracy", "macro_f1", "auprc")} | {
        "ngrams": longest,
        "C": c,
        "class_weight": class_weight,
    }


def main() -> None:
    started = time.perf_counter()
    corpus = read_corpus(load_config(sys.argv[1:]).data)
    best = max((evaluate(corpus, *setting) for setting in GRID), key=lambda result: result["macro_f1"])
    labels = {split: [example.label for example in corpus.splits[split]] for split in ("train", "dev")}
    majority = max(set(labels["train"]), key=labels["train"].count)
    best["majority_accuracy"] = labels["dev"].count(majority) / len(labels["dev"])
    best["seconds"] = round(time.perf_counter() - started, 1)
    sys.stdout.write(json.dumps(best) + "\n")


if __name__ == "__main__":
    main()
