"""Read every input and make every check of a run before the first byte is written."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from irtune import launcher, nodes, runtime
from irtune.adapters import LayerTable, add_adapters, remember_origins
from irtune.adapters.label_texts import longest_label
from irtune.anatomy import output_projections
from irtune.checkpoint import (
    TRAINABLE,
    Checkpoints,
    find_damage,
    load_into,
    read_state,
    read_tensors,
    versions,
)
from irtune.config import Config, write_config
from irtune.config.batch import for_ranks
from irtune.config.engine_json import read_engine_json
from irtune.data import BatchPlan, Corpus, Encoder, TokenCache, corpus_digest, plan_batches, read_corpus
from irtune.errors import CheckpointError, ConfigError
from irtune.importance import LayerScores
from irtune.memory import device_memory_bytes
from irtune.models import Classifier, load_classifier, longest_input
from irtune.planner import RunPlan, plan_run, shortage
from irtune.quantization import elements
from irtune.runtime import World
from irtune.selection import Chooser, build_chooser
from irtune.signal_noise import layer_ratios
from irtune.zero import unknown_zero_keys, whole

log = logging.getLogger("irtune")
DERIVED = ("gradient_accumulation_steps", "global_batch_size")  # of optim: their product with the ranks decides
# Of model, what a resumed run may change.
HARMLESS = (
    "gradient_checkpointing",
    "attn_implementation",
    "compile",
    "fused_kernels",
    "trust_remote_code",
    "allow_pickle",
)


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
        resumed = _find_checkpoint(config, checkpoints)
        corpus = read_corpus(config.data)
        digest = corpus_digest(corpus)
    nodes.check_equal({"the corpus": digest, "the checkpoint to go on from": resumed.name if resumed else "none"})
    with runtime.shared_errors():
        memory = _plan_memory(config, settings, world, corpus)
        classifier = load_classifier(config.model, corpus.labels, sharded=_sharded(config, settings))
        _check_length(config, classifier)
        encoder = Encoder(classifier.tokenizer, config.data, corpus.labels)
        cache = TokenCache(launcher.cache_folder() / "tokens", encoder, digest)
        # Once per node: the others find it done when they have met the first at the end of this block.
        early = world.local_rank == 0 or not cache.is_usable()
        encoded = cache.load_or_encode(corpus) if early else {}
    nodes.check_equal({"the tokenizer with its prompt": cache.key})
    with runtime.shared_errors():
        encoded = encoded or cache.load_or_encode(corpus)
        lengths = [len(item["input_ids"]) for item in encoded["train"]]
        plan = plan_batches(lengths, config, micro_batches)
        max_steps = config.optim.max_steps or max(1, round(config.optim.epochs * plan.steps_per_epoch))
        score = config.tuning.score
        projections = output_projections(classifier.model, classifier.anatomy) if score == "weight" else None
        by_ratio = config.tuning.method == "spectrum"
        ratios = layer_ratios(classifier.model, classifier.anatomy) if by_ratio else None
        model, table = add_adapters(classifier, config.adapter)
        if config.tuning.method == "ist":
            remember_origins(table)
        sizes = [sum(elements(parameter) for _, parameter in layer) for layer in table.layers]
        chooser = build_chooser(config.tuning, table.num_layers, config.run.seed, sizes, ratios)
        identity = _identity(config, corpus, plan, max_steps)
        state = None
        if resumed is not None:
            state = read_state(resumed)
            _check_same_run(state["run"], identity, resumed)
            _note_versions(state.get("versions"), resumed)
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


def _identity(config: Config, corpus: Corpus, plan: BatchPlan, max_steps: int) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued: not where the corpus lies, but what it holds."""
    optim = {key: value for key, value in vars(config.optim).items() if key not in DERIVED}
    places = ("path", "train", "dev", "test")
    return {
        "model": {key: value for key, value in vars(config.model).items() if key not in HARMLESS},
        "adapter": vars(config.adapter),
        "tuning": vars(config.tuning),
        "optim": optim | {"micro_batches_per_step": plan.micro_batches, "max_steps": max_steps},
        "data": {key: value for key, value in vars(config.data).items() if key not in places},
        "labels": corpus.labels,
        "examples": {split: len(examples) for split, examples in corpus.splits.items()},
        "training_lengths": runtime.derived_seed(*plan.lengths),
        "seed": config.run.seed,
    }


def _check_length(config: Config, classifier: Classifier) -> None:
    limit = longest_input(classifier)
    if limit is None:
        return
    more = config.adapter.num_tokens if config.adapter.type == "prompt" else 0
    if config.adapter.type == "ltuning-prompt":
        more = longest_label(classifier)
    if config.data.max_length + more > limit:
        behind = f" and {more} tokens of adapter.type {config.adapter.type} before them" if more else ""
        raise ConfigError(
            f"data.max_length is {config.data.max_length}{behind}, but {config.model.name_or_path} has positions for "
            f"{limit} tokens; accepted: at most {limit - more}"
        )


def _find_checkpoint(config: Config, checkpoints: Checkpoints) -> Path | None:
    """The checkpoint to go on from, as `run.resume` says."""
    if config.run.resume == "auto":
        return checkpoints.newest_whole()
    if config.run.resume == "never":
        if checkpoints.pointer("latest") is not None:
            raise ConfigError(
                f"run.output_dir {config.run.output_dir!r} holds a run already and run.resume is never; choose another "
                "folder, or set run.resume to auto"
            )
        return None
    path = Path(config.run.resume).expanduser()
    if not path.is_dir():
        raise ConfigError(f"run.resume is {config.run.resume!r}; accepted: auto, never, or a checkpoint folder")
    damage = find_damage(path)
    if damage is not None:
        raise CheckpointError(f"run.resume: {path} is damaged: {damage}")
    return path


def _check_same_run(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with another model, data, method or optimizer; names every difference."""
    changes = []
    for section, value in now.items():
        old = saved.get(section)
        if isinstance(value, dict) and isinstance(old, dict):
            names = sorted(set(value) | set(old))
            pairs = [(f"{section}.{name}", old.get(name), value.get(name)) for name in names]
        else:
            pairs = [(section, old, value)]
        changes += [f"{name} was {a!r} and is {b!r}" for name, a, b in pairs if a != b]
    if changes:
        raise CheckpointError(f"{folder} cannot be continued: {'; '.join(changes)}")


def _note_versions(saved: Any, folder: Path) -> None:
    """Other packages may compute other numbers; that is for the user to know, not for irtune to forbid."""
    saved, now = saved if isinstance(saved, dict) else {}, versions()
    changes = [f"{name} {saved[name]} -> {now[name]}" for name in now if saved.get(name, now[name]) != now[name]]
    if changes:
        log.info("%s was written with other versions: %s", folder, ", ".join(changes))


def _open_folder(folder: Path, config: Config) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_config(config, folder / "config.yaml")
    except OSError as error:
        raise ConfigError(f"run.output_dir: cannot write to {str(folder)!r}: {error.strerror}") from error
