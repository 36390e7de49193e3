"""The README of an export: what the model is, what it learnt from, how good it is, and code that runs it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from irtune.config import Config, ModelConfig
from irtune.config.declarations import adapter_kinds
from irtune.data import Encoder, Example
from irtune.tasks import task_of

PAIRS = (("He go to school every day.", "He goes to school every day."), ("", "A sentence was added here."))
Form = Literal["adapter", "merged", "onnx"]
FOLDER = "THIS_FOLDER"  # stands for the export's own folder in the code


CARD = """\
---
base_model: {base}
library_name: {library}
pipeline_tag: text-classification
tags: [irtune, text-revision]
---

# {name}

{what} ({adapter}) of {base}, trained with irtune {version}: method {method}, {steps} steps, on average \
{average:.1f} of {layers} layers per step. Layers ever trained: {ever}.

{heading}: {classes}.

## Data

{data}: {texts}, at most {length} tokens, {prompt}.{pooling}

## Metrics

| split | examples | {metrics} |
| {line}
{rows}

## Use

{use}

{fence}python
{code}
{fence}

{more}

## Licence

That of the base model and of the corpus; irtune itself is Apache-2.0.
"""


COMMAND = (
    f"On the command line: `python -m irtune predict --run {FOLDER} --input new.csv --output labelled.csv`. In Python:"
)
GRAPH = "In Python, with onnxruntime and transformers:"


def model_card(
    config: Config, results: dict[str, Any], encoder: Encoder, *, form: Form, more: str, padding_side: str = "right"
) -> str:
    """The text of README.md. more: a section after the code. padding_side: where the model wants it, right or left."""
    merged = form == "merged"
    labels, data, pooled = list(results["dev"]["per_class"]), config.data, config.model.pooling != "class"
    task, peft = task_of(data), adapter_kinds()[config.adapter.type].peft_format and not pooled
    if form == "onnx":
        code = _onnx_code(config, labels, encoder)
    elif task.name != "single_label":
        code = _irtune_code(config)
    elif pooled and merged and encoder.mask == "edit_mask" and not encoder.has_context:
        code = _pooled_code(config.model, labels)
    elif (merged or peft) and not pooled and _is_simple(encoder):
        code = _transformers_code(config, labels, encoder, merged=merged, padding_side=padding_side)
    else:
        code = _irtune_code(config)
    rows = [
        f"| {split} | {values['examples']} | " + " | ".join(f"{values[name]:.3f}" for name in task.headline) + " |"
        for split, values in results.items()
        if split in ("dev", "test")
    ]
    ever = [str(layer) for layer, steps in enumerate(results["steps_per_layer"]) if steps]
    return CARD.format(
        base=config.model.name_or_path,
        library="onnx" if form == "onnx" else "transformers" if merged else "peft" if peft else "irtune",
        name=Path(config.run.output_dir).name,
        what={"adapter": "Adapter", "merged": "Merged model", "onnx": "ONNX graph"}[form],
        adapter=config.adapter.type,
        version=results["versions"]["irtune"],
        method=config.tuning.method,
        steps=results["steps"],
        average=results["layers_trained_per_step"],
        layers=results["num_layers"],
        ever=", ".join(ever) or "none",
        heading=task.heading,
        classes=", ".join(labels),
        data=data.preset or Path(data.path or data.train or "").name,
        texts=("pairs of texts before and after a revision" if data.after else "single texts")
        + (" with the text around them" if data.context else ""),
        length=data.max_length,
        prompt="a template of its own" if data.template is not None else f"prompt `{data.prompt}`",
        pooling=f" The class is read by pooling `{config.model.pooling}`." if pooled else "",
        metrics=" | ".join(task.headline.values()),
        line="--- |" + " --- |" * (1 + len(task.headline)),
        rows="\n".join(rows),
        use=GRAPH if form == "onnx" else COMMAND,
        more=more,
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0)),
        code=code,
    )


def _is_simple(encoder: Encoder) -> bool:
    """Whether the code of `_transformers_code` makes all that the encoder makes."""
    if encoder.mask is not None or encoder.has_context:
        return False
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
    return "\n".join([
        "import torch",
        *([] if merged else ["from peft import PeftModel"]),
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        f"BASE = {(FOLDER if merged else config.model.name_or_path)!r}",
        f"LABELS = {list(labels)!r}",
        *_around(encoder),
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
        "model.config.get_text_config().pad_token_id = tokenizer.pad_token_id",
        *adapter,
        "model.eval()",
        *_encoding(encoder),
        f'batch = tokenizer.pad(encoded, padding_side="{padding_side}", return_tensors="pt")',
        "with torch.no_grad():",
        "    probabilities = model(**batch).logits.softmax(-1)",
        "for example, row in zip(examples, probabilities):",
        "    print(model.config.id2label[int(row.argmax())], round(float(row.max()), 3), example)",
    ])  # fmt: skip


def _onnx_code(config: Config, labels: Sequence[str], encoder: Encoder) -> str:
    """Code that needs onnxruntime and transformers only and gives the run's logits."""
    start = [
        "import numpy as np",
        "from onnxruntime import InferenceSession",
        "from transformers import AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{FOLDER}")',
        f'session = InferenceSession("{FOLDER}/model.onnx", providers=["CPUExecutionProvider"])',
        f"LABELS = {list(labels)!r}",
    ]
    run = 'logits = session.run(["logits"], {one.name: batch[one.name] for one in session.get_inputs()})[0]'
    show = {
        "single_label": ["print([LABELS[row.argmax()] for row in logits])"],
        "multi_label": ["print([[name for name, value in zip(LABELS, row) if value > 0] for row in logits])"],
        "regression": ["print(logits[:, 0])"],
    }[task_of(config.data).name]
    if encoder.is_diff and not encoder.has_context:
        edits = ['batch["edit_mask"] = np.array([edits], dtype=np.int64)'] if encoder.mask else []
        return "\n".join(["import re", "", *start, *_marked("batch", "np"), *edits, run, *show])
    if not _is_simple(encoder):
        made = "# batch: what irtune makes of texts, load_run(RUN, DEVICE).encoder.encode(EXAMPLE), padded."
        return "\n".join([*start, made, run, *show])
    batch = 'batch = tokenizer.pad(encoded, padding_side="right", return_tensors="np")'
    return "\n".join([*start, *_around(encoder), *_encoding(encoder), batch, run, *show])


def _around(encoder: Encoder) -> list[str]:
    """Constants for `_encoding`."""
    written = encoder.tokenizer.decode(
        [*encoder.head, *_ids(encoder, "BEFORE"), *encoder.middle, *_ids(encoder, "AFTER"), *encoder.tail]
    )
    return [
        f"MAX_LENGTH = {encoder.max_length}",
        f"# {'A pair' if encoder.has_pair else 'A text'} is written as {written!r}. These tokens are never cut:",
        f"HEAD, MIDDLE, TAIL = {encoder.head}, {encoder.middle}, {encoder.tail}",
    ]


def _encoding(encoder: Encoder) -> list[str]:
    """Code from two examples to their token ids."""
    return [
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
    ]


def _marked(encoded: str, tensors: str) -> list[str]:
    """Code from a text with marked edits to its token ids, and `edits`, which says which of them are of edits."""
    finds = r"""re.finditer(r"\[-.*?-\]|\{\+.*?\+\}", text, re.DOTALL)"""
    return [
        'text = "the [-blue-]{+red+} house"  # of a pair; irtune.data.diff writes it: render(diff(before, after)).text',
        f'{encoded} = tokenizer(text, return_tensors="{tensors}", return_offsets_mapping=True)',
        f'places = {encoded}.pop("offset_mapping")[0].tolist()',
        f"spans = [found.span() for found in {finds}]",
        "edits = [any(a < end and start < b for start, end in spans) for a, b in places]",
    ]


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
    pair, more_text = config.data.after is not None, ", context=CONTEXT" if config.data.context is not None else ""
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
        *(['CONTEXT = "What is around the text."'] if more_text else []),
        *_examples(pair),
        f"rows = [Example(str(number), {'*example' if pair else 'example[0], None'}, {task.blank!r}{more_text}) "
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
    return "\n".join([
        "import re",
        "",
        "import torch",
        "from safetensors.torch import load_file",
        "from torch.nn.functional import gelu, linear",
        "from transformers import AutoModel, AutoTokenizer",
        "",
        f'tokenizer, body = AutoTokenizer.from_pretrained("{FOLDER}"), AutoModel.from_pretrained("{FOLDER}")',
        f'head = load_file("{FOLDER}/head.safetensors")',
        *_marked("encoded", "pt"),
        "with torch.no_grad():",
        "    states = body(**encoded).last_hidden_state[0]",
        f"    features = torch.cat([{features}])",
        f"    logits = {layers}",
        f"print({list(labels)!r}[logits.argmax()])",
    ])  # fmt: skip
