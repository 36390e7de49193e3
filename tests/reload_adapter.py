"""Load a run's adapter with peft alone and predict its dev split: python -m tests.reload_adapter RUN BASE CORPUS"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from irtune.config import load_config
from irtune.data import Encoder, collate, read_corpus

run, base, corpus_folder = map(Path, sys.argv[1:4])
config = load_config(["--config", str(run / "config.yaml"), "--data.path", str(corpus_folder)])
corpus = read_corpus(config.data)
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(corpus.labels), dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(base)
model.config.pad_token_id = tokenizer.pad_token_id
model = PeftModel.from_pretrained(model, run / "adapter").eval()
encoder = Encoder(tokenizer, config.data, corpus.labels)
probabilities, right = [], 0
for example in corpus.splits["dev"]:
    with torch.no_grad():
        logits = model(**collate([encoder.encode(example)], tokenizer.pad_token_id)).logits[0]
    probabilities.append(logits.softmax(-1).tolist())
    right += int(logits.argmax()) == example.label
sys.stdout.write(json.dumps({"accuracy": right / len(probabilities), "probabilities": probabilities}) + "\n")
