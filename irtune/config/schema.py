"""The sections of a configuration: type, limit, default and meaning of each key stand here and nowhere else.

The text under each field is its help on the command line. A limit stands in the field's `Annotated` type. keys.py gives
what is declared to whoever checks or describes a key.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from irtune.config.declarations import adapter_kinds, methods
from irtune.config.limits import BETAS, FOLD, HEADS, MAX_WIDTH, MODEL, SEPARATOR, STRATA, TRACKERS, OneOf, Range


@dataclass(kw_only=True)
class ModelConfig:
    """The pretrained model."""

    name_or_path: Annotated[str, MODEL] = "~/.cache/irtune/SmolLM2-135M-Instruct"
    """Local folder, hub id, or a preset: llama3.1-8b, llama2-13b, mistral-7b, deepseek-r1-distil-8b, qwen3-8b or
    phi-2."""
    start_from: str | None = None
    """Folder of a run, or of an adapter, whose adapter and head this run starts from, for example from a large corpus
    of lower quality to a small one. With other labels, the head starts anew. null: from fresh ones."""
    head_init: str | None = None
    """YAML file {label: {term: score}}, such as `python -m irtune data terms` proposes: each row of the head starts as
    the mean of the rows that the language model's head has for the terms, times their scores, so that a decoder with
    data.prompt instruction predicts before any training. Not for encoders. null: a random head, or zeros."""
    restart_layers: Annotated[int, Range(0)] = 0
    """Last layers that start from random weights instead of pretrained ones, the same in every run. Only where the
    layers' own weights train (adapter.type none)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Number format of the base weights and of the computation."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Format of the weights of the layers' linear modules, which stay constant: nf4 (4 bits, their scales quantised
    too) or int8, through bitsandbytes. Each product is computed in dtype. Adapters, head, embeddings and norms are not
    quantised."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel."""
    compile: bool = False
    """Compile each layer with torch.compile: a slow start, then faster steps. With ZeRO 0 to 2 and an unquantised
    base."""
    fused_kernels: bool = False
    """On a GPU, use the fused norm, rotary and feed-forward kernels of the package liger-kernel, if it is installed."""
    pooling: Literal["class", "last", "cls", "mean", "edit", "mean+edit", "last+edit"] = "class"
    """Where the classification head reads the text. class: where the model's own sequence classifier does; last: at the
    last token; cls: at the first, of tokenizers with a classification token; mean: the mean of all tokens; edit: the
    mean of the tokens of the marked edits, of all tokens where nothing is marked; mean+edit and last+edit: both. Those
    with edit need data.prompt diff, with which mean+edit is filled in. All but class have a head of irtune's that
    computes in fp32 and starts at zero, and are saved in irtune's format."""
    head: Literal["linear", "mlp", "cross"] = "linear"
    """Head of every pooling but class: linear, or mlp with a hidden layer as wide as the model. cross: linear over the
    states of both texts of a pair, pooled by mean or last, and their absolute difference, |new - old|; it needs
    data.prompt tagged."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off for models you do not trust."""
    allow_pickle: bool = False
    """Read weights from pickles (pytorch_model.bin) where there are no safetensors files. A pickle can run code: leave
    it off for models you do not trust."""


@dataclass(kw_only=True)
class AdapterConfig:
    """What is put into every layer."""

    type: Annotated[str, OneOf(adapter_kinds)] = "lora"
    """Kind of adapter."""
    r: Annotated[int, Range(1, MAX_WIDTH)] = 8
    """Rank of the update, of triadapt the mean they grow to; reflections of hra; inner width of ltuning-prefix."""
    alpha: Annotated[float, Range(0.0, above=True)] = 16.0
    """Scale of the update: alpha / r for lora, alpha / sqrt(r) for rslora, dept and ept; first bound of delora."""
    dropout: Annotated[float, Range(0.0, 1.0, below=True)] = 0.0
    """Dropout on the adapter's input during training."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the linear modules that get an adapter, or all-linear: every one except the classification head."""
    target_parameters: list[str] = field(default_factory=list)
    """Names of weights that get an update of lora or rslora although no linear module holds them, such as those of
    experts: [experts.gate_up_proj, experts.down_proj]. Not under ZeRO 3, and without dropout."""
    size: Annotated[int, Range(1, MAX_WIDTH)] = 256
    """Width of bottleneck, mam, ltuning-prompt and ept; block of oft, road, c3a; coefficients of fourierft, waveft."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Activation of bottleneck, mam and ept."""
    placement: Literal["serial", "parallel", "connected"] = "serial"
    """bottleneck behind attention and feed-forward block, beside the latter, or behind it, joined with that below."""
    scale: Annotated[float, Range(0.0, above=True)] = 1.0
    """Factor of what bottleneck, mam, fourierft or waveft adds."""
    num_tokens: Annotated[int, Range(1, MAX_WIDTH)] = 16
    """Keys and values per attention of prefix, mam and ltuning-prefix; embeddings of prompt, dept, ept."""
    prompt_init: Literal["random", "labels"] = "random"
    """First embeddings of prompt: those of random tokens, or of the tokens of the labels' names (a random choice where
    there are more than num_tokens), then of the tokens 1000, 1001 and so on."""
    prompt_lr: Annotated[float, Range(0.0, above=True)] = 1.0
    """Learning rate of the embeddings of prompt, dept and ept, as a multiple of the head's."""
    strata: Annotated[list[int] | None, STRATA] = None
    """a and b of spafit: layers [0, a) frozen, [a, b) biases, the others LoRA and biases. null: the paper's shares."""
    heads: Annotated[int | float, HEADS] = 0.03
    """Attention heads that lofit keeps: a number, or a share of those of all layers."""
    locate_steps: Annotated[int | None, Range(1)] = None
    """Optimizer steps of lofit before it chooses heads, in which all layers train. null: half of them all."""
    density: Annotated[float, Range(0.0, 1.0, above=True)] = 0.01
    """Values of sparse, as a share of all parameters of the model."""
    regrow: Literal["gradients", "sm3"] = "gradients"
    """Where values of sparse grow: at the largest gradients of 5 steps in 20, or by SM3's accumulators."""
    growth: Literal["linear", "exp"] = "linear"
    """How many ranks of triadapt grow at a time: in proportion to the steps that are done, or few at first."""
    orthogonal: bool = False
    """Add a penalty to the loss for factors of triadapt that are not orthogonal."""
    label_head: Literal["diagonal", "entailment"] = "diagonal"
    """Head of the ltuning types: a row for each label, or two that judge any pair of text and label."""
    embeddings: bool = False
    """With types none and hft, train the input embeddings too, often larger than all layers that train at a time."""
    dtype: Literal["float32", "model"] = "float32"
    """Format of adapters and head: float32 needs no master copy under ZeRO 0 and 3; model follows model.dtype and keeps
    an fp32 master copy where that is lower precision."""


@dataclass(kw_only=True)
class DataConfig:
    """The corpus and how a row becomes text."""

    preset: Literal["iterater-human", "argrewrite"] | None = None
    """Known corpus: sets the columns and the labels that are dropped. Keys that are set explicitly take precedence."""
    path: str | None = None
    """A file (then it is the training split), a folder with train, dev and test files (also shards as the hub has them,
    and what save_to_disk writes), or a hub id."""
    config: str | None = None
    """Configuration of a hub corpus, or of a folder laid out like one, that has several."""
    train: str | None = None
    """File of the training split, when it is not found by data.path."""
    dev: str | None = None
    """File of the development split, when it is not found by data.path."""
    test: str | None = None
    """File of the test split, when it is not found by data.path. Evaluated once, at the end."""
    pseudo: str | None = None
    """File that `python -m irtune pseudo` wrote: its rows train along with the training split. They are never in dev,
    test or a fold, and class counts leave them out."""
    before: str = "before"
    """Column with the text before the revision (or the only text)."""
    after: str | None = "after"
    """Column with the text after the revision; null for the classification of single texts."""
    context: str | None = None
    """Column with text around the revision, such as the sentences before it, which the model reads in front of the
    texts. The texts get their tokens first; of the context, as much of the end is kept as still fits into max_length.
    Cells may be empty."""
    label: str = "label"
    """Column with the label, the labels or the value."""
    task: Literal["classification", "regression"] = "classification"
    """regression: the column holds a number, which the model learns to give. optim.loss mean_squared_error and
    run.best_metric pearson are filled in."""
    multi_label: bool = False
    """An example has a set of labels, which may be empty: the cell is a list, or a text that label_separator splits.
    optim.loss binary is filled in."""
    label_separator: Annotated[str | None, SEPARATOR] = None
    """What stands between the labels of a text, for example "|". null: cells are lists."""
    id: str = "id"
    """Column with an example's id. Where it is missing, an example is called SPLIT:ROW."""
    group: str | None = None
    """Column with an example's document, which is kept on one side when a dev split is made."""
    weight: str | None = None
    """Column with an example's weight in the training loss, a number from 0 to 1,000,000. The loss stays a mean over
    the examples: the sum of weight times loss, divided by their number."""
    dev_fraction: Annotated[float | None, Range(0.0, 0.5, above=True)] = None
    """Share of the training split that becomes the dev split of a corpus without one: of each label to within one
    example, or as near as documents that stay whole allow. null: such a corpus is an error."""
    fold: Annotated[str | None, FOLD] = None
    """K/N, for example 2/5: train and dev split are joined and cut into N folds, of which the K-th is the dev split."""
    train_fraction: Annotated[float, Range(0.0, 1.0, above=True)] = 1.0
    """Share of each label's training rows that is kept, at least one; what a smaller share keeps is in every larger
    one. Dev and test stay whole, and so does the list of labels."""
    subset_seed: int = 0
    """Seed of train_fraction, apart from run.seed and split_seed."""
    split_seed: int = 0
    """Seed of dev_fraction and fold, apart from run.seed, so that runs with other seeds see the same splits."""
    labels: list[str] | dict[str, str] | None = None
    """Labels in order of their numbers, or a map from raw label to label; null: those of the training split, sorted."""
    drop_labels: list[str] = field(default_factory=list)
    """Rows with one of these raw labels are left out."""
    augment: Literal["none", "eda"] = "none"
    """eda: in each epoch, a training example is seen as it is once in ten times, else with some words swapped, deleted,
    replaced by synonyms or joined by them. Of a pair, only words that stand unchanged in both texts, and alike in
    both."""
    synonyms: str | None = None
    """File of synonyms for augment: a set of words per line, separated by commas. null: words are swapped and deleted
    only."""
    length_bucket: Annotated[int, Range(1)] = 50
    """Global batches whose examples are sorted by length together: less padding. Where labels go with length (an empty
    text), batches then lean to a label; 1 makes every global batch a random one."""
    padding_free: bool | Literal["auto"] = "auto"
    """Train without padding: inside the layers, the texts of a micro-batch stand one after another in one row, and
    attention ends where a text ends. Global batches are then random ones, and length_bucket has no effect. Models and
    settings that need padding are named, and get it. auto: on CPUs, where it has been measured, and not with
    optim.micro_batch_tokens; a run that is resumed goes on as it began."""
    max_length: Annotated[int, Range(16)] = 256
    """Longest input in tokens. A context is cut first, then the longer of the two texts, of a diff the unchanged text
    furthest from the edits; the template is never cut."""
    prompt: Literal["plain", "instruction", "tagged", "diff"] = "diff"
    """How a pair is written: plain pair, instruction with the list of labels, <old>...</old><new>...</new>, or diff:
    unchanged words once, edits marked at their place, as in `the [-blue-]{+red+} house`. Single texts, for which plain
    is the default, are not written as anything."""
    context_words: Annotated[int | None, Range(0)] = None
    """With prompt diff, unchanged text further than so many words from every edit is left out. null: all of it stays
    that fits into max_length."""
    template: str | None = None
    """Your own format instead of prompt: a text, or a file with one, that holds {before} and, for pairs, {after} behind
    it, with data.context also {context} in front; {labels} is the list of labels, and {{ and }} are braces. A file's
    text goes into the run's config.yaml."""


@dataclass(kw_only=True)
class TuningConfig:
    """Which layers are trained."""

    method: Annotated[str, OneOf(methods)] = "ir"
    """How layers are chosen."""
    budget: int | float | None = None
    """Layers that are trained at a time: a whole number of layers, or a fraction such as 0.25. null: the budget of the
    method's paper, which is listed with the methods; ir then follows its rule."""
    layers: str | None = None
    """Layers of the method fixed: numbers and ranges such as 0-3,7,-1 (-1 is the last)."""
    order: Literal["ascending", "descending", "random"] = "random"
    """Order in which the method cyclic visits its blocks."""
    temperature: Annotated[float, Range(0.0, above=True)] = 1.0
    """tau of the method grass: p = softmax(m / tau)."""
    preset: Literal["default", "reference"] = "default"
    """default: rms, fresh, otsu, every 10 steps. reference: the published code's choices (reference score, stale,
    reference rule, every step, random first half). Keys that are set explicitly take precedence."""
    score: Literal["rms", "global", "reference", "resnorm", "ratio", "weight", "cosine"] = "rms"
    """What a layer's importance is: a norm of its gradients (rms, global, reference), rms by the norm of its input
    (resnorm) or of its weights (ratio), the norm of its weights, or how little it turns hidden states (cosine)."""
    scores: Literal["fresh", "stale"] = "fresh"
    """fresh: every layer is scored on a selection step; stale: a frozen layer keeps its last score."""
    first: Literal["probe", "random_half"] = "probe"
    """First selection: scores of the first global batch before any update, or a random half of the layers."""
    rule: Literal["otsu", "reference"] = "otsu"
    """How sorted scores are cut into a frozen and a trained group."""
    num_splits: Annotated[int, Range(1, 8)] = 1
    """How often the trained group is cut again (1: not)."""
    interval: Annotated[int, Range(1)] = 10
    """Optimizer steps between selections."""
    min_fraction: Annotated[float, Range(0.0, 1.0)] = 0.10
    """Smallest share of layers that otsu selects."""
    max_fraction: Annotated[float, Range(0.0, 1.0, above=True)] = 0.65
    """Largest share of layers that otsu selects."""
    cost_weight: Annotated[float, Range(0.0)] = 0.0
    """With method ir, share of the selected layers' score mass that may be given up for the same share of the backward
    pass, which ends at the lowest selected layer. 0: the paper's choice, whatever it costs."""
    ema: Annotated[float, Range(0.0, 1.0, below=True)] = 0.0
    """Smoothing of scores: s <- ema * s_old + (1 - ema) * s_new."""
    own_mean: bool = False
    """With method ir, cut each layer's score divided by the mean of its earlier ones, so that layers train when their
    gradients are large for them."""
    deselected_state: Literal["offload", "drop"] = "offload"
    """Optimizer state of a layer that is frozen: parked in host memory and restored bit for bit, or thrown away."""
    keep_frozen_outputs: bool = False
    """Compute what the layers below the lowest trained one make of each training example once, and keep it on disk, so
    that steps begin above them. For methods that choose layers once, and models without dropout."""
    max_bad_scores: Annotated[int, Range(1)] = 10
    """Selections in a row with scores that are not finite before training stops."""


@dataclass(kw_only=True)
class OptimConfig:
    """Optimizer, schedule and batch."""

    lr: Annotated[float, Range(0.0, above=True)] = 5e-4
    """Peak learning rate of AdamW."""
    head_lr: Annotated[float, Range(0.0, above=True)] = 1.0
    """Learning rate of the head, and of what else is outside the layers, as a multiple of lr."""
    layer_decay: Annotated[float, Range(0.0, 1.0, above=True)] = 1.0
    """Learning rate of each layer as a multiple of that of the layer above it; the highest layer has lr."""
    weight_decay: Annotated[float, Range(0.0)] = 0.0
    """Decoupled weight decay of the layers that are being trained and the head."""
    betas: Annotated[list[float], BETAS] = field(default_factory=lambda: [0.9, 0.999])
    """Decay rates of Adam's two moments."""
    eps: Annotated[float, Range(0.0, 1.0, above=True, below=True)] = 1e-8
    """Adam's denominator offset."""
    warmup_steps: Annotated[int, Range(0)] = 10
    """Optimizer steps of linear warm-up."""
    warmup_fraction: Annotated[float | None, Range(0.0, 1.0, below=True)] = None
    """Share of all optimizer steps that is linear warm-up, rounded up, instead of warmup_steps."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after the warm-up; linear and cosine end at 0."""
    max_grad_norm: Annotated[float, Range(0.0)] = 1.0
    """Gradients with a larger global norm are scaled down to it; 0 switches clipping off."""
    epochs: Annotated[float, Range(0.0, above=True)] = 1.0
    """Passes over the training split, unless max_steps is set."""
    max_steps: Annotated[int | None, Range(1)] = None
    """Optimizer steps in all; overrides epochs."""
    micro_batch_size: Annotated[int, Range(1)] = 8
    """Examples per rank and forward pass."""
    micro_batch_tokens: int | None = None
    """Tokens, with padding, per rank and forward pass (at least data.max_length), instead of micro_batch_size: short
    texts make larger micro-batches than long ones, and each is about the same work. A step's loss stays the mean over
    its examples."""
    gradient_accumulation_steps: Annotated[int, Range(1)] = 1
    """Micro-batches per rank and optimizer step. With global_batch_size, 1 is filled in."""
    global_batch_size: Annotated[int | None, Range(1)] = None
    """Examples per optimizer step, whatever the number of ranks; accumulation follows from it, so that a run continues
    with fewer or more ranks. null: micro_batch_size x gradient_accumulation_steps x ranks."""
    loss: Literal["cross_entropy", "class_balanced", "focal", "binary", "mean_squared_error"] = "cross_entropy"
    """What is minimised. class_balanced: rare classes weigh more; focal: examples that are hard weigh more; binary: the
    mean over the labels of data.multi_label; mean_squared_error: that of data.task regression."""
    positive_weight: bool = True
    """With loss binary, weigh the examples that have a label by the number of the most frequent label's examples over
    that of its own."""
    class_weights: list[float] | dict[str, float] | None = None
    """Weight of each class in the training loss: a list in the order of the labels, or a map from label to weight, in
    which a label may be left out (1). The loss stays a mean over the examples."""
    class_balance_beta: Annotated[float, Range(0.0, 1.0, below=True)] = 0.999
    """beta of class_balanced: 0 weighs all classes alike, values near 1 by inverse frequency."""
    focal_gamma: Annotated[float, Range(0.0)] = 2.0
    """gamma of focal: 0 is cross-entropy."""
    label_smoothing: Annotated[float, Range(0.0, 1.0, below=True)] = 0.0
    """Share of the target that is spread over all classes."""
    mixup: Annotated[float, Range(0.0)] = 0.0
    """a of Beta(a, a), from which a share is drawn for each micro-batch: every example is mixed with another one in
    this share, in what the last linear module of the head reads, and so are their losses. 0: not."""
    contrastive: Annotated[float, Range(0.0)] = 0.0
    """Weight of a supervised contrastive loss (temperature .1) that is added: examples of one label in a micro-batch
    are drawn together in what the last linear module of the head reads, others apart. 0: not."""
    rdrop: Annotated[float, Range(0.0)] = 0.0
    """Weight of R-Drop: each example passes twice, and the two answers, which dropout makes differ, are drawn to each
    other. A step takes twice the time and memory. Needs dropout in the model or adapter.dropout."""


@dataclass(kw_only=True)
class RunConfig:
    """Where results go and how often."""

    output_dir: str = "runs/default"
    """Folder that the run writes; it writes nothing outside it."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Seed of everything random: initialisation, order, dropout, random selection."""
    log_every: Annotated[int, Range(1)] = 10
    """Optimizer steps between log lines."""
    eval_every: Annotated[int, Range(0)] = 0
    """Optimizer steps between evaluations on the dev split; 0: once per epoch."""
    save_every: Annotated[int, Range(0)] = 0
    """Optimizer steps between checkpoints; 0: after each evaluation."""
    patience: Annotated[int, Range(0)] = 0
    """Evaluations in a row without a better best_metric before training stops early; 0: it never does."""
    keep_last: Annotated[int, Range(1)] = 2
    """Checkpoints that are kept besides the best one."""
    best_metric: Literal[
        "macro_f1", "macro_f1_present", "accuracy", "auprc", "loss", "micro_f1", "jaccard", "pearson", "spearman", "r2"
    ] = "macro_f1"
    """Dev metric by which the best checkpoint is chosen (loss: lower is better). micro_f1 and jaccard are of
    data.multi_label; data.task regression has pearson, spearman, r2 and loss."""
    thresholds: Literal["fixed", "tuned"] = "fixed"
    """With data.multi_label, a label is predicted where its probability is above .5, or above the threshold that gives
    it the best F1 on the dev split. results.json holds the thresholds."""
    evaluate_test: bool = True
    """Evaluate the test split, where there is one, once at the end. `python -m irtune search` never does."""
    average: Annotated[int, Range(0)] = 0
    """Evaluations, counted from the last, whose weights are averaged at the end. The mean is kept where best_metric on
    dev is better with it than with the best checkpoint. 0: none."""
    logit_adjust: Annotated[float, Range(0.0)] = 0.0
    """tau of the logit adjustment: logits are lowered by tau times the logarithm of their class's share of the training
    split, in every evaluation and in the head that is saved, so that rare classes are predicted more often. 0: not."""
    resume: str = "auto"
    """auto: continue from the last checkpoint in output_dir if there is one; never: refuse a folder that has one; or a
    checkpoint folder."""
    deterministic: bool = False
    """Only deterministic kernels (slower on a GPU)."""
    trackers: Annotated[list[str], TRACKERS] = field(default_factory=lambda: ["tensorboard"])
    """Where curves and pictures go: tensorboard, wandb, mlflow and trackio, or []. All but the first need
    `pip install 'irtune[trackers]'`, and read where they send to from their own variables of the environment."""
    max_skipped_steps: Annotated[int, Range(1)] = 10
    """Steps in a row without an update, since loss or gradients were not finite, before training stops."""
    timeout_seconds: Annotated[int, Range(1)] = 1800
    """Longest wait for another rank before the run stops with an error."""
    traceback: bool = False
    """Show the traceback of user errors as well."""


@dataclass(kw_only=True)
class Config:
    """A whole configuration."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    deepspeed: str = "ds_configs/zero2.json"
    """DeepSpeed JSON file with the engine's settings."""


# Options of the section model by which code that comes with a model runs. Whoever loads a run's folder has to ask for
# them again: the folder may be another's.
RISKS = ("trust_remote_code", "allow_pickle")
