"""Write the table of all adapter types in docs/adapters.md: `python docs/make_adapters.py`, a minute.

Parameters are counted on the meta device, where no weights are.
"""

import logging
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from irtune.adapters import add_adapters
from irtune.config import ModelConfig, load_config
from irtune.config.declarations import adapter_kinds
from irtune.memory.meta_attention import stand_in, traceable, without_values
from irtune.models import Classifier
from irtune.models.skeleton import SHAPES, empty_classifier
from tests.support import zoo

PAGE = Path(__file__).parent / "adapters.md"
PLACE = re.compile(r"(?<=<!-- docs/make_adapters.py -->\n).*?(?=<!-- end -->\n)", re.DOTALL)
HEADER = """\
| type | what trains | SmolLM2-135M | Llama-3.1-8B | in layers | ZeRO | nf4, int8 | format | source | licence |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""
SMOLLM2 = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
           "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}  # fmt: skip
MODELS = ("smollm2", "meta-llama/Llama-3.1-8B")


def parameters(name: str, model: str) -> tuple[int, bool]:
    """Trained parameters of a type at its defaults beside the head, and whether layers hold any."""
    SHAPES["smollm2"] = ("llama", SMOLLM2)
    adapter = load_config([f"--adapter.type={name}", "--data.path=corpus"]).adapter
    adapter.type = adapter_kinds()[name].shapes_of or name
    settings = ModelConfig(name_or_path=model)
    with without_values():
        empty, anatomy = empty_classifier(
            settings, ["one", "two"], lambda kind: stand_in("sdpa", torch.bfloat16, "cuda", kind)
        )
        with torch.device("meta"), traceable(empty):
            _, table = add_adapters(Classifier(empty, zoo.tokenizer(), anatomy), adapter)
    outside = [p for full, p in table.head if not any(f".{head}." in f".{full}" for head in anatomy.head)]
    layers = [p for layer in table.layers for _, p in layer]
    return sum(p.numel() for p in [*layers, *outside]), bool(layers)


def row(name: str, models: Iterable[str] = MODELS) -> str:
    """A line of the table; what is only known of models that are not asked for is ... there."""
    kind = adapter_kinds()[name]
    counted = {model: parameters(name, model) for model in models}
    numbers = [f"{counted[model][0]:,}" if model in counted else "..." for model in MODELS]
    cells = [
        f"`{name}`",
        kind.summary,
        *numbers,
        "..." if not counted else "yes" if next(iter(counted.values()))[1] else "no",
        "0 to 2" if kind.whole_weights else "0 to 3",
        "no" if kind.needs_plain_base else "yes",
        "peft's" if kind.peft_format else "irtune's",
        kind.source,
        kind.licence,
    ]
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    """Put the table into the page."""
    logging.disable(logging.ERROR)
    warnings.filterwarnings("ignore")
    table = HEADER + "".join(row(name) for name in adapter_kinds())
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(PLACE.sub(lambda _: table, page), encoding="utf-8")


if __name__ == "__main__":
    main()
