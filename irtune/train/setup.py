"""Read every input and make every check of a run before the first byte is written."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from irtune.adapters import AdapterTraits, LayerTable, Suppression, adapter_traits, add_adapters
from irtune.adapters.build import leave_out_padding
from irtune.adapters.guard import check_length, watch
from irtune.adapters.schedule import Schedule
from irtune.config import Config, write_config
from irtune.config.batch_size import with_accumulation
from irtune.config.checks import needed_mask
from irtune.config.declarations import adapter_kinds, implementation, methods
from irtune.config.deepspeed_json import read_engine_json
from irtune.data import (
    Augmenter,
    Corpus,
    Encoded,
    Encoder,
    build_sampler,
    corpus_digest,
    padded_lengths,
    read_corpus,
    read_synonyms,
    total_steps,
)
from irtune.data.augment import Synonyms
from irtune.distributed import node_checks as nodes
from irtune.distributed import runtime
from irtune.distributed.partitioned import whole
from irtune.distributed.runtime import World
from irtune.engine.deepspeed_private import unknown_zero_keys
from irtune.engine.losses import class_weights
from irtune.errors import ConfigError
from irtune.evaluation.saved_run import check_will_load
from irtune.evaluation.start import start_from
from irtune.memory import MemoryEstimate, estimate_memory, shortage
from irtune.memory.measure import device_memory_bytes
from irtune.models import Classifier, RunFacts, load_classifier
from irtune.models.anatomy import output_projections
from irtune.models.head_words import start_from_words
from irtune.models.kernels import check_gpu
from irtune.models.limits import check_tokens
from irtune.models.weights import elements
from irtune.selection import Chooser
from irtune.selection.registry import build_chooser
from irtune.selection.scores import WEIGHT_SCORES, LayerScores
from irtune.selection.signal_noise import layer_ratios
from irtune.train.checkpoint import Checkpoints
from irtune.train.frozen_outputs import check_frozen_outputs
from irtune.train.layer_selection import SelectionMethod
from irtune.train.resume import ResumePoint, began_without_padding, find_checkpoint, resume_from, run_identity
from irtune.train.training_data import TrainingData, Variant

log = logging.getLogger("irtune")
ENCODED_AT_A_TIME = 64  # examples, by a rank


@dataclass(frozen=True)
class AdaptedModel:
    """A model with adapters in it, under no engine yet: what trains in which layer, and what kind of adapters it is."""

    module: nn.Module
    table: LayerTable
    traits: AdapterTraits


@dataclass
class RunSetup:
    """What is known before anything is written: every input read, every check made.

    config: for this number of ranks. settings: the completed DeepSpeed JSON. memory: on rank 0, what the run will need,
    where that can be counted. resumed: where training goes on, None for a new run. finished: nothing is left to do.
    """

    config: Config
    settings: dict[str, Any]
    data: TrainingData
    model: AdaptedModel
    method: SelectionMethod
    checkpoints: Checkpoints
    memory: MemoryEstimate | None
    resumed: ResumePoint | None
    finished: bool


def engine_settings(config: Config, world: World) -> dict[str, Any]:
    """The completed DeepSpeed JSON.

    Raises:
        ConfigError: for contradictions, unknown keys, and what this machine's devices cannot do.
    """
    settings, problems = read_engine_json(config, world.size)
    problems += unknown_zero_keys(settings) + _check_device(config, world)
    if problems:
        raise ConfigError(problems)
    return settings


def _check_device(config: Config, world: World) -> list[str]:
    if world.device.type == "cuda":
        return check_gpu(config.model, world.device)
    problems = []
    if config.model.dtype == "float16":
        problems.append("model.dtype float16 needs a GPU; on a CPU use bfloat16 or float32")
    if config.model.attn_implementation == "flash_attention_2":
        problems.append("model.attn_implementation flash_attention_2 needs a GPU; on a CPU use sdpa")
    return problems


def prepare(config: Config, settings: dict[str, Any], world: World, folder: Path) -> RunSetup:
    """Everything that can fail by the user's doing, on all ranks alike, before the first byte is written."""
    given, config = config, with_accumulation(config, world.size)
    with runtime.shared_errors():
        checkpoints = Checkpoints(folder / "checkpoints", max(config.run.keep_last, config.run.average))
        latest = find_checkpoint(config, checkpoints)
        corpus = read_corpus(config.data)
        class_weights(config.optim, corpus.labels)  # they fit the labels?
        digest = corpus_digest(corpus)
        synonyms, synonyms_digest = _synonyms(config)
    inputs = {"the corpus": digest, "the synonyms": synonyms_digest}
    nodes.check_equal(inputs | {"the checkpoint to continue from": latest.name if latest else "none"})
    job = runtime.new_job()
    with runtime.shared_errors():
        memory = _estimate_memory(config, settings, world, corpus)
        classifier = load_classifier(
            config.model, corpus.labels, sharded=_sharded(config, settings), problem_type=corpus.task.problem_type
        )
        if config.model.head_init is not None:
            start_from_words(classifier, config.model, corpus.labels)
        classifier.run = RunFacts.of(config)
        check_length(config, classifier)
        encoder = Encoder(classifier.tokenizer, config.data, corpus.labels, mask=needed_mask(config.model))
        # While rank 0 counts memory, the others do its share.
        examples = [example for split in corpus.splits.values() for example in split]
        share = runtime.made_together(job, encoder.encode, examples, ENCODED_AT_A_TIME)
    nodes.check_equal({"the tokenizer with its prompt": encoder.digest()})
    found = iter(runtime.joined(share))
    encoded = {split: list(itertools.islice(found, len(examples))) for split, examples in corpus.splits.items()}
    with runtime.shared_errors():
        check_tokens(classifier, encoded.values())
        projections, ratios = _score_constants(config, classifier)  # before adapters wrap the modules
        guard = watch(classifier, encoded["train"])
        module, table = add_adapters(classifier, config.adapter)
        packed = leave_out_padding(config, classifier, table, began_without_padding(latest))
        if guard is not None:
            guard.check(module, table, config.adapter)
            packed = packed and guard.allows_packing(module, insist=config.data.padding_free is True)
        variant = _variant(config, corpus, encoder, synonyms)
        data = _training_data(config, corpus, encoded, classifier, world, variant, packed)
        check_will_load(module)
        _check_training(config, module, table, len(corpus.labels))
        traits, suppresses = adapter_traits(config.adapter), methods()[config.tuning.method].suppresses
        # A checkpoint overwrites all of it, but for the start that suppression goes back to.
        if config.model.start_from is not None and (latest is None or suppresses):
            start_from(config.model.start_from, module, table, config.adapter, corpus.labels)
        suppression = Suppression(table) if suppresses else None
        sizes = [sum(elements(parameter) for _, parameter in layer) for layer in table.layers]
        chooser = build_chooser(config.tuning, table.num_layers, config.run.seed, sizes, ratios)
        check_frozen_outputs(config, classifier.model, table, traits, chooser.first())
        checkpoints.identity = run_identity(config, corpus, data.sampler, data.max_steps, synonyms_digest)
        resumed = None
        if latest is not None:
            resumed = resume_from(latest, checkpoints.identity, table, pretrained=traits.pretrained)
        schedule = _schedule(config, table, data.max_steps)  # which goes on with what the checkpoint has decided
        finished = resumed is not None and resumed.ends(data.max_steps) and (folder / "results.json").is_file()
        if world.is_main and not finished:
            _open_folder(folder, given)
    # After weights of a checkpoint were put in: the score `weight` is of what trains.
    scores = LayerScores(table, config.tuning.score, world.device, projections)
    return RunSetup(
        config=config,
        settings=settings,
        data=data,
        model=AdaptedModel(module, table, traits),
        method=SelectionMethod(chooser, scores, suppression, schedule, _among(config, table, ratios)),
        checkpoints=checkpoints,
        memory=memory,
        resumed=resumed,
        finished=runtime.all_gather_object(finished)[0],
    )


def _estimate_memory(config: Config, settings: dict[str, Any], world: World, corpus: Corpus) -> MemoryEstimate | None:
    """What the run will need, counted by rank 0 before weights are loaded; warns where that does not fit."""
    if not world.is_main:
        return None
    memory = estimate_memory(
        config, settings, world.size, device_memory_bytes(world.device), device=world.device.type, labels=corpus.labels
    )
    warning = memory and shortage(memory)
    if warning:
        log.warning("%s", warning)
    return memory


def _check_training(config: Config, module: nn.Module, table: LayerTable, classes: int) -> None:
    """Refuse ways to train that this model has no part for."""
    problems = []
    if config.run.logit_adjust and table.head_bias(classes) is None:
        problems.append(
            f"run.logit_adjust {config.run.logit_adjust} is kept in the bias of the head, and this one has none; set "
            "model.pooling to last, or run.logit_adjust to 0"
        )
    drops = any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules())
    if config.optim.rdrop and not drops:
        problems.append(
            f"optim.rdrop {config.optim.rdrop} compares two passes that dropout makes differ, and there is none; set "
            "adapter.dropout above 0, or optim.rdrop to 0"
        )
    if problems:
        raise ConfigError(problems)


def _training_data(
    config: Config,
    corpus: Corpus,
    encoded: Encoded,
    classifier: Classifier,
    world: World,
    variant: Variant | None,
    packed: bool,
) -> TrainingData:
    micro_batches = world.size * config.optim.gradient_accumulation_steps
    sampler = build_sampler(encoded["train"], config, micro_batches, packed=packed)
    return TrainingData(
        corpus,
        encoded,
        sampler,
        max_steps=total_steps(config.optim, sampler),
        pad_token_id=classifier.tokenizer.pad_token_id,
        device=world.device,
        seed=config.run.seed,
        padded=padded_lengths(config, world.device),
        variant=variant,
        mixup=config.optim.mixup,
        packed=packed,
    )


def _variant(config: Config, corpus: Corpus, encoder: Encoder, synonyms: Synonyms) -> Variant | None:
    """What `data.augment` makes of a training example in an epoch, encoded; None where it makes nothing."""
    if config.data.augment == "none":
        return None
    augmenter, examples = Augmenter(config.run.seed, synonyms), corpus.splits["train"]
    return lambda place, epoch: encoder.encode(augmenter.variant(examples[place], epoch))


def _synonyms(config: Config) -> tuple[Synonyms, str]:
    """Those of `data.synonyms` and their digest; without a file, none."""
    return read_synonyms(Path(config.data.synonyms).expanduser()) if config.data.synonyms is not None else ({}, "")


def _score_constants(
    config: Config, classifier: Classifier
) -> tuple[Sequence[torch.Tensor] | None, dict[str, list[float]] | None]:
    """What some methods look at: a projection per layer for scores of weights, or signal-to-noise ratios."""
    model, anatomy = classifier.model, classifier.anatomy
    projections = output_projections(model, anatomy) if config.tuning.score in WEIGHT_SCORES else None
    return projections, layer_ratios(model, anatomy) if methods()[config.tuning.method].needs_ratios else None


def _schedule(config: Config, table: LayerTable, max_steps: int) -> Schedule:
    """What the adapter type decides in a run of `max_steps`."""
    build = implementation(adapter_kinds()[config.adapter.type]).schedule
    return Schedule() if build is None else build(table, config, max_steps)


def _among(
    config: Config, table: LayerTable, ratios: dict[str, list[float]] | None
) -> Callable[[Collection[int]], Chooser]:
    """Builds the chooser of some layers, of which it trains all where they are fewer than the budget."""

    def among(layers: Collection[int]) -> Chooser:
        tuning, sizes = config.tuning, [0] * table.num_layers
        for layer in layers:
            sizes[layer] = sum(elements(parameter) for _, parameter in table.layers[layer])
        if isinstance(tuning.budget, int):
            tuning = dataclasses.replace(tuning, budget=min(tuning.budget, len(layers)))
        return build_chooser(tuning, table.num_layers, config.run.seed, sizes, ratios)

    return among


def _sharded(config: Config, settings: dict[str, Any]) -> dict[str, Any] | None:
    """ZeRO 3's section where each rank loads no more than its share of the model, else None.

    Quantised weights are loaded whole: transformers packs a weight on the rank that reads it.
    """
    zero = settings["zero_optimization"]
    return zero if zero["stage"] == 3 and config.model.quantization == "none" else None


def pretrained_weights(setup: RunSetup) -> dict[str, torch.Tensor]:
    """Pretrained weights of the layers, read again, where training overwrites them; else nothing. Collective.

    The best checkpoint lacks layers that first trained after it: they must be what they were before. Where ranks hold
    shares, the layers are given their weights here, one by one, and nothing is returned.
    """
    if not setup.model.traits.pretrained:
        return {}
    layers = setup.model.table.layers
    zero = _sharded(setup.config, setup.settings)
    if zero is not None:
        zero = zero | {"offload_param": {"device": "cpu"}}  # the device may have no room for a second share
    model = load_classifier(setup.config.model, setup.data.corpus.labels, sharded=zero).model
    weights = dict(model.named_parameters())
    if zero is None:
        return {name: weights[name] for layer in layers for name, _ in layer}
    for layer in layers:
        parameters, read = [parameter for _, parameter in layer], [weights[name] for name, _ in layer]
        with torch.no_grad(), whole(parameters, write=True), whole(read):
            for parameter, values in zip(parameters, read):
                parameter.copy_(values)
    return {}


def _open_folder(folder: Path, config: Config) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_config(config, folder / "config.yaml")
    except OSError as error:
        raise ConfigError(f"run.output_dir: cannot write to {str(folder)!r}: {error.strerror}") from error
