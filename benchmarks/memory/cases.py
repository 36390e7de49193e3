"""One case of benchmarks/memory: a model folder in, bytes out. Each runs in a process of its own."""

import dataclasses
import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from irtune.adapters.build import add_adapters
from irtune.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimConfig, TuningConfig
from irtune.config.deepspeed_json import read_engine_json
from irtune.distributed import runtime
from irtune.engine import Engine
from irtune.memory import count, estimate
from irtune.memory.measure import LiveTensors
from irtune.models import load_classifier
from irtune.selection import Observation
from irtune.selection.registry import build_chooser
from irtune.selection.scores import LayerScores

LABELS = ["a", "b", "c", "d", "e"]
RANK, STEPS = 8, 3
SHAPES = {
    "llama3.1-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "llama3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "small": {
        "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 2, "vocab_size": 2000,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is measured.

    system: ir (IR-Tuning), full (LoRA in all layers, irtune), trainer (transformers Trainer + peft, in the way of its
    documentation), lean (the same without what costs memory and is not needed).
    """

    system: str
    quantization: str
    checkpointing: bool
    rows: int
    length: int
    zero: int = 0

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.system}, {self.quantization}{', checkpointing' if self.checkpointing else ''}"


class Meter:
    """Bytes of tensors on the device: what torch's allocator says on a GPU, what is counted one by one on a CPU."""

    def __init__(self, device: str):
        self.live = LiveTensors() if device == "cpu" else None

    def __enter__(self) -> "Meter":
        if self.live:
            self.live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.live:
            self.live.__exit__(*exception)

    def loaded(self, model: nn.Module) -> None:
        """Count the weights of a model, which are read past the counter of a CPU."""
        for tensor in [*model.parameters(), *model.buffers()] if self.live else []:
            self.live.add(tensor)
            state = getattr(tensor, "quant_state", None)
            for part in _scales(state) if state is not None else []:
                self.live.add(part)

    @property
    def now(self) -> int:
        """Bytes alive."""
        return self.live.now if self.live else torch.cuda.memory_allocated()

    @property
    def peak(self) -> int:
        """Most bytes alive since the last reset."""
        return self.live.peak if self.live else torch.cuda.max_memory_allocated()

    def reset(self) -> None:
        """Look for a new peak."""
        gc.collect()
        if self.live:
            self.live.reset_peak()
        else:
            torch.cuda.reset_peak_memory_stats()


def _scales(state: Any) -> list[torch.Tensor]:
    """What bitsandbytes keeps beside the codes of an nf4 weight."""
    nested = [state.state2.absmax, state.state2.code] if state.nested else []
    return [state.absmax, state.code, *nested, *([state.offset] if state.nested else [])]


def save_model(folder: Path, shape: str, device: str) -> None:
    """Write a classifier with random weights in bf16, and a tokenizer that irtune can load beside it."""
    torch.manual_seed(0)
    settings = LlamaConfig(**SHAPES[shape], num_labels=len(LABELS), pad_token_id=0, max_position_embeddings=4096)
    with torch.device(device):
        model = LlamaForSequenceClassification._from_config(settings, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="2GB")
    raw = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "word": 2}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)


def batch_of(rows: int, length: int, device: str) -> dict[str, torch.Tensor]:
    """Random texts of `length` tokens, one of them a token shorter: batches are padded, so attention has a mask."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, -1] = 0
    ids = torch.randint(3, 2000, (rows, length)) * mask
    labels = torch.randint(len(LABELS), (rows,))
    return {
        name: tensor.to(device) for name, tensor in {"input_ids": ids, "attention_mask": mask, "labels": labels}.items()
    }


def measure(folder: Path, case: Case, device: str) -> dict[str, Any]:
    """Bytes of one case: weights, gradients, optimizer state, activations kept by a forward pass, and the peak."""
    torch.manual_seed(1)
    run = _irtune if case.system in ("ir", "full") else _trainer
    with Meter(device) as meter:
        return {"case": case.name, **dataclasses.asdict(case), **run(folder, case, device, meter)}


def _config(folder: Path, case: Case, device: str) -> Config:
    return Config(
        model=ModelConfig(
            name_or_path=str(folder),
            dtype="bfloat16",
            quantization=case.quantization,
            gradient_checkpointing=case.checkpointing,
        ),
        adapter=AdapterConfig(r=RANK),
        data=DataConfig(path="none", labels=LABELS, max_length=case.length),
        # Parked state is in another memory than what is measured; on a CPU there is only one.
        tuning=TuningConfig(method=case.system, deselected_state="drop" if device == "cpu" else "offload"),
        optim=OptimConfig(micro_batch_size=case.rows),
        deepspeed=f"ds_configs/zero{case.zero}.json",
    )


def _irtune(folder: Path, case: Case, device: str, meter: Meter) -> dict[str, Any]:
    """Scores of all layers, a selection, steps, scores in a step, another selection, steps, and an evaluation batch."""
    config = _config(folder, case, device)
    settings, problems = read_engine_json(config, 1)
    assert not problems, problems
    runtime.start(runtime.read_world(), 600)
    classifier = load_classifier(config.model, LABELS)
    meter.loaded(classifier.model)
    network, table = add_adapters(classifier, config.adapter)
    park = config.tuning.deselected_state == "offload"
    engine = Engine(network, table, config.optim, settings, park=park, recompute=case.checkpointing)
    engine.idle.has_trained(range(table.num_layers))  # as late in a run: no update is left out
    weights, loading = meter.now, meter.peak
    meter.reset()
    chooser = build_chooser(config.tuning, table.num_layers, 0)
    scores = LayerScores(table, "rms", engine.device)
    batch = batch_of(case.rows, case.length, device)
    chosen, states = [], []

    def scoring(factor: float) -> Any:
        return scores.micro_batch(batch["attention_mask"], all_layers=True, factor=factor)

    def choose() -> None:
        layers = chooser.first() or chooser.choose(Observation(0, scores.reduce(), engine.selected, []))
        engine.reselect(layers)
        chosen.append(layers)
        states.append(engine.optimizer_state_bytes())

    engine.module.train()
    if chooser.needs_scores:
        with engine.reaching_all_layers(), scoring(1.0):
            engine.probe(batch, backward=True)
    choose()
    before = meter.now
    loss = engine.mean_loss(batch)
    kept = meter.now - before
    del loss
    for number in range(2 * STEPS):
        if number == STEPS and chooser.needs_scores:
            with engine.reaching_all_layers(), scoring(engine.gradient_factor):
                engine.forward_backward(batch)
        else:
            engine.forward_backward(batch)
        if number == 0:
            gradients = sum(p.grad.nbytes for p in network.parameters() if p.grad is not None)
        engine.step(1e-4)
        if number == STEPS and chooser.needs_scores:
            choose()
    training = meter.peak
    meter.reset()
    with torch.no_grad():  # evaluation batches are twice as large
        engine.module.eval()(**{name: batch[name].repeat(2, 1) for name in ("input_ids", "attention_mask")})
    found = {
        "selected": chosen,
        "weights": weights,
        "loading_peak": loading,
        "gradients": gradients,
        "optimizer": states,
        "activations": kept,
        "peak": max(training, meter.peak),
        "evaluation_peak": meter.peak,
    }
    engine.close()
    runtime.stop()
    return found | _planned(config, settings, chosen, device)


def _planned(config: Config, settings: dict[str, Any], chosen: list[list[int]], device: str) -> dict[str, Any]:
    """The plan for the layers that were chosen, and as it is before anybody knows them."""
    options: Any = {
        "stage": settings["zero_optimization"]["stage"],
        "quantization": config.model.quantization,
        "world": 1,
        "zero": settings["zero_optimization"],
    }
    parts = [count(config, layers, device=device, slope=False) for layers in [*chosen, None]]
    *seen, worst = [estimate(each, config, **options) for each in parts]
    return {
        "planned_activations": parts[0].kept,
        "planned_optimizer": [row.optimizer for row in seen],
        "planned_gradients": seen[0].gradients,
        "planned_peak": max(row.total for row in seen),
        "planned_beforehand": worst.total,
    }


class _Watched(Trainer):
    """A Trainer that notes what its forward passes keep, and the gradients of its last step."""

    meter: Meter
    kept = gradients = 0

    def compute_loss(self, model: nn.Module, inputs: Any, *arguments: Any, **options: Any) -> Any:
        before = self.meter.now
        result = super().compute_loss(model, inputs, *arguments, **options)
        self.kept = self.meter.now - before
        return result

    def training_step(self, model: nn.Module, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = super().training_step(model, *arguments, **options)
        self.gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        return loss


def _trainer(folder: Path, case: Case, device: str, meter: Meter) -> dict[str, Any]:
    """transformers Trainer + peft LoRA in all linear modules of all layers."""
    lean, on_gpu = case.system == "lean", device != "cpu"
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["score"],
    )
    options: dict[str, Any] = {"quantization_config": quantized} if case.quantization == "nf4" else {}
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa", device_map={"": 0 if on_gpu else "cpu"}, **options
    )
    model.config.use_cache = False
    meter.loaded(model)
    reentrant = {"use_reentrant": False}
    if case.quantization == "nf4" and not lean:  # fp32 embeddings, norms and hidden states, as peft's guide has it
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=case.checkpointing, gradient_checkpointing_kwargs=reentrant
        )
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=RANK, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(model, lora, autocast_adapter_dtype=not lean)
    batch = batch_of(case.rows, case.length, "cpu")
    rows = [{name: tensor[i] for name, tensor in batch.items()} for i in range(case.rows)] * STEPS
    with tempfile.TemporaryDirectory() as output:
        trainer = _Watched(
            model=model,
            args=TrainingArguments(
                output_dir=output,
                per_device_train_batch_size=case.rows,
                max_steps=STEPS,
                bf16=True,
                optim="adamw_8bit" if lean and on_gpu else "adamw_torch",
                gradient_checkpointing=case.checkpointing,
                gradient_checkpointing_kwargs=reentrant,
                use_cpu=not on_gpu,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=rows,
        )
        trainer.meter = meter
        weights, loading = meter.now, meter.peak
        meter.reset()
        trainer.train()
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    return {
        "weights": weights,
        "loading_peak": loading,
        "gradients": trainer.gradients,
        "optimizer": [sum(value.nbytes for value in states if isinstance(value, torch.Tensor) and value.dim())],
        "activations": trainer.kept,
        "peak": meter.peak,
    }
