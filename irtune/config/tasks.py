"""What the tasks mean for other keys: one label per example, a set of labels (`data.multi_label`), or a number."""

from irtune.config.declarations import adapter_kinds
from irtune.config.schema import Config, DataConfig

# By task: what a message calls it, the losses that go with it, and the metrics by which checkpoints can be chosen.
SINGLE, MULTI, VALUE = "single_label", "multi_label", "regression"
WORDS = {SINGLE: "one label per example", MULTI: "data.multi_label", VALUE: "data.task regression"}
LOSSES = {
    SINGLE: ("cross_entropy", "class_balanced", "focal"), MULTI: ("binary",), VALUE: ("mean_squared_error",),
}  # fmt: skip
METRICS = {
    SINGLE: ("macro_f1", "macro_f1_present", "accuracy", "auprc", "loss"),
    MULTI: ("macro_f1", "macro_f1_present", "micro_f1", "jaccard", "accuracy", "auprc", "loss"),
    VALUE: ("pearson", "spearman", "r2", "loss"),
}


def task_name(data: DataConfig) -> str:
    """single_label, multi_label or regression."""
    return VALUE if data.task == "regression" else MULTI if data.multi_label else SINGLE


def task_problems(config: Config) -> list[str]:
    """One sentence per key that does not go with the task, each with the key to change."""
    data, optim, run = config.data, config.optim, config.run
    task = task_name(data)
    words, problems = WORDS[task], []
    if data.multi_label and task == VALUE:
        problems.append("data.multi_label asks for a set of labels, data.task regression for a number; remove one")
    if optim.loss not in LOSSES[task]:
        problems.append(f"optim.loss {optim.loss} does not go with {words}; accepted: {', '.join(LOSSES[task])}")
    if run.best_metric not in METRICS[task]:
        problems.append(f"run.best_metric {run.best_metric} is not a metric of {words}; accepted: "
                        f"{', '.join(METRICS[task])}")  # fmt: skip
    for key, given, wanted in (
        ("data.label_separator", data.label_separator is not None, MULTI),
        ("run.thresholds tuned", run.thresholds == "tuned", MULTI),
        ("optim.positive_weight false", not optim.positive_weight, MULTI),
        ("optim.label_smoothing", optim.label_smoothing > 0, SINGLE),
        ("optim.class_weights", optim.class_weights is not None, SINGLE),
        ("data.pseudo", data.pseudo is not None, SINGLE),
        ("model.head_init", config.model.head_init is not None, SINGLE),
        ("optim.mixup", optim.mixup > 0, SINGLE),
        ("optim.contrastive", optim.contrastive > 0, SINGLE),
        ("optim.rdrop", optim.rdrop > 0, SINGLE),
        ("run.logit_adjust", run.logit_adjust > 0, SINGLE),
    ):
        if given and task != wanted:
            problems.append(f"{key} goes with {WORDS[wanted]}, not {words}; remove it")
    kind = adapter_kinds().get(config.adapter.type)
    if kind is not None and kind.reads_labels and task != SINGLE:
        problems.append(f"adapter.type {kind.name} has one softmax over the labels, which does not go with {words}; "
                        "set adapter.type to lora or prompt")  # fmt: skip
    for key, given in (("optim.mixup", optim.mixup > 0), ("optim.contrastive", optim.contrastive > 0)):
        if given and optim.rdrop:
            problems.append(f"{key} does not go with optim.rdrop, which has two passes of each example; remove one")
        if given and optim.micro_batch_size == 1 and optim.micro_batch_tokens is None:
            problems.append(f"{key} needs other examples in a micro-batch; set optim.micro_batch_size to 2 or more")
        if given and kind is not None and kind.reads_labels:
            problems.append(f"{key} does not go with adapter.type {kind.name}, which reads a text once per label; "
                            "remove it")  # fmt: skip
    if task == VALUE:
        for key, given in (
            ("data.labels", data.labels is not None),
            ("data.drop_labels", bool(data.drop_labels)),
            ("data.prompt instruction", data.prompt == "instruction"),
            ("{labels} in data.template", "{labels}" in (data.template or "")),
            ("adapter.prompt_init labels", config.adapter.prompt_init == "labels"),
        ):
            if given:
                problems.append(f"{key} needs labels, and {words} has none; remove it")
    return problems
