"""What a run writes, irtune loads: tried before a run, with adapters that have left their first values."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from irtune.adapters import LayerTable, write_adapter
from irtune.config import Config, write_config
from irtune.config.declarations import adapter_kinds
from irtune.config.schema import RISKS
from irtune.errors import ModelError
from irtune.evaluation.saved_run import load_run
from irtune.files import write_json
from irtune.models import Classifier
from irtune.models.pooling import pooling_of

STIR = 0.05  # what parameters are moved by, in their own standard deviations and absolutely where they are all alike
TOLERANCE = 1e-2  # of logits, relative to the largest: the same products in the same format differ by less


@torch.no_grad()
def check_round_trip(
    config: Config,
    model: nn.Module,
    table: LayerTable,
    classifier: Classifier,
    labels: Sequence[str],
    texts: Sequence[dict[str, list[int]]],
) -> None:
    """Write `model` as a finished run does, load it as `evaluate` does, and compare the logits of `texts`.

    Loads the base a second time. The model's trainable parameters are changed for good.

    Args:
        config: of the run.
        model: with adapters.
        table: its trainable parameters.
        classifier: the base that the adapters were put into.
        labels: names of the classes.
        texts: encoded examples.

    Raises:
        ModelError: when the logits differ.
        RunError, CheckpointError: when what was written cannot be loaded.
    """
    generator = torch.Generator().manual_seed(0)
    for _, parameter in table.all():
        spread = float(parameter.float().std()) if parameter.numel() > 1 else 0.0
        noise = torch.randn(parameter.shape, generator=generator) * STIR * (spread or 1.0)
        parameter.add_(noise.to(parameter))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_config(config, folder / "config.yaml")
        write_json(folder / "results.json", {"dev": {"per_class": {label: {} for label in labels}}})
        _write(folder / "adapter", config, model, table, classifier, labels)
        loaded = load_run(folder, torch.device("cpu"), trusted=RISKS)
    wanted, found = (_logits(one, texts) for one in (model, loaded.model))
    apart = float((wanted - found).abs().max())
    if not apart <= TOLERANCE * max(1.0, float(wanted.abs().max())):
        raise ModelError(
            f"what a run with adapter.type {config.adapter.type} would write, irtune would not load as it was: logits "
            f"of {len(texts)} texts differ by {apart:.3g}; set adapter.type to lora, or model.pooling to class"
        )


def _write(
    folder: Path, config: Config, model: nn.Module, table: LayerTable, classifier: Classifier, labels: Sequence[str]
) -> None:
    """Adapters and head, in the format in which the engine writes them."""
    pooling = pooling_of(model)
    if pooling is not None or not adapter_kinds()[config.adapter.type].peft_format:
        tensors = {name: parameter.detach() for name, parameter in [*table.all(), *table.decided()]}
        write_adapter(folder, tensors, config.adapter, list(labels), pooling, classifier.run)
        return
    assert isinstance(model, PeftModel), f"{config.adapter.type} is not a model of peft, as it declares"
    model.save_pretrained(str(folder), save_embedding_layers=False)


def _logits(model: nn.Module, texts: Sequence[dict[str, list[int]]]) -> torch.Tensor:
    """Logits of each text by itself, fp32 [texts, classes]."""
    model.eval()
    rows = []
    for text in texts:
        batch = {name: torch.tensor([values]) for name, values in text.items()}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        rows.append(model(**batch).logits.float())
    return torch.cat(rows)
