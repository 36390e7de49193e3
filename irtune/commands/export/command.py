"""Write the export folder: the adapter with a model card, the merged model, or an ONNX graph."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from irtune.commands.common import a_path, add_folder, parser, show, trusted
from irtune.commands.export import onnx, vllm
from irtune.commands.export.card import Form, model_card
from irtune.config import Config, write_config
from irtune.config.declarations import adapter_kinds, implementation
from irtune.config.schema import RunConfig
from irtune.console import quiet_transformers
from irtune.data import Encoder, Example, collate
from irtune.errors import ConfigError, RunError
from irtune.evaluation.saved_run import (
    ADAPTER_FILES,
    LoadedRun,
    adapter_folder,
    check_trusted,
    is_peft_adapter,
    load_run,
    read_run,
)
from irtune.files import replacing, write_json, writing
from irtune.models.classifier import load_tokenizer
from irtune.models.files import find_source
from irtune.models.padding import pools_last_place, suit_pooling
from irtune.models.pooling import HEAD_FILE, load_head, pooling_of, save_head
from irtune.tasks import task_of

TOLERANCE = 1e-4  # largest difference of a probability between the run's model and the merged one, both in fp32
PROBES = (
    Example("1", "He go to school every day.", "He goes to school every day.", 0),
    Example("2", "The results was good, I think, mostly.", "The results were mostly good.", 0),
    Example("3", "", "A sentence was added here.", 0),
)


def main(arguments: Sequence[str]) -> int:
    """Write the export folder."""
    options = parser(
        "export",
        "Write the adapter of a finished run with a model card, or, with --merge, a model that plain transformers "
        "loads: fp32 safetensors, checked to give the run's probabilities to 1e-4. predict and evaluate take either "
        "folder for their --run. With --onnx: the whole model as a graph, checked to give the run's logits to 1e-4. "
        "README.md in the folder says how to use it, and how vLLM serves it.",
        "python -m irtune export --run runs/mine --to exported --merge",
    )
    add_folder(options)
    options.add_argument("--to", required=True, type=a_path, help="new folder")
    form = options.add_mutually_exclusive_group()
    form.add_argument("--merge", action="store_true", help="merge the adapter into the base model")
    form.add_argument("--onnx", action="store_true", help="write the whole model as an ONNX graph")
    given = options.parse_args(list(arguments))
    source, target = given.run, given.to
    quiet_transformers()
    read_run(source)  # a run, and finished?
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise ConfigError(f"--to {str(target)!r} already exists and is not empty; accepted: a new folder")
    if given.onnx:
        onnx.check_installed()
    write = _onnx if given.onnx else _merged if given.merge else _adapter
    with writing(target), replacing(target) as scratch:
        scratch.mkdir(parents=True)
        last = write(source, scratch, trusted(given))
    show(f"written to {target}")
    show(last)
    return 0


def _adapter(source: Path, target: Path, trust: list[str]) -> str:
    config, results = read_run(source)
    check_trusted(source, config, trust)
    folder = adapter_folder(source)
    is_peft_adapter(folder, source)
    for name in ADAPTER_FILES:  # by name: whatever else, or whatever link, is in the folder stays there
        shutil.copyfile(folder / name, target / name)
    encoder = Encoder(load_tokenizer(config.model), config.data, list(results["dev"]["per_class"]))
    settings = AutoConfig.from_pretrained(find_source(config.model), trust_remote_code=config.model.trust_remote_code)
    return _describe(target, config, results, encoder, settings, merged=False)


def _describe(
    target: Path, config: Config, results: dict[str, Any], encoder: Encoder, settings: Any, *, merged: bool
) -> str:
    """Write the model card, and what irtune needs to predict from the folder: config.yaml and results.json.

    Returns what the user is told of vLLM.

    Of paths on this machine, only their last names go into it, and the base model's.
    """
    side = "left" if pools_last_place(settings) else "right"
    why = vllm.refusal(config, target, merged=merged)
    short = (
        f"vLLM {vllm.VERSION} cannot serve it: {why}" if why else "README.md has the command with which vLLM serves it"
    )
    served = f"{short}." if why else vllm.section(config, list(results["dev"]["per_class"]), target, merged=merged)
    form: Form = "merged" if merged else "adapter"
    card = model_card(config, results, encoder, form=form, more=f"## vLLM\n\n{served}", padding_side=side)
    (target / "README.md").write_text(card, encoding="utf-8")
    corpus = Path(config.data.path or config.data.train or "corpus").name or "corpus"
    model = dataclasses.replace(config.model, start_from=None)  # a start, and not needed to predict
    if merged:  # the update was added in fp32; layers that started anew are among the weights
        model = dataclasses.replace(model, dtype="float32", quantization="none", restart_layers=0)
    exported = Config(
        model=model,
        adapter=config.adapter,
        data=dataclasses.replace(config.data, path=corpus, train=None, dev=None, test=None, synonyms=None),
        tuning=config.tuning,
        optim=config.optim,
        run=RunConfig(
            output_dir=Path(config.run.output_dir).name,
            seed=config.run.seed,
            best_metric=config.run.best_metric,
            thresholds=config.run.thresholds,
        ),
    )
    write_config(exported, target / "config.yaml")
    write_json(target / "results.json", results)
    return short


def _merged(source: Path, target: Path, trust: list[str]) -> str:
    """Merge in fp32: in a lower precision the sum of base and update would be rounded again."""
    config, results = read_run(source)
    run = load_run(source, torch.device("cpu"), dtype="float32", trusted=trust)
    wanted = _probabilities(run, run.model)
    merged = _folded(run)
    if merged is None:
        raise RunError(f"adapter.type {config.adapter.type} cannot be merged: it does not change the base's weights")
    merged.config.torch_dtype = merged.config.dtype = torch.float32
    pooling = pooling_of(merged)
    if pooling is None:
        merged.save_pretrained(target)
    else:  # plain transformers has no class for it: a body that it loads, and the head beside it
        getattr(merged, merged.base_model_prefix).save_pretrained(target)
        save_head(merged, target / HEAD_FILE)
    run.classifier.tokenizer.save_pretrained(target)
    kind: Any = AutoModelForSequenceClassification if pooling is None else AutoModel
    loaded, info = kind.from_pretrained(target, output_loading_info=True)
    # BERT's own pooler is left out: nothing reads it.
    missing = {key for key in info["missing_keys"] if pooling is None or not key.startswith("pooler.")}
    wrong = sorted({*missing, *info["unexpected_keys"]})
    if pooling is not None:
        setattr(merged, merged.base_model_prefix, loaded.eval())
        load_head(merged, target / HEAD_FILE)
        loaded = merged
    else:
        suit_pooling(loaded, run.classifier.tokenizer)  # which `_probabilities` pads on the right all the same
    difference = float((_probabilities(run, loaded.eval()) - wanted).abs().max())
    if wrong or difference > TOLERANCE:
        reason = f"{wrong[0]} has no place in the base model" if wrong else f"probabilities differ by {difference:.1e}"
        raise RunError(f"adapter.type {config.adapter.type} cannot be merged into this model: {reason}")
    return _describe(target, config, results, run.encoder, run.classifier.model.config, merged=True)


def _onnx(source: Path, target: Path, trust: list[str]) -> str:
    """What can be merged is: the graph has fewer nodes then, and the same logits."""
    config, results = read_run(source)
    run = load_run(source, torch.device("cpu"), dtype="float32", trusted=trust)
    batch = _batch(run)
    with torch.no_grad():
        wanted = run.model(**batch).logits
    model = _folded(run)
    inputs = onnx.write_graph(run, run.model if model is None else model, batch, wanted, target / onnx.FILE)
    run.classifier.tokenizer.save_pretrained(target)
    card = model_card(config, results, run.encoder, form="onnx", more=onnx.section(inputs))
    (target / "README.md").write_text(card, encoding="utf-8")
    return f"{onnx.FILE} takes {', '.join(inputs)} [batch, length] and gives logits [batch, {len(run.labels)}]"


def _folded(run: LoadedRun) -> Any:
    """The model with its adapter in the weights, in place; None where the adapter cannot go there."""
    model: Any = run.model
    fold = implementation(adapter_kinds()[run.config.adapter.type]).merge
    if hasattr(model, "merge_and_unload"):
        for name, part in list(model.named_modules()):  # peft's types but lora can unwrap linear heads only
            if isinstance(part, ModulesToSaveWrapper):
                model.set_submodule(name, part.modules_to_save["default"])
        return model.merge_and_unload()
    if fold is not None:
        with torch.no_grad():
            fold(run.classifier)
        return model
    return model if model is run.classifier.model else None


def _batch(run: LoadedRun) -> dict[str, torch.Tensor]:
    """The probes, as a batch without labels."""
    after = run.config.data.after is not None
    probes = [probe if after else dataclasses.replace(probe, before=probe.before + "a", after=None) for probe in PROBES]
    return collate([run.encoder.encode(probe) for probe in probes], int(run.classifier.tokenizer.pad_token_id))  # type: ignore[arg-type]


@torch.no_grad()
def _probabilities(run: LoadedRun, model: nn.Module) -> torch.Tensor:
    return task_of(run.config.data).scores(model(**_batch(run)).logits)
