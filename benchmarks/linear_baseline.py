"""A linear model on the dev split of a corpus: TF-IDF of the removed and the added words, logistic regression.

python benchmarks/linear_baseline.py --data.preset iterater-human --data.path FOLDER
"""

import difflib
import json
import sys
import time

import torch
from scipy.sparse import hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from irtune.config import load_config
from irtune.data import Example, read_corpus
from irtune.evaluation import Predictions, metrics


def changed_words(example: Example) -> tuple[str, str]:
    """Words that only the text before has, and words that only the text after has."""
    before, after = example.before.split(), (example.after or "").split()
    removed: list[str] = []
    added: list[str] = []
    for tag, i, j, k, m in difflib.SequenceMatcher(a=before, b=after, autojunk=False).get_opcodes():
        if tag != "equal":
            removed += before[i:j]
            added += after[k:m]
    return " ".join(removed), " ".join(added)


def main() -> None:
    started = time.perf_counter()
    corpus = read_corpus(load_config(sys.argv[1:]).data)
    words = {split: list(zip(*map(changed_words, examples))) for split, examples in corpus.splits.items()}
    labels = {split: [example.label for example in examples] for split, examples in corpus.splits.items()}
    vectorizers = [TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(texts) for texts in words["train"]]
    features = {s: hstack([v.transform(t) for v, t in zip(vectorizers, texts)]) for s, texts in words.items()}
    model = LogisticRegression(C=10, class_weight="balanced", max_iter=2000).fit(features["train"], labels["train"])
    scores = torch.tensor(model.predict_log_proba(features["dev"]), dtype=torch.float32)
    result = metrics(Predictions(scores, torch.tensor(labels["dev"])), corpus.labels)
    majority = max(set(labels["train"]), key=labels["train"].count)
    result["majority_accuracy"] = labels["dev"].count(majority) / len(labels["dev"])
    result["seconds"] = round(time.perf_counter() - started, 1)
    names = ("examples", "accuracy", "macro_f1", "auprc", "majority_accuracy", "seconds")
    sys.stdout.write(json.dumps({name: result[name] for name in names}) + "\n")


if __name__ == "__main__":
    main()
