"""`python -m irtune data terms`: words for each label, for model.head_init."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import yaml

from irtune.commands.common import a_path, at_least, parser, show
from irtune.config import load_config
from irtune.data import Example, read_corpus
from irtune.errors import ConfigError
from irtune.files import write_text, writing
from irtune.models import load_classifier
from irtune.models.head_words import Terms, term_tokens

WORD = re.compile(r"[^\W\d_]{3,}")
MOST_WORDS = 20_000  # of the training texts, the most frequent ones


def main(arguments: Sequence[str]) -> int:
    """Write the words of the training texts that are nearest to each label, with their cosines as scores."""
    options = parser(
        "data terms",
        "Propose words for each label: its name, and the words of the training texts nearest to it in the model's own "
        "embeddings, each for one label only. Read them, change them, and train with --model.head_init FILE; `data "
        "baseline --model.head_init FILE` says what they predict before any training.",
        "python -m irtune data terms --data.path corpus/ --data.prompt instruction --output terms.yaml",
        trainer=True,
    )
    options.add_argument("--count", type=at_least(1), default=10, help="words of a label, with its name (default 10)")
    options.add_argument("--output", type=a_path, help="YAML file (default: standard output)")
    given, trainer = options.parse_known_args(list(arguments))
    if given.output is not None and given.output.exists():
        raise ConfigError(f"--output {str(given.output)!r} exists; name a file that does not")
    config = load_config(trainer)
    corpus = read_corpus(config.data)
    classifier = load_classifier(config.model, corpus.labels)
    model: Any = classifier.model
    vectors = model.get_input_embeddings().weight.detach().float()

    def vector(text: str) -> torch.Tensor | None:
        ids = term_tokens(classifier.tokenizer, text)
        return vectors[ids].mean(0) if ids else None

    found = propose(corpus.labels, frequent_words(corpus.splits["train"]), vector, given.count)
    text = yaml.safe_dump(found, sort_keys=False, allow_unicode=True)
    if given.output is None:
        show(text.rstrip())
        return 0
    with writing(given.output):
        given.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(given.output, text)
    return 0


def frequent_words(examples: Iterable[Example]) -> list[str]:
    """Words of the texts in lower case, the most frequent first."""
    counts = Counter[str]()
    for example in examples:
        counts.update(WORD.findall(f"{example.before} {example.after or ''}".lower()))
    return [word for word, _ in counts.most_common(MOST_WORDS)]


def propose(
    labels: Sequence[str], words: Iterable[str], vector: Callable[[str], torch.Tensor | None], count: int
) -> Terms:
    """For each label its name (score 1) and the nearest of `words` with their cosines, `count` in all.

    A word goes to the label that it is nearest to, if its cosine is above 0.

    Args:
        labels: names; hyphens and underscores are read as spaces.
        words: candidates.
        vector: a text to its vector [width], or None where the model does not know it.
        count: of terms.

    Raises:
        ConfigError: for a label whose name the model does not know.
    """
    names = {label: re.sub(r"[-_]+", " ", label).lower() for label in labels}
    centres = [found for name in names.values() if (found := vector(name)) is not None]
    strange = [label for label, name in names.items() if vector(name) is None]
    if strange:
        raise ConfigError(
            f"the model's tokenizer knows no part of the label {strange[0]!r}; give it a name of words with data.labels"
        )
    known = [(word, found) for word in words if word not in names.values() and (found := vector(word)) is not None]
    terms: Terms = {label: {name: 1.0} for label, name in names.items()}
    if not known:
        return terms
    table = torch.nn.functional.normalize(torch.stack([found for _, found in known]), dim=1)
    cosines = table @ torch.nn.functional.normalize(torch.stack(centres), dim=1).T
    best, nearest = cosines.max(1)
    for place in best.argsort(descending=True, stable=True).tolist():
        own = terms[labels[int(nearest[place])]]
        if best[place] > 0 and len(own) < count:
            own[known[place][0]] = round(float(best[place]), 4)
    return terms
