"""A finished run, ready to predict: base model, adapter, tokenizer and labels from its folder, or from an export.

A folder may come from somebody else. Nothing in it is executed, and none of its files may be a link out of it.
"""

import dataclasses
import re
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from irtune import files
from irtune.adapters import load_adapter
from irtune.config import Config, load_config
from irtune.config.checks import needed_mask
from irtune.config.declarations import adapter_kinds
from irtune.config.schema import RISKS
from irtune.data import Encoder, Example, padded_lengths
from irtune.errors import IrtuneError, RunError, brief, one_line
from irtune.evaluation.metrics import Predictions, predict
from irtune.files import fingerprint
from irtune.models import DTYPES, Classifier, load_classifier
from irtune.models.limits import check_tokens
from irtune.models.pooling import HEAD_FILE, load_head, pooling_of
from irtune.tasks import SINGLE_LABEL, Task, task_of


def read_run(folder: Path) -> tuple[Config, dict[str, Any]]:
    """Configuration and results of a finished run.

    Raises:
        RunError: when `folder` is not a run, or not a finished one.
    """
    if not (folder / "config.yaml").is_file():
        raise RunError(
            f"{folder} is not a run folder: it has no config.yaml; accepted: the run.output_dir of a run, or a "
            "folder that irtune has exported"
        )
    config = load_config(["--config", str(folder / "config.yaml")])
    if not (folder / "results.json").is_file():
        latest = folder / "checkpoints" / "latest"
        name = latest.read_bytes()[:80].decode("utf-8", "replace").strip() if latest.is_file() else ""
        reached = f"its last checkpoint is {name!r}" if name else "it has no checkpoint"
        raise RunError(
            f"the run in {folder} is not finished, {reached}; continue with: train.py --config {folder / 'config.yaml'}"
        )
    results = read_object(folder / "results.json")
    labels = results["dev"].get("per_class") if isinstance(results.get("dev"), dict) else None
    if not isinstance(labels, dict) or len(labels) < task_of(config.data).least_labels:
        raise RunError(f"{folder / 'results.json'} is damaged: it has no labels of the dev split")
    return config, results


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object of a file of a run.

    Raises:
        RunError: when it is missing, damaged or endless.
    """
    return files.read_object(file, MAX_JSON, RunError)


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# What peft's adapter_config.json says of an adapter that irtune has written. Other settings of peft name modules to
# import or files to load.
WRITTEN = {"task_type", "peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
           "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "init_lora_weights", "use_dora",
           "use_rslora", "fan_in_fan_out", "target_parameters"}  # fmt: skip
# A list of layers, their numbers, and modules in them, as `adapters.targets.target_pattern` writes it.
PATTERN = re.compile(r"[\w\\.-]+\((\\d\+|[\d|]+)\)\\\.\([\w\\.|-]+\)")
NAME = re.compile(r"\w+(\.\w+)+")  # the full name of a module or a weight
MAX_RANK = 2**16
MAX_JSON = 2**26


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
    task: Task = SINGLE_LABEL

    def predict(self, examples: Sequence[Example], batch_size: int) -> Predictions:
        """Logits of `examples` in their order, whatever the batches and ranks. Collective."""
        encoded = [self.encoder.encode(example) for example in examples]
        check_tokens(self.classifier, [encoded])
        return predict(
            lambda batch: self.model(**batch).logits,
            encoded,
            [example.label for example in examples],
            len(self.labels),
            batch_size=batch_size,
            pad_token_id=int(self.classifier.tokenizer.pad_token_id),  # type: ignore[arg-type]
            device=self.device,
            padded=padded_lengths(self.config, self.device),
            task=self.task,
        )


def load_run(folder: Path, device: torch.device, dtype: str | None = None, trusted: Collection[str] = ()) -> LoadedRun:
    """Load the model of a finished run to `device`, in the number format it was trained in or in `dtype`.

    `trusted` are those of `RISKS` that the user, not the folder, asks for.

    Raises:
        RunError: when `folder` holds no finished run, or needs something that is not trusted.
        ModelError, CheckpointError: when the base model or the adapter cannot be loaded.
    """
    config, results = read_run(folder)
    check_trusted(folder, config, trusted)
    labels, task = list(results["dev"]["per_class"]), task_of(config.data, results)
    merged, adapter = is_merged(folder), adapter_folder(folder)
    if merged:
        _check_merged(folder, labels)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, name_or_path=str(folder)))
    else:
        peft = is_peft_adapter(adapter, folder)
        _check_sums(adapter, results.get("adapter_sha256"))
    rounded = config.model.quantization != "none"
    as_trained = dtype is None or rounded
    model_config = config.model if as_trained else dataclasses.replace(config.model, dtype=dtype)  # type: ignore[arg-type]
    classifier = load_classifier(model_config, labels, device, problem_type=task.problem_type)
    if dtype is not None and rounded:  # the weights that the adapter was trained on, in the wanted format
        from irtune.models.quantization import dequantize  # late: see irtune.cli

        dequantize(classifier.model, DTYPES[dtype])
    encoder = Encoder(classifier.tokenizer, config.data, labels, mask=needed_mask(config.model))
    model: nn.Module = classifier.model
    try:
        if not merged and peft:
            model = PeftModel.from_pretrained(classifier.model, str(adapter))  # type: ignore[arg-type]
        elif not merged:
            model = load_adapter(classifier, adapter)
        elif pooling_of(model) is not None:
            load_head(model, folder / HEAD_FILE)
    except IrtuneError:
        raise
    except Exception as error:  # peft and safetensors raise many kinds for files that are damaged or do not fit
        said = one_line(error)
        raise RunError(f"{adapter} does not fit {config.model.name_or_path}: {said}") from error
    return LoadedRun(folder, config, results, labels, classifier, model.eval().to(device), encoder, device, task)


def check_trusted(folder: Path, config: Config, trusted: Collection[str]) -> None:
    """Raise a RunError where the configuration in `folder` needs one of `RISKS` that is not in `trusted`."""
    for risk in RISKS:
        if getattr(config.model, risk, False) and risk not in trusted:
            raise RunError(
                f"{folder / 'config.yaml'} sets model.{risk}, which lets code that comes with a model run here; add "
                f"--{risk} to the command if you trust this folder and {config.model.name_or_path}"
            )


def adapter_folder(folder: Path) -> Path:
    """Where the adapter of a run is, or of an exported one, which has it beside its config.yaml."""
    return folder if (folder / ADAPTER_FILES[0]).is_file() else folder / "adapter"


def is_merged(folder: Path) -> bool:
    """Whether `folder` is an export whose adapter is part of the weights."""
    return (folder / "config.json").is_file() and not adapter_folder(folder).exists()


def _check_merged(folder: Path, labels: Sequence[str]) -> None:
    """Raise a RunError for links out of a merged export, and for a model with other labels than its results."""
    for file in folder.iterdir():
        if not file.resolve().is_relative_to(folder.resolve()):
            raise RunError(f"{file} is a link that leads out of the export, to {file.resolve()}")
    names = read_object(folder / "config.json").get("id2label")
    if names != {str(number): label for number, label in enumerate(labels)}:
        raise RunError(
            f"{folder / 'config.json'} has the labels {brief(names)}, and results.json {brief(list(labels))}; they do "
            "not belong together"
        )


# Ways of peft to draw first values, which leave the base's weights as they are.
DRAWN = (True, False, "gaussian", "orthogonal", "eva")


def is_peft_adapter(folder: Path, run: Path, *, values: bool = False) -> bool:
    """Whether `folder` holds an adapter of `run` in peft's format, and not in irtune's own.

    `values`: only its values are read, and peft does nothing with its settings, which may then be another program's.

    Raises:
        RunError: when it holds none, or one whose settings irtune does not know.
    """
    for file in (folder, *(folder / name for name in ADAPTER_FILES)):
        if not file.exists():
            raise RunError(f"{run} holds no adapter: there is no {file.relative_to(run)}")
        if not file.resolve().is_relative_to(run.resolve()):
            raise RunError(f"{file} is a link that leads out of the run's folder, to {file.resolve()}")
    record = read_object(folder / "adapter_config.json")
    if "peft_type" not in record:
        return False
    _check_record(record, folder / "adapter_config.json", values=values)
    return True


def check_will_load(model: nn.Module) -> None:
    """Look whether what a run with `model` will write can be loaded here again.

    Raises:
        RunError: naming the setting of peft that irtune never sets, so that something else has set it.
    """
    if isinstance(model, PeftModel):
        with tempfile.TemporaryDirectory() as folder:
            model.peft_config["default"].save_pretrained(folder)
            _check_record(read_object(Path(folder) / "adapter_config.json"), Path("adapter_config.json"))


def _check_record(record: dict[str, Any], file: Path, *, values: bool = False) -> None:
    """Raise a RunError for settings of peft that irtune never writes."""
    known = {name.upper() for name, kind in adapter_kinds().items() if kind.peft_format}
    given = record.get("peft_type")
    if not isinstance(given, str) or given not in known or given not in PeftType.__members__:
        raise RunError(f"{file} sets peft_type to {brief(given)}, which irtune never does")
    usual = {field.name: field for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(given)])}
    rules = {
        "r": lambda value: isinstance(value, int) and (1 if given == "LORA" else 0) <= value <= MAX_RANK,
        "target_modules": _are_places,
        "feedforward_modules": lambda value: value == [] or _are_places(value),
        "target_parameters": lambda value: value is None or _are_names(value),
        "init_lora_weights": lambda value: value in (True, False, "pissa"),
    }
    if values:
        rules |= {"target_modules": lambda _: True, "init_lora_weights": lambda value: value in (*DRAWN, "pissa")}
    for name, value in record.items():
        number = given != "LORA" and isinstance(value, int | float) and abs(value) <= MAX_RANK
        if name in usual and name not in {*WRITTEN, *rules} and value != _default(usual[name]) and not number:
            raise RunError(f"{file} sets {name} to {brief(value)}, which irtune never does")
    for name, accepts in rules.items():
        if name in usual and not accepts(record.get(name)):
            raise RunError(f"{file} sets {name} to {brief(record.get(name))}, which irtune never does")


def _are_places(value: Any) -> bool:
    """Whether `value` says which modules have an adapter, as irtune does."""
    return _are_names(value) or (isinstance(value, str) and PATTERN.fullmatch(value) is not None)


def _are_names(value: Any) -> bool:
    """Whether `value` lists modules or weights by their full names."""
    return isinstance(value, list) and all(isinstance(name, str) and NAME.fullmatch(name) for name in value)


def _check_sums(folder: Path, wanted: Any) -> None:
    """Raise a RunError for a file of the adapter whose SHA-256 is not the one in results.json (where there is one)."""
    for name, digest in wanted.items() if isinstance(wanted, dict) else ():
        if name in ADAPTER_FILES and fingerprint(folder / name)["sha256"] != digest:
            raise RunError(f"{folder / name} has a different checksum than when it was written; copy the run again")


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is dataclasses.MISSING:
        return field.default
    value = field.default_factory()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
