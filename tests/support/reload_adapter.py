"""Load the adapters of runs with peft alone and predict their dev splits: a line of JSON for each run.

python -m tests.support.reload_adapter BASE CORPUS RUN DTYPE [RUN DTYPE ...]
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from irtune.config import load_config
from irtune.data import Encoder, collate, evaluation_batches, read_corpus


def predict(base: Path, corpus_folder: Path, run: Path, dtype: str) -> dict:
    config = load_config(["--config", str(run / "config.yaml"), "--data.path", str(corpus_folder)])
    corpus = read_corpus(config.data)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(corpus.labels), dtype=getattr(torch, dtype)
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    model.config.pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(model, run / "adapter").eval()
    encoder = Encoder(tokenizer, config.data, corpus.labels)
    # In bfloat16 the last bits depend on the company in a batch, so the batches are those of the run.
    examples = corpus.splits["dev"]
    encoded = [encoder.encode(example) for example in examples]
    world = json.loads((run / "results.json").read_text())["world_size"]
    lengths = [len(item["input_ids"]) for item in encoded]
    size = 2 * config.optim.micro_batch_size
    batches = [batch for rank in range(world) for batch in evaluation_batches(lengths, size, rank, world)]
    probabilities: list[list[float]] = [[] for _ in examples]
    right = 0
    for batch in batches:
        if not batch:
            continue
        with torch.no_grad():
            logits = model(**collate([encoded[i] for i in batch], tokenizer.pad_token_id)).logits.float()
        for i, row in zip(batch, logits):
            probabilities[i] = row.softmax(-1).tolist()
            right += int(row.argmax()) == examples[i].label
    return {"accuracy": right / len(probabilities), "probabilities": probabilities}


if __name__ == "__main__":
    base, corpus, *runs = sys.argv[1:]
    for run, dtype in zip(runs[::2], runs[1::2], strict=True):
        sys.stdout.write(json.dumps(predict(Path(base), Path(corpus), Path(run), dtype)) + "\n")
