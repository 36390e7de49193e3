"""What a run writes, irtune loads. `validate` tries it with adapters that have left their first values, and a run with
those of its first evaluation."""

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
from irtune.models.weights import elements

STIR = 0.05  # what parameters are moved by, in their own standard deviations and absolutely where they are all alike
TOLERANCE = 1e-2  # of logits, relative to the largest: the same products in the same format differ by less
TEXTS = 2  # that are read twice
# Parameters of a base that is loaded a second time within 2 s: SmolLM2-135M took 1.4 s on two cores, MPNet 0.9 s.
QUICKLY_LOADED = 200e6


def is_quickly_loaded(config: Config, model: nn.Module) -> bool:
    """Whether a run has the time to load its base a second time. A quantised one would have to be packed again."""
    return config.model.quantization == "none" and sum(map(elements, model.parameters())) < QUICKLY_LOADED


@torch.no_grad()
def check_round_trip(
    config: Config,
    model: nn.Module,
    table: LayerTable,
    classifier: Classifier,
    labels: Sequence[str],
    texts: Sequence[dict[str, list[int]]],
) -> None:
    """Write `model` as a finished run does, load it as `evaluate` does, and compare the logits of the first `texts`.

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
        write_as_trained(Path(place) / "adapter", config, model, table, classifier, labels)
        compare_loaded(Path(place), config, model, labels, texts)


@torch.no_grad()
def compare_loaded(
    folder: Path, config: Config, model: nn.Module, labels: Sequence[str], texts: Sequence[dict[str, list[int]]]
) -> None:
    """Make a run of `folder`, which holds `model`'s adapter, load it, and compare the logits of the first `texts`.

    Puts `model` into evaluation mode; draws no random number that somebody would miss.

    Raises:
        ModelError: when the logits differ.
        RunError, CheckpointError: when what was written cannot be loaded.
    """
    write_config(config, folder / "config.yaml")
    write_json(folder / "results.json", {"dev": {"per_class": {label: {} for label in labels}}})
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        loaded = load_run(folder, device, trusted=RISKS)
    wanted, found = (_logits(one, texts[:TEXTS]) for one in (model, loaded.model))
    apart = float((wanted - found).abs().max())
    if not apart <= TOLERANCE * max(1.0, float(wanted.abs().max())):
        raise ModelError(
            f"an adapter of type {config.adapter.type} is not what it was when it is loaded again: logits of "
            f"{len(wanted)} texts differ by {apart:.3g}; set adapter.type to lora, or model.pooling to class"
        )


def write_as_trained(
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
    device = next(model.parameters()).device
    rows = []
    for text in texts:
        batch = {name: torch.tensor([values], device=device) for name, values in text.items()}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        rows.append(model(**batch).logits.float())
    return torch.cat(rows)
