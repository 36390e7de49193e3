"""A model's parameters, and the tensors of one step, counted on the meta device: no weights are there."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from irtune.adapters import LayerTable, adapter_traits, add_adapters
from irtune.config import Config
from irtune.config.batch_size import longest_micro_batch
from irtune.config.declarations import adapter_kinds, methods
from irtune.engine.recompute import Recompute
from irtune.errors import ConfigError, IrtuneError, ModelError, one_line
from irtune.memory.meta_attention import stand_in, traceable, without_values
from irtune.memory.meta_step import Step, evaluation_bytes, training_step
from irtune.models import DTYPES, Classifier, RunFacts
from irtune.models.anatomy import is_linear
from irtune.models.classifier import load_tokenizer
from irtune.models.kernels import shorten_on_cpus
from irtune.models.skeleton import empty_classifier
from irtune.selection.registry import build_chooser, largest_selection

LABELS = 5  # where neither the corpus nor data.labels names them: a few rows of the head more or less
EVALUATION_ROWS = 2  # an evaluation batch, in micro-batches, as the trainer has it


@dataclass(frozen=True)
class Parts:
    """Counts of a model: elements of the whole model, bytes of one step of one rank.

    linear: elements of each constant linear module in the layers, which quantisation shrinks. outputs: sum of their
    output dimensions. rest: other constant elements.
    layers: for each layer, the elements of each trainable parameter. head: those of the head.
    selected: the layers that train.
    rows: examples of the micro-batch. kept: bytes that its forward pass keeps for the backward pass. peak: the most
    alive at a time in either. scoring: the same in a step that scores all layers (0: there is none). evaluation: in an
    evaluation batch. per_row: what another example adds to the largest of these three (0: not counted).
    weight_bytes, trained_bytes: bytes of an element of the base, and of adapters and head.
    device: cuda or cpu. assumed: what could not be known, in sentences.
    """

    linear: list[int]
    outputs: int
    rest: int
    layers: list[list[int]]
    head: list[int]
    selected: list[int]
    rows: int
    kept: int
    peak: int
    scoring: int
    evaluation: int
    per_row: float
    weight_bytes: int
    trained_bytes: int
    device: str
    assumed: tuple[str, ...] = ()

    @property
    def constant(self) -> int:
        """Elements that never train."""
        return sum(self.linear) + self.rest


def count(
    config: Config,
    selected: Sequence[int] | None = None,
    *,
    device: str = "cuda",
    labels: Sequence[str] = (),
    slope: bool = True,
) -> Parts:
    """Count the model of `config` with its adapters, and one step in which `selected` layers train.

    Args:
        config: of the run.
        selected: None: as `worst_selection` says.
        device: cuda or cpu, where other attention kernels run.
        labels: of the corpus, where it has been read.
        slope: count a larger micro-batch too, for `Parts.per_row`.

    Raises:
        ConfigError, ModelError: as for a run whose model is there; and for a model that cannot be made, or cannot read
            a batch, without its weights.
    """
    try:
        with without_values():
            return _count(config, selected, device, labels, slope)
    except IrtuneError:
        raise
    except Exception as error:  # models bring their own code, which may look at values that are not there
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ModelError(f"{config.model.name_or_path} cannot be counted without weights ({reason})") from error


def _count(config: Config, selected: Sequence[int] | None, device: str, labels: Sequence[str], slope: bool) -> Parts:
    """As `count`."""
    adapter, wanted = config.adapter, config.model.attn_implementation
    kind = adapter_kinds()[adapter.type]
    if kind.attention not in ("", wanted):
        raise ConfigError(f"adapter.type {adapter.type} needs model.attn_implementation {kind.attention}, not {wanted}")
    given = config.data.labels
    names = list(labels) or list(dict.fromkeys(given.values() if isinstance(given, dict) else given or ()))
    assumed = () if names else (f"{LABELS} labels, since the corpus is not read; data.labels can name them",)
    names = names or [f"label {number}" for number in range(LABELS)]
    dtype = DTYPES[config.model.dtype]
    model, anatomy = empty_classifier(config.model, names, lambda kind: stand_in(wanted, dtype, device, kind))
    if device == "cpu":
        shorten_on_cpus(model, compiled=config.model.compile)
    buffers = {id(buffer) for buffer in model.buffers()}
    layers = [module for layer in model.get_submodule(anatomy.layers).children() for module in layer.modules()]
    linear = [module for module in layers if is_linear(module)]
    # L-Tuning trains on the tokens of the labels; for other types, nothing of a tokenizer matters.
    tokenizer: Any = SimpleNamespace(pad_token_id=0, cls_token_id=None)
    if kind.reads_labels:
        tokenizer = load_tokenizer(config.model)
    if kind.shapes_of:  # its first values come from weights that are not here
        adapter = dataclasses.replace(adapter, type=kind.shapes_of)
    with torch.device("meta"), traceable(model):
        network, table = add_adapters(Classifier(model, tokenizer, anatomy, RunFacts.of(config)), adapter)
    trained = {id(parameter) for _, parameter in table.all()}
    constant = [parameter for parameter in network.parameters() if id(parameter) not in trained]
    layer_numbers = sum(parameter.numel() for layer in table.layers for _, parameter in layer)
    # Random matrices of vera; decisions of sparse, with their statistics; places of shira.
    added = sum(buffer.nbytes for buffer in network.buffers() if id(buffer) not in buffers)
    added += sum(tensor.nbytes for _, tensor in table.decided()) + kind.index_bytes * layer_numbers
    own_weights = adapter_traits(adapter).pretrained
    itemsize = dtype.itemsize
    weights = [] if own_weights else [int(module.weight.numel()) for module in linear]
    some = [number for number, layer in enumerate(table.layers) if layer]
    chosen = worst_selection(config, some, table.num_layers) if selected is None else list(selected)
    return Parts(
        linear=weights,
        outputs=0 if own_weights else sum(_outputs(module) for module in linear),
        rest=sum(parameter.numel() for parameter in constant) - sum(weights) + added // itemsize,
        layers=[[parameter.numel() for _, parameter in layer] for layer in table.layers],
        head=[parameter.numel() for _, parameter in table.head],
        selected=chosen,
        weight_bytes=itemsize,
        trained_bytes=table.head[0][1].element_size(),
        device=device,
        assumed=assumed,
        **_steps(config, network, table, chosen, slope),
    )


def _outputs(module: nn.Module) -> int:
    """Output dimensions of a linear module."""
    return int(module.out_features if isinstance(module, nn.Linear) else module.nf)  # type: ignore[arg-type]


def worst_selection(config: Config, layers: Sequence[int], num_layers: int) -> list[int]:
    """As many of `layers`, which have parameters, as the method may train at a time, the lowest among them.

    The lowest layer ends the backward pass: no selection keeps more activations.

    Raises:
        ConfigError: for a budget or layers that the model has not.
    """
    tuning, count = config.tuning, len(layers)
    if adapter_kinds()[config.adapter.type].trains_all:
        return list(layers)
    if methods()[tuning.method].names_layers or not layers:
        sizes = [int(number in layers) for number in range(num_layers)]
        return build_chooser(tuning, num_layers, 0, sizes).first() or []
    most = largest_selection(tuning, count)
    return [layers[0], *layers[count - most + 1 :]]


def scores_all_layers(config: Config, num_layers: int) -> bool:
    """Whether some steps of a run over `num_layers` layers compute gradients of layers that do not train."""
    tuning = config.tuning
    if tuning.score in ("weight", "cosine"):  # which need none
        return False
    chooser = build_chooser(tuning, num_layers, 0)
    return chooser.needs_scores and (tuning.scores == "fresh" or chooser.first() is None)


def _steps(config: Config, network: nn.Module, table: LayerTable, selected: list[int], slope: bool) -> dict:
    """The fields of `Parts` about steps."""
    always = config.model.gradient_checkpointing
    recompute = Recompute(table.modules, reentrant=False, always=always, traits=adapter_traits(config.adapter))
    rows, length = longest_micro_batch(config), config.data.max_length

    def step(rows: int, scoring: bool = False) -> Step:
        return training_step(network, table, selected, recompute, rows=rows, length=length, scoring=scoring)

    largest: dict[str, Callable[[int], int]] = {
        "peak": lambda rows: step(rows).peak,
        "scoring": lambda rows: step(rows, scoring=True).peak,
        "evaluation": lambda rows: evaluation_bytes(network, rows=EVALUATION_ROWS * rows, length=length),
    }
    trained = step(rows)
    found = {"peak": trained.peak, "scoring": 0, "evaluation": largest["evaluation"](rows)}
    if scores_all_layers(config, table.num_layers) and len(selected) < table.num_layers:
        found["scoring"] = largest["scoring"](rows)
    name = max(found, key=lambda name: found[name])
    per_row = (largest[name](2 * rows) - found[name]) / rows if slope else 0.0
    return found | {"rows": rows, "kept": trained.kept, "per_row": per_row}
