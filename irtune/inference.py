"""A finished run, ready to predict: base model, adapter, tokenizer and labels from its folder."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from irtune.adapters import load_adapter
from irtune.config import Config, load_config
from irtune.data import Encoder, Example
from irtune.errors import RunError
from irtune.evaluation import Predictions, predict
from irtune.models import Classifier, load_classifier


def read_run(folder: Path) -> tuple[Config, dict[str, Any]]:
    """Configuration and results of a finished run.

    Raises:
        RunError: when `folder` is no run, or a run that is not finished.
    """
    if not (folder / "config.yaml").is_file():
        raise RunError(
            f"{folder} is no run folder: it has no config.yaml; accepted: what run.output_dir was in training"
        )
    config = load_config(["--config", str(folder / "config.yaml")])
    if not (folder / "results.json").is_file():
        latest = folder / "checkpoints" / "latest"
        reached = f"its last checkpoint is {latest.read_text().strip()}" if latest.is_file() else "it has no checkpoint"
        raise RunError(
            f"the run in {folder} is not finished, {reached}; go on with: train.py --config {folder / 'config.yaml'}"
        )
    return config, json.loads((folder / "results.json").read_text(encoding="utf-8"))


@dataclass
class LoadedRun:
    """What predicts. `model` takes a batch without labels and returns an object with `logits` [batch, classes]."""

    folder: Path
    config: Config
    results: dict[str, Any]
    labels: list[str]
    classifier: Classifier
    model: nn.Module
    encoder: Encoder
    device: torch.device

    def predict(self, examples: Sequence[Example], batch_size: int) -> Predictions:
        """Logits of `examples` in their order, whatever the batches and ranks. Collective."""
        return predict(
            lambda batch: self.model(**batch).logits,
            [self.encoder.encode(example) for example in examples],
            [example.label for example in examples],
            len(self.labels),
            batch_size=batch_size,
            pad_token_id=int(self.classifier.tokenizer.pad_token_id),  # type: ignore[arg-type]
            device=self.device,
        )


def load_run(folder: Path, device: torch.device, dtype: str | None = None) -> LoadedRun:
    """Load the model of a finished run to `device`, in the number format it was trained in or in `dtype`.

    Raises:
        RunError: when `folder` holds no finished run.
        ModelError, CheckpointError: when the base model or the adapter cannot be loaded.
    """
    config, results = read_run(folder)
    labels = list(results["dev"]["per_class"])
    model_config = config.model if dtype is None else dataclasses.replace(config.model, dtype=dtype)  # type: ignore[arg-type]
    classifier = load_classifier(model_config, labels)
    encoder = Encoder(classifier.tokenizer, config.data, labels)
    if is_peft_adapter(folder / "adapter"):
        model: nn.Module = PeftModel.from_pretrained(classifier.model, str(folder / "adapter"))  # type: ignore[arg-type]
    else:
        model = load_adapter(classifier, folder / "adapter")
    return LoadedRun(folder, config, results, labels, classifier, model.eval().to(device), encoder, device)


def is_peft_adapter(folder: Path) -> bool:
    """Whether `folder` holds an adapter in peft's format, and not in irtune's own.

    Raises:
        RunError: when it holds none.
    """
    try:
        record = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{folder} holds no adapter: {error}") from error
    return "peft_type" in record
