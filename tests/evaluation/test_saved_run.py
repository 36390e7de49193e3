"""A finished run that is loaded again predicts what its model predicted."""

import json

import pytest
import torch

from irtune.adapters import write_adapter
from irtune.adapters.build import add_adapters
from irtune.config import write_config
from irtune.data import Encoder, collate, read_corpus
from irtune.errors import RunError
from irtune.evaluation.saved_run import load_run
from irtune.models import load_classifier
from tests.support.tiny import tiny_config

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])  # in peft's format and in irtune's own
def test_a_loaded_run_has_the_logits_of_its_model(llama, corpus, tmp_path, kind):
    config = tiny_config(llama, corpus, tmp_path / "run", adapter__type=kind)
    data = read_corpus(config.data)
    classifier = load_classifier(config.model, data.labels)
    model, table = add_adapters(classifier, config.adapter)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # as if it had trained: adapters start without an effect
        for _, parameter in table.all():
            parameter.normal_(std=0.1, generator=generator)
    folder = tmp_path / "run"
    if kind == "lora":
        model.save_pretrained(folder / "adapter")
    else:
        write_adapter(folder / "adapter", {name: p.data for name, p in table.all()}, config.adapter, data.labels)
    write_config(config, folder / "config.yaml")
    with pytest.raises(RunError, match="is not finished"):
        load_run(folder, torch.device("cpu"))
    results = {"dev": {"per_class": {label: {"f1": 0.0} for label in data.labels}}}
    (folder / "results.json").write_text(json.dumps(results))

    examples = data.splits["dev"]
    encoder = Encoder(classifier.tokenizer, config.data, data.labels)
    batch = collate([encoder.encode(example) for example in examples], classifier.tokenizer.pad_token_id)
    with torch.no_grad():
        wanted = model.eval()(**batch).logits
    loaded = load_run(folder, torch.device("cpu"))
    assert loaded.labels == list(data.labels)
    torch.testing.assert_close(loaded.predict(examples, 4).logits, wanted, rtol=1e-4, atol=1e-5)
