"""A look at what was built, before anything is trained with it: nothing is believed, it is checked once.

Two texts of the corpus, a short one and a longer one, go through the model alone and padded in one batch. What comes
out must be the same; with irtune's own attention, the same as with the model's own; and with fresh adapters, the same
as without. What comes out is logits, or, under a pooled head, which starts at zero, what that head reads. A difference
that the rounding of few bits can make, or something else, is looked at again in fp32. One backward pass shows which
parameters get a gradient.
"""

import contextlib
import functools
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from irtune.adapters.table import LayerTable
from irtune.config import Config
from irtune.config.declarations import adapter_kinds, implementation
from irtune.config.schema import AdapterConfig
from irtune.data import collate
from irtune.distributed.partitioned import is_partitioned
from irtune.errors import ConfigError, IrtuneError, ModelError, one_line
from irtune.models import Classifier
from irtune.models.kernels import without_flash_on_cpu
from irtune.models.kernels.attention import CPU_ATTENTION, as_in_training
from irtune.models.limits import cannot_read, longest_input, longest_whole
from irtune.models.pooling import HEAD_NAME, pooling_of
from irtune.models.widening import in_fp32

log = logging.getLogger("irtune")
Text = Mapping[str, Sequence[int]]
Way = Callable[[Classifier, nn.Module, list[Mapping[str, Sequence[int]]]], torch.Tensor]  # to outputs of texts
SECONDS = 2.0  # what the guard may cost at the start of a run
PASSES = 10  # its forward passes, where a backward pass counts for two
MORE_PASSES = 9  # in fp32, where it looks again: of padding with and without adapters, and of irtune's attention
LONGEST = 32  # tokens of the longer text, if the corpus has such texts
# Largest difference of outputs, as a share of the largest output, that rounding is believed to make.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
SAME_SHAPE = {torch.float32: 1e-3, torch.bfloat16: 0.02, torch.float16: 0.01}  # of batches that round alike


@dataclass
class Guard:
    """What is known of a model without adapters.

    outputs: of the two texts, each alone, [2, classes or features]. hurried: there is no time to look again in fp32.
    """

    classifier: Classifier
    texts: list[Text]
    outputs: torch.Tensor
    hurried: bool = False

    def check(self, model: nn.Module, table: LayerTable, adapter: AdapterConfig) -> None:
        """Look at the model with its adapters.

        Raises:
            ModelError: when it computes something else than it should; names the setting to change.
        """
        kind, name = adapter_kinds()[adapter.type], type(self.classifier.model).__name__
        with _reading(self.classifier.model, kind.name):
            alone = _alone(self.classifier, model, self.texts)
            change = self.change(model, _alone, _together, alone)
        if kind.silent:
            changed = difference(alone, self.outputs)
            if changed > tolerance(self.classifier.model):
                other = "model.name_or_path to another model" if kind.name == "lora" else "adapter.type to lora"
                raise ModelError(
                    f"adapter.type {kind.name} changes what {name} computes before it is trained ({_share(changed)}): "
                    "the model reads weights of modules that it does not call, or draws random numbers; set "
                    f"adapter.target_modules to others, or {other}"
                )
        if change:
            raise _depends_on_padding(self.classifier, change, f"adapter.type {kind.name}: ")
        if kind.pretrained:  # their gradients would fill as much memory as the model
            return
        with _reading(self.classifier.model, kind.name):
            unmoved = _without_gradient(self.classifier, model, table, self.texts)
        if unmoved and kind.own_weights:
            log.warning("%s: %s (%d such weights) get no gradient and stay as they are", name, unmoved[0], len(unmoved))
        elif unmoved:
            raise ModelError(
                f"adapter.type {kind.name}: {unmoved[0]} ({len(unmoved)} such parameters) gets no gradient in "
                f"{name}; set adapter.target_modules to modules that the model calls"
            )

    def allows_packing(self, model: nn.Module, *, insist: bool) -> bool:
        """Whether the model computes the same when its layers do without padding, for which they are ready.

        Raises:
            ModelError: where it does not and the user did `insist`; else a line of the log says so.
        """
        name = type(self.classifier.model).__name__
        try:
            change = self.change(model, _alone, functools.partial(_together, packed=True))
            reason = f"{name} computes something else without padding ({_share(change)})"
        except Exception as error:  # a layer that takes something of every token that nobody knew of
            change, reason = float("inf"), f"{name} cannot compute without padding ({one_line(error)})"
        if not change:
            return True
        if insist:
            raise ModelError(f"{reason}; set data.padding_free to false")
        log.info("data.padding_free: %s; texts are padded", reason)
        return False

    def change(self, model: nn.Module, one: Way, other: Way, found: torch.Tensor | None = None) -> float:
        """How far apart the outputs of two ways are that should be the same, or 0 where rounding explains it.

        `found`: those of `one`, where they are known.
        """
        given = self.classifier, model, self.texts
        change = difference(one(*given) if found is None else found, other(*given))
        if change > tolerance(self.classifier.model):
            return change
        quantized = any(not parameter.is_floating_point() for parameter in model.parameters())
        if quantized or change <= tolerance(self.classifier.model, SAME_SHAPE):
            return 0.0
        if self.hurried:
            log.info(
                "outputs that should be the same differ by %.0f%%, as they may by rounding; to look again in fp32 "
                "would take too long here: `python -m irtune validate` does it",
                100 * change,
            )
            return 0.0
        with in_fp32(model):
            change = difference(one(*given), other(*given))
        return change if change > TOLERANCE[torch.float32] else 0.0


def check_length(config: Config, classifier: Classifier) -> None:
    """Look whether the model has positions for the longest input, with what the adapter puts before it, and reads it
    as it reads shorter ones.

    Raises:
        ConfigError: with the longest that is accepted.
    """
    limit, whole = longest_input(classifier), longest_whole(classifier.model.config)
    extra_tokens = implementation(adapter_kinds()[config.adapter.type]).extra_tokens
    more = 0 if extra_tokens is None else extra_tokens(classifier, config.adapter)
    behind = f" and {more} tokens of adapter.type {config.adapter.type} before them" if more else ""
    given = f"data.max_length is {config.data.max_length}{behind}, but {config.model.name_or_path}"
    if limit is not None and config.data.max_length + more > limit:
        raise ConfigError(f"{given} has positions for {limit} tokens; accepted: at most {limit - more}")
    if whole is not None and config.data.max_length + more > whole:
        raise ConfigError(
            f"{given} attends in blocks to batches of more than {whole} tokens, so its predictions would depend on the "
            f"batch; accepted: at most {whole - more}, or attention_type original_full in the model's config.json"
        )


def watch(classifier: Classifier, texts: Sequence[Text], *, patient: bool = False) -> Guard | None:
    """Look at a freshly loaded model; returns what `check` needs when adapters are in, or None where it takes too long.

    Args:
        classifier: a model without adapters.
        texts: encoded examples, of which two are taken.
        patient: take all the time that is needed.

    Raises:
        ModelError: when padding changes what the model computes, or irtune's attention does.
    """
    model: Any = classifier.model
    if any(is_partitioned(parameter) for parameter in model.parameters()):
        log.info("the model is loaded in shares and not checked here: `python -m irtune validate` checks it")
        return None
    with _reading(model):
        return _watch(classifier, _choose(texts), patient)


def _watch(classifier: Classifier, chosen: list[Text], patient: bool) -> Guard | None:
    model: Any = classifier.model
    started = time.perf_counter()
    alone = _alone(classifier, model, chosen)
    seconds = (time.perf_counter() - started) / 2 * PASSES
    if seconds > SECONDS and not patient:
        log.info("to check the model would take %.0f s here: `python -m irtune validate` does it", seconds)
        return None
    hurried = not patient and seconds * (1 + MORE_PASSES / PASSES) > SECONDS
    guard = Guard(classifier, chosen, alone, hurried)
    change = guard.change(model, _alone, _together, alone)
    if change:
        raise _depends_on_padding(classifier, change)
    together = _together(classifier, model, chosen)
    with _other_padding(model):
        change = difference(together, _together(classifier, model, chosen))
    if change > tolerance(model, SAME_SHAPE):
        raise _depends_on_padding(classifier, change)
    if model.config._attn_implementation == CPU_ATTENTION:
        change = guard.change(model, _together, _as_trained, together)
        if change:
            raise ModelError(
                f"irtune's attention for CPUs changes what {type(model).__name__} computes ({_share(change)}); "
                "set model.attn_implementation to eager"
            )
    return guard


@contextlib.contextmanager
def _reading(model: nn.Module, adapter: str | None = None) -> Iterator[None]:
    """Inside, what a model raises for a text becomes a ModelError: classes of transformers raise whatever they like."""
    try:
        yield
    except IrtuneError:
        raise
    except Exception as error:
        raise cannot_read(model, error, adapter) from error


def _choose(texts: Sequence[Text]) -> list[Text]:
    """The shortest text, and the longest of those that are not too long; of one length only, the first is cut."""
    ordered = sorted(texts, key=lambda text: len(text["input_ids"]))
    short = ordered[0]
    fitting = [text for text in ordered if len(text["input_ids"]) <= LONGEST]
    longer = fitting[-1] if fitting else ordered[0]
    if len(longer["input_ids"]) == len(short["input_ids"]):
        half = max(1, len(short["input_ids"]) // 2)
        short = {name: list(values)[:half] for name, values in short.items()}
    return [short, longer]


def _logits(classifier: Classifier, model: nn.Module, texts: list[Text], packed: bool = False) -> torch.Tensor:
    base: Any = classifier.model
    pad: Any = classifier.tokenizer.pad_token_id
    batch = collate([dict(text) for text in texts], pad, device=base.device, packed=packed)  # type: ignore[arg-type]
    return model(**batch).logits.float()


def _outputs(classifier: Classifier, model: nn.Module, texts: list[Text], packed: bool = False) -> torch.Tensor:
    """Logits [texts, classes], or what a pooled head reads [texts, features]: such a head starts at zero."""
    if pooling_of(classifier.model) is None:
        return _logits(classifier, model, texts, packed)
    read: list[torch.Tensor] = []
    head = classifier.model.get_submodule(HEAD_NAME)
    handle = head.register_forward_pre_hook(lambda _head, inputs: read.append(inputs[0].float()))
    try:
        _logits(classifier, model, texts, packed)
    finally:
        handle.remove()
    return read[0]


def _alone(classifier: Classifier, model: nn.Module, texts: list[Text]) -> torch.Tensor:
    with _at_rest(classifier, model), torch.no_grad():
        return torch.cat([_outputs(classifier, model, [text]) for text in texts])


def _together(classifier: Classifier, model: nn.Module, texts: list[Text], packed: bool = False) -> torch.Tensor:
    with _at_rest(classifier, model), torch.no_grad():
        return _outputs(classifier, model, texts, packed)


def _as_trained(classifier: Classifier, model: nn.Module, texts: list[Text]) -> torch.Tensor:
    with as_in_training():
        return _together(classifier, model, texts)


@contextlib.contextmanager
def _at_rest(classifier: Classifier, model: nn.Module) -> Iterator[None]:
    """Inside, a model evaluates, where it is, and draws random numbers that nobody misses afterwards."""
    device: torch.device = classifier.model.device  # type: ignore[assignment]
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        with (
            torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]),
            without_flash_on_cpu(classifier.model),
        ):
            yield
    finally:
        for part, training in modes.items():
            part.training = training


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference as a share of the largest output; infinite where one is not finite."""
    if not bool(one.isfinite().all() and other.isfinite().all()):
        return float("inf")
    scale = torch.maximum(one.abs().amax(), other.abs().amax()).clamp_min(1e-6)
    return float((one - other).abs().amax() / scale)


def _share(change: float) -> str:
    return f"a difference of {change:.0%}" if change != float("inf") else "numbers that are not finite"


def tolerance(model: nn.Module, table: Mapping[torch.dtype, float] = TOLERANCE) -> float:
    """The largest `difference` that rounding makes in a model's outputs; of `table`, by the model's widest rounding."""
    return max(table.get(p.dtype, 0.0) for p in model.parameters() if p.is_floating_point())


@contextlib.contextmanager
def _other_padding(model: Any) -> Iterator[None]:
    """Inside, tokens of padding are embedded as something else: the same numbers elsewhere, to the bit or nearly.

    In few bits, what padding changes may be smaller than what another shape of the batch rounds differently.
    """
    masks: list[torch.Tensor] = []

    def note(_module: nn.Module, _arguments: tuple, batch: dict[str, Any]) -> None:
        masks.append(batch["attention_mask"])

    def change(_module: nn.Module, _arguments: tuple, states: torch.Tensor) -> torch.Tensor:
        if states.shape[:2] != masks[-1].shape:
            return states
        return torch.where(masks[-1].bool().unsqueeze(-1), states, states.roll(1, -1) + states.abs().mean())

    handles = [
        model.register_forward_pre_hook(note, with_kwargs=True),
        model.get_input_embeddings().register_forward_hook(change),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _depends_on_padding(classifier: Classifier, change: float, before: str = "") -> ModelError:
    settings: Any = classifier.model.config
    own = "" if settings._attn_implementation == "eager" else "model.attn_implementation to eager, or "
    advice = "adapter.type to lora or bottleneck, or " if before else own
    return ModelError(
        f"{before}{type(classifier.model).__name__} computes something else for a text alone than for the same text "
        f"padded in a batch ({_share(change)}), so its predictions would depend on the batch; set {advice}"
        "model.name_or_path to another model"
    )


def _without_gradient(classifier: Classifier, model: nn.Module, table: LayerTable, texts: list[Text]) -> list[str]:
    """Names of parameters that a backward pass gives no gradient. Of experts, one that has one speaks for all."""
    wanted = {id(parameter): parameter.requires_grad for _, parameter in table.all()}
    try:
        for _, parameter in table.all():
            parameter.requires_grad_(True)
        with _at_rest(classifier, model), torch.enable_grad():
            _logits(classifier, model, texts).logsumexp(-1).sum().backward()
        layers = classifier.anatomy.layers
        reached = {_group(name, layers) for name, parameter in table.all() if parameter.grad is not None}
        return [name for name, _ in table.all() if _group(name, layers) not in reached]
    finally:
        for _, parameter in table.all():
            parameter.requires_grad_(wanted[id(parameter)])
            parameter.grad = None


def _group(name: str, layers: str) -> str:
    """A parameter's name without the numbers inside its layer."""
    whole = re.fullmatch(rf"(.*\b{re.escape(layers)}\.\d+\.)(.*)", name)
    return whole[1] + re.sub(r"\b\d+\.", "N.", whole[2]) if whole else name
