"""Folders of finished runs, as far as prediction needs them, without the training."""

import json
from pathlib import Path
from typing import Any

import torch

from irtune.adapters.build import add_adapters
from irtune.config import write_config
from irtune.data import corpus_digest, read_corpus
from irtune.models import load_classifier
from tests.support.tiny import tiny_config


def finished_run(folder: Path, model: Path, corpus: Path, seed: int = 0, **overrides: Any) -> Path:
    """A run with LoRA and a head of random values, drawn by `seed`: other seeds predict other things."""
    config = tiny_config(model, corpus, folder, **overrides)
    data = read_corpus(config.data)
    classifier = load_classifier(config.model, data.labels)
    module, table = add_adapters(classifier, config.adapter)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in table.all():
            parameter.normal_(std=0.3, generator=generator)
    module.save_pretrained(folder / "adapter")
    write_config(config, folder / "config.yaml")
    results = {
        "steps": 1,
        "corpus_sha256": corpus_digest(data),
        "dev": {"per_class": {label: {"f1": 0.0} for label in data.labels}},
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder
