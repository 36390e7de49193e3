"""Sides c and d of benchmarks/speed: transformers Trainer + peft at its best, or padding like the reference code."""

import gc
import os
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.speed.turns import Clock, Turn, chosen_steps, counted, watch_batches, without_launcher
from irtune.distributed import runtime
from irtune.distributed.runtime import World
from irtune.models.classifier import load_tokenizer
from irtune.train.setup import RunSetup

# Number formats to choose from: weights, autocast to bf16, and whether adapters are fp32 as peft makes them.
FORMATS: dict[str, dict[str, Any]] = {
    "bf16 weights, autocast": {"dtype": torch.bfloat16, "autocast": True, "fp32_adapters": True},
    "bf16 weights and adapters": {"dtype": torch.bfloat16, "autocast": False, "fp32_adapters": False},
    "fp32 weights, autocast": {"dtype": torch.float32, "autocast": True, "fp32_adapters": True},
    "fp32": {"dtype": torch.float32, "autocast": False, "fp32_adapters": True},
}


def formats(setup: RunSetup, world: World) -> list[str]:
    """Those that are worth a try: a model in fp32 stays so, and bf16 weights need not fit twice on a GPU."""
    if setup.config.model.dtype == "float32":
        return ["fp32"]
    one_size = world.device.type == "cuda" or setup.config.model.quantization != "none"
    return [name for name in FORMATS if name != "fp32" and not (one_size and name.startswith("fp32"))]


class _Ticks(TrainerCallback):
    def __init__(self, clock: Clock):
        self.clock = clock

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        self.clock.tick()


class _Chosen(Trainer):
    """A Trainer that takes the turn's steps out of the epoch that its own sampler makes."""

    side: "Peft"

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return [i for batches in self.side.taken for batch in batches for i in batch]

    def own_order(self) -> list[int]:
        """An epoch of its own sampler."""
        torch.manual_seed(self.args.seed)
        return list(super()._get_train_sampler())  # type: ignore[arg-type]


def build_model(setup: RunSetup, world: World, form: dict[str, Any], attention: str) -> nn.Module:
    """A classifier with peft's LoRA in all layers, as its documentation has it."""
    config, on_gpu = setup.config, world.device.type == "cuda"
    options: dict[str, Any] = {}
    if config.model.quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["score"],
        )
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        str(Path(config.model.name_or_path).expanduser()),
        dtype=form["dtype"],
        attn_implementation=attention,
        num_labels=len(setup.data.corpus.labels),
        ignore_mismatched_sizes=True,
        device_map={"": world.local_rank if on_gpu else "cpu"},
        **options,
    )
    model.config.use_cache = False
    model.config.pad_token_id = setup.data.pad_token_id
    adapter = config.adapter
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
    )
    return get_peft_model(model, lora, autocast_adapter_dtype=form["fp32_adapters"])


class Peft:
    """transformers Trainer + peft; `padded`: every example to data.max_length, in random order. sdpa is its default."""

    def __init__(
        self, setup: RunSetup, world: World, folder: Path, form: str, *, padded: bool = False, attention: str = "sdpa"
    ):
        config, self.world, self.turns = setup.config, world, 0
        self.clock = Clock(world.device)
        self.lengths = [len(item["input_ids"]) for item in setup.data.encoded["train"]]
        self.width = config.data.max_length if padded else None
        runtime.seed_everything(config.run.seed, deterministic=False)
        model = build_model(setup, world, FORMATS[form], attention)
        optim, on_gpu = config.optim, world.device.type == "cuda"
        tokenizer = load_tokenizer(config.model)
        hidden = without_launcher(world)
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=optim.micro_batch_size,
            per_device_eval_batch_size=2 * optim.micro_batch_size,
            gradient_accumulation_steps=optim.gradient_accumulation_steps,
            max_steps=1,
            learning_rate=optim.lr,
            weight_decay=optim.weight_decay,
            max_grad_norm=optim.max_grad_norm,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=FORMATS[form]["autocast"],
            train_sampling_strategy="random" if padded else "group_by_length",
            gradient_checkpointing=config.model.gradient_checkpointing,
            ddp_find_unused_parameters=False,
            use_cpu=not on_gpu,
            seed=config.run.seed,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=on_gpu,
        )
        padding: dict[str, Any] = {"padding": "max_length", "max_length": self.width} if padded else {}
        self.trainer = _Chosen(
            model=model,
            args=arguments,
            train_dataset=self._dataset(setup, "train"),
            data_collator=DataCollatorWithPadding(tokenizer, **padding),
            processing_class=tokenizer,
            callbacks=[_Ticks(self.clock)],
        )
        self.trainer.remove_callback(PrinterCallback)
        os.environ.update(hidden)
        self.dev = self._dataset(setup, "dev")
        self.trainer.side = self
        self.taken: list[list[list[int]]] = []
        self.whole_epoch = self._epoch(optim.micro_batch_size, world.size * optim.gradient_accumulation_steps)

    @property
    def model(self) -> nn.Module:
        """The model that trains."""
        return self.trainer.model

    @staticmethod
    def _dataset(setup: RunSetup, split: str) -> list[dict[str, Any]]:
        rows = zip(setup.data.encoded[split], setup.data.corpus.splits[split])
        return [{**encoded, "labels": example.label} for encoded, example in rows]

    def _epoch(self, rows: int, per_step: int) -> list[list[list[int]]]:
        """Its own sampler's order, cut into micro-batches and steps; what is left over is not used."""
        order = self.trainer.own_order()
        batches = [order[i : i + rows] for i in range(0, len(order) - rows + 1, rows)]
        return [batches[i : i + per_step] for i in range(0, len(batches) - per_step + 1, per_step)]

    def turn(self, warm_up: int, steps: int, *, digests: bool = False) -> Turn:
        """Train `warm_up` + `steps` steps."""
        self.taken = chosen_steps(self.whole_epoch, self.lengths, warm_up, steps, self.turns)
        self.turns += 1
        seen: list[int] | None = [] if digests else None
        unwatch = watch_batches(self.trainer.model, seen)
        self.trainer.args.max_steps = warm_up + steps
        self.clock.begin(warm_up, steps)
        hidden = without_launcher(self.world)
        result = self.trainer.train()
        os.environ.update(hidden)
        unwatch()
        turn = self.clock.turn()
        turn.losses, turn.digests = [result.training_loss], seen or []
        return counted(turn, self.taken[warm_up:], self.lengths, self.width)

    def evaluate(self) -> tuple[int, int, float]:
        """Predict the dev split: examples, batch size, seconds."""
        runtime.barrier()
        started = time.perf_counter()
        examples = len(self.trainer.predict(self.dev).predictions)  # type: ignore[arg-type]
        return examples, self.trainer.args.per_device_eval_batch_size, time.perf_counter() - started

    def close(self) -> None:
        """Free the model."""
        self.trainer.accelerator.free_memory()
        del self.trainer
        gc.collect()


def fastest_format(setup: RunSetup, world: World, folder: Path, steps: int) -> dict[str, float]:
    """Seconds per step of each number format, the fastest first; all on the same batches."""
    seconds = {}
    for form in formats(setup, world):
        side = Peft(setup, world, folder, form)
        turn = side.turn(1, steps)
        mine = torch.tensor([sum(turn.seconds) / steps], device=world.device)
        seconds[form] = float(max(runtime.all_gather(mine)))
        side.close()
    return dict(sorted(seconds.items(), key=lambda item: item[1]))
