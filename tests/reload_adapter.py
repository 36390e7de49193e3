"""Load a run's adapter with peft alone and predict its dev split.

python -m tests.reload_adapter RUN BASE CORPUS DTYPE
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from irtune.config import load_config
from irtune.data import Encoder, collate, evaluation_batches, read_corpus

run, base, corpus_folder = map(Path, sys.argv[1:4])
config = load_config(["--config", str(run / "config.yaml"), "--data.path", str(corpus_folder)])
corpus = read_corpus(config.data)
model = AutoModelForSequenceClassification.from_pretrained(
    base, num_labels=len(corpus.labels), dtype=getattr(torch, sys.argv[4])
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
sys.stdout.write(json.dumps({"accuracy": right / len(probabilities), "probabilities": probabilities}) + "\n")
