"""Write docs/models.md: tries every architecture of the zoo. `python docs/make_models.py > docs/models.md`, minutes.

With names of the zoo as arguments, only the table's rows for them.
"""

import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

from irtune.console import quiet_libraries  # isort: skip

quiet_libraries()  # before DeepSpeed is imported: standard output is the page
from irtune.adapters.build import adapter_traits, add_adapters
from irtune.adapters.guard import watch
from irtune.config import AdapterConfig, ModelConfig
from irtune.config.declarations import adapter_kinds
from irtune.engine.recompute import Recompute
from irtune.errors import IrtuneError
from irtune.models import load_classifier
from irtune.models.packing import cannot_pack
from tests.support import zoo

TEXTS = [{"input_ids": list(range(4, 4 + length))} for length in (5, 9, 17)]
LORAS = ("lora", "dora", "rslora", "pissa")
PAGE = """# Architectures that were tried

Each is a model of four layers with random weights (tests/support/zoo.py), loaded in fp32 on a CPU, given adapters, and
looked at by the guard of a run: a text must give the same logits alone and in a padded batch, fresh adapters must
change nothing, and each of their parameters must get a gradient. *attention*: what model.attn_implementation sdpa
becomes in bf16 on a CPU. *bf16*: whether the model computes in it. *refused*: adapter types that do not work, with
`r` 4 and otherwise their defaults; of those whose code is peft's, only `lora` and its variants are tried here. *nf4*:
LoRA over a base of 4 bits. *checkpointing*: LoRA with model.gradient_checkpointing. *without padding*: whether
`data.padding_free` trains it so.

Made by `python docs/make_models.py > docs/models.md`.

| class | attention | bf16 | adapter types refused | nf4 | checkpointing | without padding |
| --- | --- | --- | --- | --- | --- | --- |
"""


def tried(folder: Path, kind: str, dtype: str = "float32", quantization: Any = "none") -> Any:
    """The model with adapters of a type, looked at; an IrtuneError or another when it does not work."""
    config = ModelConfig(name_or_path=str(folder), dtype=dtype, quantization=quantization)  # type: ignore[arg-type]
    classifier = load_classifier(config, list(zoo.LABELS))
    classifier.tokenizer = zoo.tokenizer()  # some classes of transformers make other tokens of its file, or none
    guard = watch(classifier, TEXTS, patient=True)
    adapter = AdapterConfig(type=kind, r=4)
    model, table = add_adapters(classifier, adapter)
    assert guard is not None
    guard.check(model, table, adapter)
    return classifier, model, table


def works(*arguments: Any, **options: Any) -> bool:
    """Whether `tried` gets to its end; only what irtune refuses counts as no."""
    try:
        tried(*arguments, **options)
    except IrtuneError:
        return False
    return True


def checkpoints(folder: Path) -> bool:
    """Whether a step with recomputed activations gives the gradients of one without."""
    found = []
    for always in (False, True):
        torch.manual_seed(0)
        _, model, table = tried(folder, "lora")
        table.set_trainable(range(table.num_layers))
        model.train()
        recompute = Recompute(table.modules, reentrant=False, always=always, traits=adapter_traits(AdapterConfig(r=4)))
        recompute.set_trained(range(table.num_layers))
        ids = torch.arange(4, 24).view(2, 10)
        torch.manual_seed(1)
        model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.square().sum().backward()
        found.append({name: parameter.grad for layer in table.layers for name, parameter in layer})
    return all(torch.allclose(found[0][name], found[1][name], rtol=1e-4, atol=1e-6) for name in found[0])


def row(name: str, box: Path) -> str:
    """A line of the table."""
    folder = zoo.build(name, box)
    try:
        classifier = load_classifier(ModelConfig(name_or_path=str(folder)), list(zoo.LABELS))
    except IrtuneError as error:
        reason = str(error).partition(" is ")[2].partition(";")[0]
        return f"| {zoo.ZOO[name][1].__name__.removesuffix('Config')} | refused: {reason} | | | | | |"
    settings: Any = classifier.model.config
    here = [name for name, kind in adapter_kinds().items() if not kind.peft_format or name in LORAS]
    refused = [kind for kind in here if not works(folder, kind)]
    yes = {True: "yes", False: "no"}
    nf4 = works(folder, "lora", quantization="nf4")
    return (
        f"| {type(classifier.model).__name__} | {settings._attn_implementation} | "
        f"{yes[works(folder, 'lora', dtype='bfloat16')]} | {', '.join(refused) or 'none'} | {yes[nf4]} | "
        f"{yes[checkpoints(folder)]} | {yes[cannot_pack(classifier.model) is None]} |"
    )


def main(names: list[str]) -> None:
    """Print the page, or the rows of `names`."""
    logging.disable(logging.ERROR)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as box:
        rows = [row(name, Path(box)) for name in names or zoo.ZOO]
    sys.stdout.write(("" if names else PAGE) + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
