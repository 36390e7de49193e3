"""Read every input and make every check of a run before the first byte is written."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from irtune.adapters import LayerTable, remember_origins
from irtune.adapters.build import add_adapters
from irtune.adapters.guard import check_length, watch
from irtune.config import Config, write_config
from irtune.config.batch_size import for_ranks
from irtune.config.deepspeed_json import read_engine_json
from irtune.data import BatchPlan, Corpus, Encoder, TokenCache, corpus_digest, plan_batches, read_corpus
from irtune.distributed import environment, runtime
from irtune.distributed import node_checks as nodes
from irtune.distributed.partitioned import whole
from irtune.distributed.runtime import World
from irtune.engine.deepspeed_private import unknown_zero_keys
from irtune.errors import ConfigError
from irtune.evaluation.saved_run import check_will_load
from irtune.evaluation.start import start_from
from irtune.memory import RunPlan, plan_run, shortage
from irtune.memory.measure import device_memory_bytes
from irtune.models import load_classifier
from irtune.models.anatomy import output_projections
from irtune.models.limits import check_tokens
from irtune.models.quantization import elements
from irtune.selection import Chooser
from irtune.selection.registry import build_chooser
from irtune.selection.scores import LayerScores
from irtune.selection.signal_noise import layer_ratios
from irtune.train.checkpoint import TRAINABLE, Checkpoints, load_into, read_state, read_tensors
from irtune.train.resume import check_same_run, find_checkpoint, note_versions, run_identity

log = logging.getLogger("irtune")


@dataclass
class Plans:
    """What is known before anything is written: every input read, every check made."""

    config: Config
    settings: dict[str, Any]
    corpus: Corpus
    encoded: dict[str, list[dict[str, list[int]]]]
    plan: BatchPlan
    max_steps: int
    model: nn.Module
    table: LayerTable
    pad_token_id: int
    scores: LayerScores
    chooser: Chooser
    checkpoints: Checkpoints
    memory: RunPlan | None
    identity: dict[str, Any]
    resumed: Path | None
    state: dict[str, Any] | None
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
        return []
    problems = []
    if config.model.dtype == "float16":
        problems.append("model.dtype float16 needs a GPU; on a CPU use bfloat16 or float32")
    if config.model.attn_implementation == "flash_attention_2":
        problems.append("model.attn_implementation flash_attention_2 needs a GPU; on a CPU use sdpa")
    return problems


def prepare(config: Config, settings: dict[str, Any], world: World, folder: Path) -> Plans:
    """Everything that can fail by the user's doing, on all ranks alike, before the first byte is written."""
    given, config = config, for_ranks(config, world.size)
    micro_batches = world.size * config.optim.gradient_accumulation_steps
    with runtime.shared_errors():
        checkpoints = Checkpoints(folder / "checkpoints", config.run.keep_last)
        resumed = find_checkpoint(config, checkpoints)
        corpus = read_corpus(config.data)
        digest = corpus_digest(corpus)
    nodes.check_equal({"the corpus": digest, "the checkpoint to go on from": resumed.name if resumed else "none"})
    with runtime.shared_errors():
        memory = _plan_memory(config, settings, world, corpus)
        classifier = load_classifier(config.model, corpus.labels, sharded=_sharded(config, settings))
        check_length(config, classifier)
        encoder = Encoder(classifier.tokenizer, config.data, corpus.labels)
        cache = TokenCache(environment.cache_folder() / "tokens", encoder, digest)
        # Once per node: the others find it done when they have met the first at the end of this block.
        early = world.local_rank == 0 or not cache.is_usable()
        encoded = cache.load_or_encode(corpus) if early else {}
    nodes.check_equal({"the tokenizer with its prompt": cache.key})
    with runtime.shared_errors():
        encoded = encoded or cache.load_or_encode(corpus)
        check_tokens(classifier, encoded.values())
        lengths = [len(item["input_ids"]) for item in encoded["train"]]
        plan = plan_batches(lengths, config, micro_batches)
        max_steps = config.optim.max_steps or max(1, round(config.optim.epochs * plan.steps_per_epoch))
        score = config.tuning.score
        projections = output_projections(classifier.model, classifier.anatomy) if score == "weight" else None
        by_ratio = config.tuning.method == "spectrum"
        ratios = layer_ratios(classifier.model, classifier.anatomy) if by_ratio else None
        guard = watch(classifier, encoded["train"])
        model, table = add_adapters(classifier, config.adapter)
        if guard is not None:
            guard.check(model, table, config.adapter)
        check_will_load(model)
        if config.model.start_from is not None:
            start_from(config.model.start_from, model, table, config.adapter, corpus.labels)
        if config.tuning.method == "ist":
            remember_origins(table)
        sizes = [sum(elements(parameter) for _, parameter in layer) for layer in table.layers]
        chooser = build_chooser(config.tuning, table.num_layers, config.run.seed, sizes, ratios)
        identity = run_identity(config, corpus, plan, max_steps)
        state = None
        if resumed is not None:
            state = read_state(resumed)
            check_same_run(state["run"], identity, resumed)
            note_versions(state.get("versions"), resumed)
            # Layers that never trained are not in a checkpoint of pretrained weights.
            untrained = {name for layer in table.layers for name, _ in layer} if table.pretrained else set()
            load_into(table.all(), read_tensors(resumed, TRAINABLE), resumed, untrained)
        trained = state is not None and (
            state["progress"]["step"] >= max_steps or state["progress"].get("stopped", False)
        )
        finished = trained and (folder / "results.json").is_file()
        if world.is_main and not finished:
            _open_folder(folder, given)
    return Plans(
        config=config,
        settings=settings,
        corpus=corpus,
        encoded=encoded,
        plan=plan,
        max_steps=max_steps,
        model=model,
        table=table,
        pad_token_id=classifier.tokenizer.pad_token_id,
        scores=LayerScores(table, score, world.device, projections),
        chooser=chooser,
        checkpoints=checkpoints,
        memory=memory,
        identity=identity,
        resumed=resumed,
        state=state,
        finished=runtime.all_gather_object(finished)[0],
    )


def _plan_memory(config: Config, settings: dict[str, Any], world: World, corpus: Corpus) -> RunPlan | None:
    """What the run will need, counted by rank 0 before weights are loaded; warns where that does not fit."""
    if not world.is_main:
        return None
    plan = plan_run(
        config, settings, world.size, device_memory_bytes(world.device), device=world.device.type, labels=corpus.labels
    )
    warning = plan and shortage(plan)
    if warning:
        log.warning("%s", warning)
    return plan


def _sharded(config: Config, settings: dict[str, Any]) -> dict[str, Any] | None:
    """ZeRO 3's section where each rank loads no more than its share of the model, else None.

    Quantised weights are loaded whole: transformers packs a weight on the rank that reads it.
    """
    zero = settings["zero_optimization"]
    return zero if zero["stage"] == 3 and config.model.quantization == "none" else None


def pretrained_weights(plans: Plans) -> dict[str, torch.Tensor]:
    """Pretrained weights of the layers, read anew, where training overwrites them; else nothing. Collective.

    The best checkpoint lacks layers that first trained after it: they must be what they were before. Where ranks hold
    shares, the layers are given their weights here, one by one, and nothing is returned.
    """
    if not plans.table.pretrained:
        return {}
    zero = _sharded(plans.config, plans.settings)
    if zero is not None:
        zero = zero | {"offload_param": {"device": "cpu"}}  # the device may have no room for a second share
    model = load_classifier(plans.config.model, plans.corpus.labels, sharded=zero).model
    weights = dict(model.named_parameters())
    if zero is None:
        return {name: weights[name] for layer in plans.table.layers for name, _ in layer}
    for layer in plans.table.layers:
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
