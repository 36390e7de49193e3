"""What a run would write is loaded as `evaluate` loads it, and gives the same logits, or is refused."""

import pytest
import torch

from irtune.adapters import add_adapters
from irtune.config.checks import needed_mask
from irtune.data import Encoder, read_corpus
from irtune.errors import ModelError
from irtune.evaluation import round_trip
from irtune.evaluation.round_trip import check_round_trip
from irtune.models import RunFacts, load_classifier
from tests.support.tiny import tiny_config

pytestmark = pytest.mark.quick


def adapted(model, corpus, folder, **options):
    """The arguments of `check_round_trip` for a tiny model."""
    config = tiny_config(model, corpus, folder / "run", 0, **options)
    found = read_corpus(config.data)
    classifier = load_classifier(config.model, found.labels)
    classifier.run = RunFacts.of(config)
    encoder = Encoder(classifier.tokenizer, config.data, found.labels, mask=needed_mask(config.model))
    network, table = add_adapters(classifier, config.adapter)
    texts = [encoder.encode(example) for example in found.splits["train"][:2]]
    return config, network, table, classifier, found.labels, texts


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model__dtype": "bfloat16", "adapter__type": "pissa"},
        {"model__pooling": "mean+edit", "data__prompt": "diff", "model__head": "mlp"},
        {"adapter__type": "bottleneck"},
        {"adapter__type": "none", "tuning__method": "full"},
        {"adapter__type": "prompt", "tuning__method": "full"},
        {"adapter__type": "vera"},
        {"adapter__type": "lofit"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "lora",
)
def test_it_comes_back(bpe, corpus, tmp_path, options):
    check_round_trip(*adapted(bpe, corpus, tmp_path, **options))


def test_what_does_not_come_back_is_refused(bpe, corpus, tmp_path, monkeypatch):
    given = adapted(bpe, corpus, tmp_path, model__pooling="mean")
    first = {name: parameter.detach().clone() for name, parameter in given[2].all()}
    write = round_trip.write_adapter
    monkeypatch.setattr(round_trip, "write_adapter", lambda folder, tensors, *rest: write(folder, first, *rest))
    with pytest.raises(ModelError, match="of type lora is not what it was when it is loaded again: logits of 2"):
        check_round_trip(*given)
    assert not all(torch.equal(parameter, first[name]) for name, parameter in given[2].all())
