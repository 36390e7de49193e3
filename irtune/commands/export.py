"""`python -m irtune export`: the adapter with a model card, or the merged model, for others to use."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from irtune.commands.common import a_path, add_folder, parser, show, trusted
from irtune.data import Example, collate
from irtune.errors import ConfigError, RunError
from irtune.evaluation.saved_run import ADAPTER_FILES, LoadedRun, is_peft_adapter, load_run, read_run
from irtune.files import writing
from irtune.models.padding import suit_pooling

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
        "loads: fp32 safetensors, checked to give the run's probabilities to 1e-4.",
        "python -m irtune export --run runs/mine --to exported --merge",
    )
    add_folder(options)
    options.add_argument("--to", required=True, type=a_path, help="new folder")
    options.add_argument("--merge", action="store_true", help="merge the adapter into the base model")
    given = options.parse_args(list(arguments))
    source, target = given.run, given.to
    read_run(source)  # a run, and finished?
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise ConfigError(f"--to {str(target)!r} is there already and not empty; accepted: a new folder")
    scratch = target.with_name(f".{target.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with writing(target):
            scratch.mkdir(parents=True)
            _merged(source, scratch, trusted(given)) if given.merge else _adapter(source, scratch)
            scratch.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    show(f"written to {target}")
    return 0


def _adapter(source: Path, target: Path) -> None:
    config, results = read_run(source)
    is_peft_adapter(source / "adapter")
    for name in ADAPTER_FILES:  # by name: whatever else, or whatever link, is in the folder stays there
        shutil.copyfile(source / "adapter" / name, target / name)
    (target / "README.md").write_text(model_card(config, results, merged=False), encoding="utf-8")


def _merged(source: Path, target: Path, trust: list[str]) -> None:
    """Merge in fp32: in a lower precision the sum of base and update would be rounded again."""
    config, results = read_run(source)
    run = load_run(source, torch.device("cpu"), dtype="float32", trusted=trust)
    wanted = _probabilities(run, run.model)
    merged: Any = run.model
    if hasattr(merged, "merge_and_unload"):
        merged = merged.merge_and_unload()
    elif merged is not run.classifier.model:
        raise RunError(f"adapter.type {config.adapter.type} cannot be merged: it is no change of the base's weights")
    merged.config.torch_dtype = merged.config.dtype = torch.float32
    merged.save_pretrained(target)
    run.classifier.tokenizer.save_pretrained(target)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(target, output_loading_info=True)
    suit_pooling(loaded, run.classifier.tokenizer)  # which `_probabilities` pads on the right all the same
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    difference = float((_probabilities(run, loaded.eval()) - wanted).abs().max())
    if wrong or difference > TOLERANCE:
        reason = f"{wrong[0]} has no place in the base model" if wrong else f"probabilities differ by {difference:.1e}"
        raise RunError(f"adapter.type {config.adapter.type} cannot be merged into this model: {reason}")
    (target / "README.md").write_text(model_card(config, results, merged=True), encoding="utf-8")


@torch.no_grad()
def _probabilities(run: LoadedRun, model: nn.Module) -> torch.Tensor:
    after = run.config.data.after is not None
    probes = [probe if after else dataclasses.replace(probe, before=probe.before + "a", after=None) for probe in PROBES]
    batch = collate([run.encoder.encode(probe) for probe in probes], int(run.classifier.tokenizer.pad_token_id))  # type: ignore[arg-type]
    return model(**batch).logits.softmax(-1)


def model_card(config: Any, results: dict[str, Any], *, merged: bool) -> str:
    """The README of an export: what it is, what it learnt from, how good it is, how to load it."""
    labels = list(results["dev"]["per_class"])
    base, peft = config.model.name_or_path, config.adapter.type in ("lora", "dora", "rslora", "pissa")
    if merged:
        load = 'AutoModelForSequenceClassification.from_pretrained("THIS_FOLDER")'
    elif peft:
        load = f'PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained("{base}", '
        load += f'num_labels={len(labels)}), "THIS_FOLDER")'
    else:
        load = "irtune.adapters.load_adapter(classifier, Path('THIS_FOLDER'))"
    rows = [
        f"| {split} | {values['examples']} | "
        f"{values['accuracy']:.3f} | {values['macro_f1']:.3f} | {values['auprc']:.3f} |"
        for split, values in results.items()
        if split in ("dev", "test")
    ]
    ever = [str(layer) for layer, steps in enumerate(results["steps_per_layer"]) if steps]
    return "\n".join([
        "---",
        f"base_model: {base}",
        f"library_name: {'transformers' if merged else 'peft' if peft else 'irtune'}",
        "pipeline_tag: text-classification",
        "tags: [irtune, text-revision]",
        "---",
        "",
        f"# {Path(config.run.output_dir).name}",
        "",
        f"{'Merged model' if merged else 'Adapter'} ({config.adapter.type}) of {base}, trained with irtune "
        f"{results['versions']['irtune']}: method {config.tuning.method}, {results['steps']} steps, on average "
        f"{results['layers_trained_per_step']:.1f} of {results['num_layers']} layers per step. Layers ever trained: "
        f"{', '.join(ever) or 'none'}.",
        "",
        f"Classes: {', '.join(labels)}.",
        "",
        "## Data",
        "",
        f"{config.data.preset or Path(config.data.path or config.data.train or '').name}: "
        f"{'pairs of texts before and after a revision' if config.data.after else 'single texts'}, at most "
        f"{config.data.max_length} tokens, prompt `{config.data.prompt}`.",
        "",
        "## Metrics",
        "",
        "| split | examples | accuracy | macro-F1 | AUPRC |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
        "## Use",
        "",
        "```python",
        load,
        "```",
        "",
        "## Licence",
        "",
        "That of the base model and of the corpus; irtune itself is Apache-2.0.",
        "",
    ])  # fmt: skip
