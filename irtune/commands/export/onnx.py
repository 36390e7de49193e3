"""The whole model of a run, head and pooling included, as an ONNX graph, checked with onnxruntime."""

import importlib.util
import json
import logging
import warnings
from pathlib import Path

import torch
from torch import nn

from irtune.errors import ConfigError, RunError, one_line
from irtune.evaluation.saved_run import LoadedRun

FILE = "model.onnx"
NEEDED = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # largest difference of a logit
ONE_FILE = 2**30  # bytes of weights; a file of protobuf holds 2 GiB at most
INPUTS = {
    "input_ids": "token ids",
    "attention_mask": "1 for tokens, 0 for padding, on the right",
    "token_type_ids": "0 for the first text, 1 for the second",
    "edit_mask": "1 for tokens of marked edits, 0 for others",
    "side_mask": "1 for tokens of the old text, 2 for those of the new one, 0 for others",
}


def check_installed() -> None:
    """Raise a ConfigError where a package is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"export --onnx needs {' and '.join(missing)}: pip install 'irtune[onnx]'")


class _Logits(nn.Module):
    """A model that takes its inputs by position and returns its logits."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        """Tensors [batch, length], in the order of `names`, to logits [batch, classes]."""
        return self.model(**dict(zip(self.names, given))).logits


def write_graph(
    run: LoadedRun, model: nn.Module, batch: dict[str, torch.Tensor], wanted: torch.Tensor, file: Path
) -> list[str]:
    """Write `model` to `file`, for any batch and length; returns the names of its inputs.

    Args:
        run: whose labels and length go into the file's metadata.
        model: takes a batch and returns an object with `logits`.
        batch: an example of what it takes, with padding.
        wanted: its logits [batch, classes].

    Raises:
        RunError: where torch cannot export the model, or the graph does not give `wanted`, for all examples together
            and for each alone.
    """
    given = {name: tensor.clone() for name, tensor in batch.items()}  # without collate's notes
    names = list(given)
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    logger = logging.getLogger("torch.onnx")  # tells of operators of torchvision that it does without
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Logits(model, names).eval(), tuple(given.values()), dynamo=True, input_names=names,
                output_names=["logits"], dynamic_shapes=[(free,) * len(names)], verbose=False,
            )  # fmt: skip
            assert program is not None
            facts = {"labels": run.labels, "max_length": run.config.data.max_length}
            program.model.metadata_props.update({name: json.dumps(value) for name, value in facts.items()})
            program.save(file, external_data=weights > ONE_FILE)
    except Exception as error:  # what a model's own code cannot be traced through has many kinds
        raise RunError(
            f"torch cannot export {type(model).__name__} with adapter.type {run.config.adapter.type} to ONNX: "
            f"{one_line(error)}"
        ) from error
    finally:
        logger.setLevel(level)
    difference = _difference(given, wanted, file)
    if not difference <= TOLERANCE:
        raise RunError(f"the ONNX graph of {type(model).__name__} gives other logits: they differ by {difference:.1e}")
    return names


def _difference(given: dict[str, torch.Tensor], wanted: torch.Tensor, file: Path) -> float:
    """The largest difference between logits of the graph and `wanted`: together, and each alone without padding."""
    # Imported late: it is an extra.
    from onnxruntime import InferenceSession

    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    lengths = given["attention_mask"].sum(1).tolist()
    alone = [
        {name: tensor[row : row + 1, :length] for name, tensor in given.items()} for row, length in enumerate(lengths)
    ]
    found = [
        torch.from_numpy(session.run(["logits"], {name: tensor.numpy() for name, tensor in feed.items()})[0])
        for feed in (given, *alone)
    ]
    return max(float((found[0] - wanted).abs().max()), float((torch.cat(found[1:]) - wanted).abs().max()))


def section(inputs: list[str]) -> str:
    """The card's list of inputs."""
    rows = "\n".join(f"| `{name}` | {INPUTS[name]} |" for name in inputs)
    return (
        f"`{FILE}` takes int64 tensors [batch, length] of any batch and length:\n\n| input | meaning |\n| --- | --- |\n"
        f"{rows}\n\nIt gives `logits`, float32 [batch, classes]. Its metadata hold `labels` and `max_length` as JSON."
    )
