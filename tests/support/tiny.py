"""A tiny model with a tokenizer, a tiny corpus, and configurations for them."""

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from irtune.adapters import adapter_traits, add_adapters
from irtune.config import AdapterConfig, Config, ModelConfig, OptimConfig, load_config
from irtune.data.synthetic import synthetic_pairs, write_corpus
from irtune.distributed import runtime
from irtune.engine import Engine
from irtune.models import load_classifier
from irtune.models.anatomy import output_projections
from irtune.selection.scores import LayerScores

LAYERS = 6


def save_model(
    folder: Path,
    kind: str = "llama",
    layers: int = LAYERS,
    hidden: int = 32,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """A randomly initialised model of `layers` layers in fp32, without a head, with a word-level tokenizer."""
    tokenizer = tokenizer or _word_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(7)
    size, pad = len(tokenizer), tokenizer.pad_token_id
    builders = {
        "llama": lambda: LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
                num_attention_heads=4, num_key_value_heads=2, pad_token_id=pad,
            )
        ),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=size, n_embd=hidden, n_layer=layers, n_head=4, pad_token_id=pad, resid_pdrop=0.0,
                       embd_pdrop=0.0, attn_pdrop=0.0)
        ),
        "bert": lambda: BertModel(
            BertConfig(
                vocab_size=size, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
                intermediate_size=2 * hidden, pad_token_id=pad, hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        ),
    }  # fmt: skip
    builders[kind]().save_pretrained(folder)
    return folder


def _word_tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({w for row in synthetic_pairs(200) for w in row["before"].split() + row["after"].split()})
    vocabulary = {word: number for number, word in enumerate(["<unk>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer as GPT-2's, of single letters and some merged words: no text is unknown to it."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<pad>"]
    )
    line = "far near one two three red blue house the end is rest [- -] {+ +} …"
    raw.train_from_iterator([line] * 50 + [row["before"] for row in synthetic_pairs(100)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>")


def save_corpus(folder: Path, train: int = 64, dev: int = 20, test: int = 15) -> Path:
    """A small synthetic corpus."""
    write_corpus(folder, train, dev, test)
    return folder


def engine_json(folder: Path, stage: int) -> Path:
    """A DeepSpeed file for `stage`. Tiny adapters would all stay whole under ZeRO 3 and hide errors: not here."""
    file = folder / f"zero{stage}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}))
    return file


def tiny_config(model: Path, corpus: Path, output: Path, stage: int = 2, **overrides: Any) -> Config:
    """A configuration of a short fp32 run; `section__key=value` overrides."""
    values = {
        "model.name_or_path": model,
        "model.dtype": "float32",
        "adapter.r": 4,
        "data.path": corpus,
        "data.max_length": 64,
        "data.padding_free": "false",
        "data.prompt": "tagged",
        "model.pooling": "class",
        "tuning.interval": 2,
        "optim.lr": 0.01,
        "optim.warmup_steps": 0,
        "optim.max_steps": 6,
        "optim.micro_batch_size": 4,
        "run.output_dir": output,
        "run.log_every": 1,
        "run.eval_every": 3,
        "run.timeout_seconds": 60,
        "deepspeed": engine_json(output.parent, stage),
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config([f"--{key}={value}" for key, value in values.items()])


class Rig:
    """An engine over a tiny model, fed with seeded micro-batches, for tests that look at weights and bytes."""

    def __init__(self, model: Path, stage: int, dtype: str = "float32", accumulation: int = 1, **options: Any):
        """`dtype`: float32; bfloat16 or float16 (adapters too); or mixed (fp32 adapters over a bf16 model).

        Options: quantization and compile, for the model; adapter, a map of settings; zero, a map of the JSON's;
        sharded, to load weights in shares under ZeRO 3, as runs do; weight_decay; others are Engine's.
        """
        self.world = runtime.read_world()
        runtime.start(self.world, 60)
        runtime.seed_everything(0, deterministic=False)
        base = "bfloat16" if dtype == "mixed" else dtype
        own = {name: options.pop(name) for name in ("quantization", "compile") if name in options}
        config = ModelConfig(name_or_path=str(model), dtype=base, **own)
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0} | options.pop("zero", {})
        sharded = zero if options.pop("sharded", False) and stage == 3 else None
        self.classifier = load_classifier(config, ["a", "b", "c"], sharded=sharded)
        adapter = AdapterConfig(
            **{"r": 4, "dtype": "model" if dtype in ("bfloat16", "float16") else "float32"} | options.pop("adapter", {})
        )
        self.projections = output_projections(self.classifier.model, self.classifier.anatomy)
        network, self.table = add_adapters(self.classifier, adapter)
        settings = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 1.0,
            "zero_optimization": zero,
            "bf16": {"enabled": dtype == "bfloat16"},
            "fp16": {"enabled": dtype == "float16"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        optim = OptimConfig(weight_decay=options.pop("weight_decay", 0.0))
        self.engine = Engine(network, self.table, optim, settings, traits=adapter_traits(adapter), **options)
        self.accumulation, self.steps = accumulation, 0

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        """Micro-batch `number`: the same in every process."""
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(4, 60, (2, 11), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 7:] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 3, (2,), generator=generator)}

    def mine(self, step: int) -> list[dict[str, torch.Tensor]]:
        """This rank's micro-batches of a step."""
        world, rank = self.world.size, self.world.rank
        first = step * world * self.accumulation
        return [self.batch(first + g * world + rank) for g in range(self.accumulation)]

    def train(self, steps: int = 1, scores: LayerScores | None = None) -> list[float]:
        """Optimizer steps with learning rate 0.01; returns the mean loss of each global batch."""
        losses = []
        for _ in range(steps):
            total = torch.zeros(())
            for batch in self.mine(self.steps):
                factor = self.engine.gradient_factor
                with contextlib.ExitStack() as watch:
                    if scores:
                        watch.enter_context(self.engine.idle.awake())
                        watch.enter_context(scores.micro_batch(batch["attention_mask"], all_layers=True, factor=factor))
                    total += self.engine.forward_backward(batch)
                self.engine.step(0.01)
            total = runtime.all_reduce(total) / (self.accumulation * self.world.size)
            losses.append(float(total))
            self.steps += 1
        return losses

    def layer_weights(self) -> list[torch.Tensor]:
        """All adapter values of each layer, flat, the head last."""
        whole = self.engine.trainable()
        groups = [*self.table.layers, self.table.head]
        return [torch.cat([whole[name].flatten() for name, _ in group]) for group in groups]

    def numel(self, layers: list[int]) -> int:
        """Trainable elements of `layers` and the head."""
        whole = self.engine.trainable()
        named = [item for layer in layers for item in self.table.layers[layer]] + self.table.head
        return sum(whole[name].numel() for name, _ in named)

    def close(self) -> None:
        self.engine.close()
        runtime.stop()
