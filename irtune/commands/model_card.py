"""The README of an export: what the model is, what it learnt from, how good it is, and code that runs it."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from irtune.config import Config, ModelConfig
from irtune.config.declarations import adapter_kinds
from irtune.data import Encoder, Example
from irtune.tasks import task_of

PAIRS = (("He go to school every day.", "He goes to school every day."), ("", "A sentence was added here."))
FOLDER = "THIS_FOLDER"  # stands for the export's own folder in the code


def model_card(
    config: Config, results: dict[str, Any], encoder: Encoder, *, merged: bool, padding_side: str = "right"
) -> str:
    """The text of README.md. padding_side: where the model wants its padding, right or left."""
    labels = list(results["dev"]["per_class"])
    pooled = config.model.pooling != "class"
    task = task_of(config.data)
    base, peft = config.model.name_or_path, adapter_kinds()[config.adapter.type].peft_format and not pooled
    if task.name != "single_label":
        code = _irtune_code(config)
    elif pooled and merged and encoder.marks_edits:
        code = _pooled_code(config.model, labels)
    elif (merged or peft) and not pooled and _is_simple(encoder):
        code = _transformers_code(config, labels, encoder, merged=merged, padding_side=padding_side)
    else:
        code = _irtune_code(config)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    rows = [
        f"| {split} | {values['examples']} | " + " | ".join(f"{values[name]:.3f}" for name in task.headline) + " |"
        for split, values in results.items()
        if split in ("dev", "test")
    ]
    ever = [str(layer) for layer, steps in enumerate(results["steps_per_layer"]) if steps]
    prompt = "a template of its own" if config.data.template is not None else f"prompt `{config.data.prompt}`"
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
        f"{task.heading}: {', '.join(labels)}.",
        "",
        "## Data",
        "",
        f"{config.data.preset or Path(config.data.path or config.data.train or '').name}: "
        f"{'pairs of texts before and after a revision' if config.data.after else 'single texts'}, at most "
        f"{config.data.max_length} tokens, {prompt}."
        + (f" The class is read by pooling `{config.model.pooling}`." if pooled else ""),
        "",
        "## Metrics",
        "",
        f"| split | examples | {' | '.join(task.headline.values())} |",
        "| --- " * (2 + len(task.headline)) + "|",
        *rows,
        "",
        "## Use",
        "",
        f"On the command line: `python -m irtune predict --run {FOLDER} --input new.csv --output labelled.csv`. In "
        "Python:",
        "",
        f"{fence}python",
        code,
        fence,
        "",
        "## Licence",
        "",
        "That of the base model and of the corpus; irtune itself is Apache-2.0.",
        "",
    ])  # fmt: skip


def _is_simple(encoder: Encoder) -> bool:
    """Whether the code of `_transformers_code` makes the token ids that the encoder makes."""
    for before, after in PAIRS:
        example = Example("1", before if encoder.has_pair else before + "a", after if encoder.has_pair else None, 0)
        first, second = (encoder.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
                         for text in (example.before, example.after or ""))  # fmt: skip
        ids = encoder.head + first + encoder.middle + second + encoder.tail
        if len(ids) <= encoder.max_length and encoder.encode(example)["input_ids"] != ids:
            return False
    return True


def _transformers_code(
    config: Config, labels: Sequence[str], encoder: Encoder, *, merged: bool, padding_side: str
) -> str:
    """Code that needs transformers (and peft) only and gives the run's probabilities for two examples."""
    trust = ", trust_remote_code=True" if config.model.trust_remote_code else ""
    adapter = [] if merged else [f'model = PeftModel.from_pretrained(model, "{FOLDER}")']
    rounded = config.model.quantization
    written = encoder.tokenizer.decode(
        [*encoder.head, *_ids(encoder, "BEFORE"), *encoder.middle, *_ids(encoder, "AFTER"), *encoder.tail]
    )
    return "\n".join([
        "import torch",
        *([] if merged else ["from peft import PeftModel"]),
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        f"BASE = {(FOLDER if merged else config.model.name_or_path)!r}",
        f"LABELS = {list(labels)!r}",
        f"MAX_LENGTH = {encoder.max_length}",
        f"# {'A pair' if encoder.has_pair else 'A text'} is written as {written!r}. These tokens are never cut:",
        f"HEAD, MIDDLE, TAIL = {encoder.head}, {encoder.middle}, {encoder.tail}",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained(BASE{trust})",
        "tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token",
        *([] if merged or rounded == "none" else [f"# The base was in {rounded}: numbers differ a little."]),
        "model = AutoModelForSequenceClassification.from_pretrained(",
        "    BASE,",
        f"    dtype=torch.{'float32' if merged else config.model.dtype},",
        "    id2label=dict(enumerate(LABELS)),",
        "    label2id={label: number for number, label in enumerate(LABELS)},",
        *([] if merged else ["    ignore_mismatched_sizes=True,  # the head comes with the adapter"]),
        *(["    trust_remote_code=True,"] if trust else []),
        ")",
        "model.config.pad_token_id = tokenizer.pad_token_id",
        *adapter,
        "model.eval()",
        "",
        "",
        "def ids(text):",
        '    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]',
        "",
        "",
        *(_encode_pair(encoder) if encoder.has_pair else _encode_text()),
        "",
        "",
        *_examples(encoder.has_pair),
        "encoded = [encode(*example) for example in examples]",
        f'batch = tokenizer.pad(encoded, padding_side="{padding_side}", return_tensors="pt")',
        "with torch.no_grad():",
        "    probabilities = model(**batch).logits.softmax(-1)",
        "for example, row in zip(examples, probabilities):",
        "    print(model.config.id2label[int(row.argmax())], round(float(row.max()), 3), example)",
    ])  # fmt: skip


def _ids(encoder: Encoder, text: str) -> list[int]:
    return (
        encoder.tokenizer(text, add_special_tokens=False)["input_ids"] if encoder.has_pair or text == "BEFORE" else []
    )


def _examples(pair: bool) -> list[str]:
    examples = [example if pair else example[1:] for example in PAIRS]
    return ["examples = [", *(f"    {example!r}," for example in examples), "]"]


def _encode_pair(encoder: Encoder) -> list[str]:
    types = [1] * len(encoder.tail) if encoder.tail_types is None else encoder.tail_types
    kinds = f"[0] * len(HEAD + first + MIDDLE) + [1] * len(second) + {types}"
    return [
        "def encode(before, after):",
        "    first, second = ids(before), ids(after)",
        "    while len(HEAD + first + MIDDLE + second + TAIL) > MAX_LENGTH:  # the longer text loses its end",
        "        (first if len(first) > len(second) else second).pop()",
        "    encoded = {\"input_ids\": HEAD + first + MIDDLE + second + TAIL}",
        *([f'    encoded["token_type_ids"] = {kinds}'] if encoder.token_types else []),
        "    return encoded",
    ]  # fmt: skip


def _encode_text() -> list[str]:
    return [
        "def encode(text):",
        '    return {"input_ids": HEAD + ids(text)[: MAX_LENGTH - len(HEAD + TAIL)] + TAIL}',
    ]


def _irtune_code(config: Config) -> str:
    """Code for what only irtune can load, or decide."""
    task = task_of(config.data)
    pair = config.data.after is not None
    trust = [risk for risk in ("trust_remote_code", "allow_pickle") if getattr(config.model, risk)]
    more = f", trusted={trust!r}" if trust else ""
    return "\n".join([
        "from pathlib import Path",
        "",
        "import torch",
        "from irtune.data import Example",
        "from irtune.evaluation.saved_run import load_run",
        "",
        f'run = load_run(Path("{FOLDER}"), torch.device("cpu"){more})',
        *_examples(pair),
        f"rows = [Example(str(number), {'*example' if pair else 'example[0], None'}, {task.blank!r}) "
        "for number, example in enumerate(examples)]",
        "probabilities = run.predict(rows, batch_size=16).probabilities",
        "for example, row in zip(examples, probabilities):",
        "    print(run.labels[int(row.argmax())], round(float(row.max()), 3), example)"
        if task.name == "single_label"
        else '    print(run.task.written(row, run.labels)["predicted"], example)',
    ])  # fmt: skip


def _pooled_code(config: ModelConfig, labels: Sequence[str]) -> str:
    """Code that needs transformers only and calls a merged model whose class is read by a pooling."""
    parts = {
        "last": "states[-1]",
        "cls": "states[0]",
        "mean": "states.mean(0)",
        "edit": "states[edits if any(edits) else slice(None)].mean(0)",
    }
    features = ", ".join(parts[part] for part in config.pooling.split("+"))
    layers = 'linear(features, head["0.weight"], head["0.bias"])'
    if config.head == "mlp":
        layers = f'linear(gelu({layers}), head["2.weight"], head["2.bias"])'
    finds = r"""re.finditer(r"\[-.*?-\]|\{\+.*?\+\}", text, re.DOTALL)"""
    return textwrap.dedent(f"""\
        import re

        import torch
        from safetensors.torch import load_file
        from torch.nn.functional import gelu, linear
        from transformers import AutoModel, AutoTokenizer

        tokenizer, body = AutoTokenizer.from_pretrained("THIS_FOLDER"), AutoModel.from_pretrained("THIS_FOLDER")
        head = load_file("THIS_FOLDER/head.safetensors")
        text = "the [-blue-]{{+red+}} house"  # of a pair; irtune.data.diff writes it: render(diff(before, after)).text
        encoded = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
        places = encoded.pop("offset_mapping")[0].tolist()
        spans = [found.span() for found in {finds}]
        edits = [any(a < end and start < b for start, end in spans) for a, b in places]
        with torch.no_grad():
            states = body(**encoded).last_hidden_state[0]
            features = torch.cat([{features}])
            logits = {layers}
        print({list(labels)!r}[logits.argmax()])""")
