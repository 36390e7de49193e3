"""Tiny random models of many architectures, and a small made-up corpus for them.

python -m tests.support.zoo OUT [NAME ...]      writes OUT/NAME for each, and OUT/corpus
"""

import functools
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

WORDS = ["the", "a", "blue", "old", "stone", "house", "river", "walks", "slowly", "over", "under", "bright", "words",
         "text"]  # fmt: skip
MARKS = ["Text", "before:", "after:", "Revision", "<", "/", ">", "new", "[-", "-]", "{+", "+}"]
START, END, PAD, VOCABULARY = 1, 2, 3, 342
LABELS = ("style", "clarity", "fluency")

_BASE = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
_SHAPE = _BASE | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
                  "max_position_embeddings": 512}  # fmt: skip
DECODER = _SHAPE | {"num_key_value_heads": 2, "head_dim": 8}
_NARROW = _BASE | {"n_layer": 4, "n_head": 4}
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
           "image_size": 56, "patch_size": 14}  # fmt: skip
_DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False,
            "type_vocab_size": 0, "share_att_key": True, "norm_rel_ebd": "layer_norm",
            "position_buckets": 32}  # fmt: skip
# Class whose weights are saved, class of the configuration, its settings.
ZOO: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gpt2": (AutoModelForCausalLM, transformers.GPT2Config, _NARROW | {"n_embd": 32, "n_positions": 512}),
    "qwen2": (AutoModelForCausalLM, transformers.Qwen2Config, DECODER),
    "gemma2": (AutoModelForCausalLM, transformers.Gemma2Config,
               DECODER | {"sliding_window": 16, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "mixtral": (AutoModelForCausalLM, transformers.MixtralConfig,
                DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "bloom": (AutoModelForCausalLM, transformers.BloomConfig, _NARROW | {"hidden_size": 32}),
    "falcon": (AutoModelForCausalLM, transformers.FalconConfig,
               _BASE | {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}),
    "bert": (AutoModelForMaskedLM, transformers.BertConfig, _SHAPE | {"type_vocab_size": 2}),
    "roberta": (AutoModelForMaskedLM, transformers.RobertaConfig,
                _SHAPE | {"max_position_embeddings": 514, "type_vocab_size": 1}),
    "deberta2": (AutoModelForMaskedLM, transformers.DebertaV2Config, _SHAPE | _DEBERTA),
    "modernbert": (AutoModelForMaskedLM, transformers.ModernBertConfig,
                   _SHAPE | {"local_attention": 16, "cls_token_id": START, "sep_token_id": END}),
    "mpnet": (AutoModelForMaskedLM, transformers.MPNetConfig, _SHAPE | {"max_position_embeddings": 514}),
    "xlnet": (AutoModelForCausalLM, transformers.XLNetConfig, _NARROW | {"d_model": 32, "d_inner": 64}),
    "jamba": (AutoModelForCausalLM, transformers.JambaConfig,
              DECODER | {"num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 4, "mamba_dt_rank": 4,
                          "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    "t5": (transformers.T5ForConditionalGeneration, transformers.T5Config,
           _BASE | {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4,
                    "decoder_start_token_id": PAD}),
    "gemma3": (transformers.Gemma3ForConditionalGeneration, transformers.Gemma3Config,
               {"text_config": DECODER | {"sliding_window": 16}, "vision_config": _VISION,
                "mm_tokens_per_image": 4}),
}  # fmt: skip


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, which all classes of models read alike; ids 1, 2 and 3 are start, end and padding."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        show_progress=False,
    )
    raw.train_from_iterator([" ".join(["", *WORDS, *MARKS])] * 50, trainer)
    marks = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **marks)


def build(name: str, out: Path) -> Path:
    """One model of four layers, weights normal with deviation 0.2, with the tokenizer beside it."""
    folder = out / name
    if (folder / "model.safetensors").exists():
        return folder
    kind, config, settings = ZOO[name]
    torch.manual_seed(0)
    shape = config(**settings)
    model = kind.from_config(shape) if hasattr(kind, "from_config") else kind(shape)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def corpus(folder: Path, train: int = 48, dev: int = 17) -> Path:
    """Revision pairs of three labels, seeded."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("dev", dev)):
        lines = []
        for number in range(count):
            before = [draw.choice(WORDS) for _ in range(draw.randint(3, 14))]
            after = list(before)
            if number % 3 == 0:
                after[0] = draw.choice(WORDS)
            elif number % 3 == 1:
                after = after[: len(after) // 2]
            else:
                after.append(draw.choice(WORDS))
            lines.append({"before": " ".join(before), "after": " ".join(after), "label": LABELS[number % 3]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


if __name__ == "__main__":
    corpus(Path(sys.argv[1]) / "corpus")
    for wanted in sys.argv[2:] or ZOO:
        print(build(wanted, Path(sys.argv[1])))
