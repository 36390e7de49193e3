"""Folders of finished runs, as far as prediction needs them, without the training."""

import json
from pathlib import Path
from typing import Any

import torch

from irtune import __version__
from irtune.adapters.build import add_adapters
from irtune.config import write_config
from irtune.data import corpus_digest, read_corpus
from irtune.evaluation.round_trip import write_as_trained
from irtune.models import load_classifier
from tests.support.tiny import tiny_config


def finished_run(folder: Path, model: Path, corpus: Path, seed: int = 0, **overrides: Any) -> Path:
    """A run whose adapters and head have random values, drawn by `seed`: other seeds predict other things."""
    config = tiny_config(model, corpus, folder, **overrides)
    data = read_corpus(config.data)
    classifier = load_classifier(config.model, data.labels)
    module, table = add_adapters(classifier, config.adapter)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in table.all():
            parameter.normal_(std=0.3, generator=generator)
    write_as_trained(folder / "adapter", config, module, table, classifier, data.labels)
    write_config(config, folder / "config.yaml")
    results = {
        "steps": 1,
        "corpus_sha256": corpus_digest(data),
        "dev": dict.fromkeys(("accuracy", "macro_f1", "auprc"), 0.5)
        | {"examples": 1, "per_class": {label: {"f1": 0.0} for label in data.labels}},
        "steps_per_layer": [1] * len(table.layers),
        "num_layers": len(table.layers),
        "layers_trained_per_step": float(len(table.layers)),
        "versions": {"irtune": __version__},
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder
