"""`python -m irtune data stats | baseline`: what a corpus holds, what is wrong with it, and what is easily reached."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from irtune.commands.common import add_json, parser, show, show_json, table
from irtune.config import Config, load_config
from irtune.data import Corpus, Encoder, Example, read_corpus
from irtune.evaluation.metrics import Predictions, metrics, predict
from irtune.models.classifier import load_classifier, load_tokenizer
from irtune.models.head_words import start_from_words


def main(arguments: Sequence[str]) -> int:
    """Print statistics, or what simple baselines reach."""
    options = parser(
        "data",
        "stats: rows, labels, lengths, duplicates and leakage between splits of a corpus. baseline: what the most "
        "frequent label, a linear model of the changed words and, with --model.head_init, an untrained head of words "
        "reach on dev. Columns and presets are set as for training (--data.preset, --data.before, ...). "
        "curate, terms and select have a --help of their own.",
        "python -m irtune data stats --data corpus/ --data.preset iterater-human",
        trainer=True,
    )
    options.add_argument("what", choices=["stats", "baseline"], help="what to show")
    options.add_argument("--data", metavar="PATH", help="the corpus; the same as --data.path")
    options.add_argument("--tokens", action="store_true", help="count tokens, and what data.max_length would shorten")
    add_json(options)
    given, trainer = options.parse_known_args(list(arguments))
    config = load_config(trainer if given.data is None else [*trainer, f"--data.path={given.data}"])
    corpus = read_corpus(config.data)
    if given.what == "baseline":
        rows = baselines(corpus)
        if config.model.head_init is not None:
            rows["head of words, before any training"] = untrained(config, corpus)
        show_json(rows) if given.json else show(_compared(rows, list(corpus.task.headline)))
        return 0
    found = statistics(corpus)
    if given.tokens:
        encoder = Encoder(load_tokenizer(config.model), config.data, corpus.labels)
        for split, examples in corpus.splits.items():
            lengths = [encoder.length(example) for example in examples]
            over = sum(length > config.data.max_length for length in lengths)
            found["splits"][split]["tokens"] = _quantiles(lengths) | {"shortened": over}
    show_json(found) if given.json else show(_text(found, corpus.labels))
    return 0


def baselines(corpus: Corpus) -> dict[str, dict[str, Any]]:
    """Metrics on dev of the most frequent training label, and of a linear model of the words that were changed."""
    from irtune.commands.compare.linear import linear_baseline  # loads scikit-learn, which statistics do not need

    task, classes, dev = corpus.task, len(corpus.labels), corpus.splits["dev"]
    title, row = task.baseline([example.label for example in corpus.splits["train"]], corpus.labels)
    labels = torch.tensor([task.target(example.label, classes) for example in dev])
    return {
        title: metrics(Predictions(row.expand(len(dev), -1), labels, task), corpus.labels),
        "linear model of changed words": linear_baseline(corpus).metrics["dev"],
    }


def untrained(config: Config, corpus: Corpus) -> dict[str, Any]:
    """Metrics on dev of the model with the head that model.head_init makes, before any training."""
    classifier = load_classifier(config.model, corpus.labels)
    start_from_words(classifier, config.model, corpus.labels)
    encoder = Encoder(classifier.tokenizer, config.data, corpus.labels)
    found = predict(
        lambda batch: classifier.model.eval()(**batch).logits,
        [encoder.encode(example) for example in corpus.splits["dev"]],
        [example.label for example in corpus.splits["dev"]],
        len(corpus.labels),
        batch_size=config.optim.micro_batch_size,
        pad_token_id=int(classifier.tokenizer.pad_token_id),  # type: ignore[arg-type]
        device=torch.device("cpu"),
        task=corpus.task,
    )
    return metrics(found, corpus.labels)


def _compared(rows: dict[str, dict[str, Any]], names: list[str]) -> str:
    return table(["on dev", *names], [[row, *(f"{found[name]:.3f}" for name in names)] for row, found in rows.items()])


def statistics(corpus: Corpus) -> dict[str, Any]:
    """Counts of a corpus in plain JSON types; duplicates and leakage by pair of texts and by document."""
    splits = {split: _split(examples, corpus) for split, examples in corpus.splits.items()}
    pairs: dict[tuple, set[str]] = defaultdict(set)
    documents: dict[str, set[str]] = defaultdict(set)
    for split, examples in corpus.splits.items():
        for example in examples:
            pairs[example.before, example.after, example.context].add(split)
            if example.group is not None:
                documents[example.group].add(split)
    shared = [places for places in pairs.values() if len(places) > 1]
    return {
        "labels": corpus.labels,
        "splits": splits,
        "pairs_in_several_splits": len(shared),
        "documents_in_several_splits": sum(len(places) > 1 for places in documents.values()) if documents else None,
    }


def _split(examples: Sequence[Example], corpus: Corpus) -> dict[str, Any]:
    seen: dict[tuple, list] = defaultdict(list)
    for example in examples:
        seen[example.before, example.after, example.context].append(example.label)
    contexts = [example.context for example in examples if example.context is not None]
    repeated = [numbers for numbers in seen.values() if len(numbers) > 1]
    counts = Counter(number for example in examples for number in corpus.task.numbers(example.label))
    return {
        "rows": len(examples),
        "labels": {name: counts[number] for number, name in enumerate(corpus.labels)},
        "characters_before": _quantiles([len(example.before) for example in examples]),
        "characters_after": _quantiles([len(example.after or "") for example in examples]),
        **({"characters_context": _quantiles(list(map(len, contexts)))} if contexts else {}),
        "empty_before": sum(not example.before for example in examples),
        "empty_after": sum(example.after == "" for example in examples),
        "unchanged": sum(example.before == example.after for example in examples),
        "duplicates": sum(len(numbers) - 1 for numbers in repeated),
        "contradictions": sum(len(set(numbers)) > 1 for numbers in repeated),
    }


def _quantiles(values: Sequence[int]) -> dict[str, float]:
    median, high = np.quantile(values, [0.5, 0.99])
    return {"mean": float(np.mean(values)), "median": float(median), "p99": float(high), "longest": int(max(values))}


def _text(found: dict[str, Any], labels: Sequence[str]) -> str:
    splits = found["splits"]
    header = ["", *splits]
    rows = [["rows", *(str(values["rows"]) for values in splits.values())]]
    rows += [[f"  {label}", *(str(v["labels"][label]) for v in splits.values())] for label in labels]
    for name in ("characters_before", "characters_after", "characters_context", "tokens"):
        if all(name in values for values in splits.values()):
            for part in ("median", "p99", "longest"):
                rows.append([f"{name.replace('_', ' ')}, {part}", *(f"{v[name][part]:.0f}" for v in splits.values())])
    if all("tokens" in values for values in splits.values()):
        rows.append(["shortened at max_length", *(str(v["tokens"]["shortened"]) for v in splits.values())])
    for name in ("empty_before", "empty_after", "unchanged", "duplicates", "contradictions"):
        rows.append([name.replace("_", " "), *(str(values[name]) for values in splits.values())])
    pairs, documents = found["pairs_in_several_splits"], found["documents_in_several_splits"]
    return "\n".join([
        table(header, rows),
        "",
        f"leakage: {pairs} {'pair of texts is' if pairs == 1 else 'pairs of texts are'} in more than one split; "
        + ("documents unknown (set data.group to their column)" if documents is None else
           f"{documents} {'document is' if documents == 1 else 'documents are'}"),
        "duplicates: the same pair again; contradictions: the same pair with different labels",
    ])  # fmt: skip
