"""The commands of `python -m irtune`, one module each, with a function `main(arguments) -> exit status`.

Modules are imported when their command is called: what one of them needs does not slow the others down.
"""

# Command -> module below this package, and what it does in a line.
COMMANDS = {
    "train": ("", "fine-tune a model; the same as train.py"),
    "predict": ("predict", "label texts with a finished run"),
    "evaluate": ("evaluate", "metrics, intervals, calibration and worst mistakes of a run on a corpus"),
    "export": ("export", "the adapter with a model card, the merged model, or an ONNX graph"),
    "inspect": ("inspect", "which layers a run trained, with what scores and state"),
    "report": ("report", "one page about a run, or about several side by side"),
    "serve": ("serve", "a run that answers over HTTP"),
    "plan": ("plan", "memory and communication of a configuration, per ZeRO stage, before it runs"),
    "validate": ("validate", "every error of a configuration, and examples as the model will see them"),
    "doctor": ("doctor", "versions, accelerators, interfaces, speed of all-reduce, and what is wrong"),
    "data": (
        "data",
        "`data stats`: rows, labels, lengths, duplicates, leakage; `data baseline`: what is easily reached; `data "
        "curate`: labels that are probably wrong; `data terms`: words for a head; `data select`: rows worth labelling",
    ),
    "pseudo": ("pseudo", "label texts by the vote of several runs, to train on them"),
    "recipes": ("recipes", "recipes and DeepSpeed files that come with irtune, and copies of them"),
    "schema": ("schema", "JSON schema of a recipe, for editors"),
    "completion": ("completion", "commands, options and their values for bash and zsh"),
    "compare": ("compare", "methods, adapters, corpora and seeds side by side"),
    "search": ("search", "settings by trials: the best dev metric for the least cost"),
    "crossvalidate": ("crossvalidate", "stratified k-fold training on a small corpus"),
}
