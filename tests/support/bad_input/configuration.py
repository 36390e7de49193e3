"""Recipes and options."""

# ruff: noqa: E501 - tables

import json

from tests.support.bad_input.case import Box, Case

LAUGHS = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10) if i else 'ha'}]\n" for i in range(12))


def recipe(content: str | bytes, *options: str):
    return lambda box: box.train("--config", str(box.write("recipe.yaml", content)), *options)


def options(*given: str):
    return lambda box: box.train(*given)


def tag(box: Box) -> list[str]:
    return recipe(f"optim: !!python/object/apply:os.system ['{box.canary()}']\n")(box)


def class_path(box: Box) -> list[str]:
    text = f"{{class_path: os.system, init_args: {{command: {box.canary()}}}}}"
    return box.train(f"--data.labels={text}")


def read(key: str, value: object):
    def check(output: str, box: Box) -> None:
        assert json.loads(output)["labels"] == value, key

    return check


def stats(content: str | bytes):
    def build(box: Box) -> list[str]:
        box.corpus()
        return box.stats("--config", str(box.write("recipe.yaml", content)))

    return build


def folder(box: Box) -> list[str]:
    (box.folder / "recipe.yaml").mkdir()
    return box.train("--config", str(box.folder / "recipe.yaml"))


def link_loop(box: Box) -> list[str]:
    (box.folder / "loop").symlink_to(box.folder / "loop")
    return box.train("--data.path", str(box.folder / "loop"))


def output_file(box: Box) -> list[str]:
    return box.train("--run.output_dir", str(box.write("taken", "")))


CASES = [
    Case("no such recipe", options("--config", "no/such.yaml"), "cannot read the configuration file ...: No such file"),
    Case("a folder as recipe", folder, "cannot read the configuration file ...: Is a directory"),
    Case("a recipe of a megabyte", recipe("#" * 2**20), "it has more than ... bytes"),
    Case("a recipe without end (/dev/zero)", options("--config", "/dev/zero"), "it has more than ... bytes",
         most_mib=16),
    Case("a recipe in Latin-1", recipe("run: {output_dir: caf\u00e9}\n".encode("latin-1")),
         "byte ... is not UTF-8; save the file as UTF-8"),
    Case("a recipe in UTF-16", recipe("optim: {lr: 0.1}\n".encode("utf-16")), "byte ... is not UTF-8"),
    Case("a recipe with a byte-order mark", stats(b"\xef\xbb\xbfdata: {labels: [y, x]}\n"), "the mark is left out",
         check=read("labels", ["y", "x"])),
    Case("a recipe with NUL bytes", recipe(b"optim:\0 {lr: 0.1}\n"), "is not valid YAML: unacceptable character"),
    Case("an open bracket", recipe("optim: [1\n"), "is not valid YAML: ..."),
    Case("tabs as indentation", recipe("optim:\n\tlr: 1\n"), "is not valid YAML: ..."),
    Case("two documents in one recipe", recipe("optim: {lr: 0.1}\n---\noptim: {lr: 0.2}\n"),
         "is not valid YAML: expected a single document"),
    Case("a tag that builds Python objects", tag, "is not valid YAML: could not determine a constructor"),
    Case("aliases of aliases, a billion values written out", recipe(LAUGHS + "optim: {betas: *l11}\n"),
         "it has more than ... values when its aliases are written out", most_mib=16),
    Case("the same aliases on the command line",
         options("--data.labels=[" + ", ".join(f"&l{i} [{', '.join([f'*l{i - 1}'] * 10) if i else 'ha'}]" for i in range(12)) + "]"),
         "data.labels: takes list[str] ..., not ...", most_mib=16),
    Case("an alias that leads back to itself", recipe("optim: &a {betas: [*a]}\n"), "an alias leads back to itself"),
    Case("an ordinary alias", stats("data: {before: &name before, labels: [y, x], after: after, id: &no no-such-column, group: null}\nmodel: {name_or_path: *no}\n"),
         "it stands for its value", check=read("labels", ["y", "x"])),
    Case("3,000 brackets", recipe("optim: " + "[" * 3000), "its lists are nested too deeply"),
    Case("a section twice", recipe("optim: {lr: 0.1}\noptim: {lr: 0.2}\n"), "line ...: the key ... appears twice"),
    Case("a key twice", recipe("optim:\n  lr: 0.1\n  lr: 0.2\n"), "line ...: the key ... appears twice"),
    Case("a date that cannot be", recipe("run: {seed: 2024-99-99}\n"), "is not valid YAML: ..."),
    Case("a number of 5,000 digits", recipe(f"run: {{seed: {'1' * 5000}}}\n"), "is not valid YAML: ..."),
    Case("a list instead of sections", recipe("- optim\n"), "must hold sections (...), not a ..."),
    Case("a number as section", recipe("optim: 3\n"), "section ... must hold keys and values, not ..."),
    Case("an unknown section", recipe("optimiser: {lr: 0.1}\n"), "unknown option ...; did you mean ..."),
    Case("an unknown key", recipe("optim: {rate: 0.1}\n"), "unknown option ...; did you mean ..."),
    Case("an unknown key of a megabyte", lambda box: ["validate", f"--{'k' * 2**20}=1"], "unknown option ..."),
    Case("a list where a number belongs", recipe("optim: {lr: [0.1]}\n"), "optim.lr: takes float, not ..."),
    Case("a map where a number belongs", recipe("optim: {lr: {a: 1}}\n"), "optim.lr: takes float, not ..."),
    Case("text where a number belongs", recipe("optim: {lr: fast}\n"), "optim.lr: takes float, not ..."),
    Case("true where a number belongs", recipe("optim: {micro_batch_size: true}\n"),
         "optim.micro_batch_size: takes int, not ..."),
    Case("a fraction where a whole number belongs", options("--run.seed=3.5"), "run.seed: takes int, not ..."),
    Case("a choice that is none", options("--tuning.method=rts"), "tuning.method is ...; did you mean ...? accepted: ..."),
    Case("not a number", recipe("tuning: {budget: .nan}\n"), "tuning.budget is ...; accepted: a finite number"),
    Case("an infinite number of epochs", options("--optim.epochs=1e308"), "optim.epochs is ...; accepted: a finite number of at most ..."),
    Case("a time-out of 20 digits", options(f"--run.timeout_seconds={'9' * 20}"),
         "run.timeout_seconds is ...; accepted: a finite number of at most ..."),
    Case("a negative learning rate", options("--optim.lr=-1"), "optim.lr is ...; accepted: a number above 0"),
    Case("a share above 1", options("--tuning.max_fraction=1.5"), "tuning.max_fraction is ...; accepted: a number above 0, at most 1"),
    Case("a least share above the largest", options("--tuning.min_fraction=0.9", "--tuning.max_fraction=0.2"),
         "tuning.min_fraction (...) is above tuning.max_fraction (...)"),
    Case("options that contradict each other", options("--tuning.method=full", "--tuning.budget=3"),
         "tuning.budget has no meaning for tuning.method ...; remove it"),
    Case("a cost weight for a method that has no scores", options("--tuning.method=rst", "--tuning.cost_weight=0.5"),
         "tuning.cost_weight goes with tuning.method ir, not ...; remove it"),
    Case("a cost weight where it changes nothing", options("--adapter.type=ltuning-prefix", "--tuning.cost_weight=0.5"),
         "tuning.cost_weight has no effect with ...: the backward pass goes through all layers anyway; leave it out"),
    Case("compiled layers over a quantised base", options("--model.compile=true", "--model.quantization=nf4"),
         "model.compile does not go with model.quantization ...; set one of the two back"),
    Case("layers without the method that takes them", options("--tuning.layers=0-3"),
         "tuning.layers goes with tuning.method fixed"),
    Case("a template with a placeholder that does not exist", options("--data.template={before} {afer}"),
         "data.template holds {afer}; accepted: {before}, {after} and {labels}"),
    Case("a template without a text", options("--data.template=Old: {before}"), "data.template holds {after} nowhere; accepted: once"),
    Case("a template with an open brace", options("--data.template={before} {after} {"), "data.template: ...; write a brace that is text twice"),
    Case("a template that reads attributes", options("--data.template={before.__class__} {after}"), "data.template holds {before.__class__}"),
    Case("a template in a file that does not exist", options("--data.template=no/such.txt"), "names a file, which cannot be read: No such file"),
    Case("a template in a device", options("--data.template=/dev/zero"), "names a file, which cannot be read: it is not a file"),
    Case("a template beside a prompt", options("--data.template={before} {after}", "--data.prompt=plain"),
         "data.template takes the place of data.prompt plain; remove one of the two"),
    Case("two lengths of the warm-up", options("--optim.warmup_fraction=0.1", "--optim.warmup_steps=5"), "both set the warm-up; remove one of the two"),
    Case("a warm-up longer than the run", options("--optim.warmup_fraction=1.5"), "optim.warmup_fraction is 1.5; accepted: a number from 0 to below 1"),
    Case("a weight of a class below 0", options("--optim.class_weights={x: -1}"), "optim.class_weights holds x: -1...; accepted: numbers of at least 0"),
    Case("a weight of a class that is not a number", options("--optim.class_weights={x: .nan}"), "optim.class_weights"),
    Case("six mistakes at once",
         recipe("optim: {lr: fast, micro_batch_size: 0}\nmodel: {dtype: int4}\ntunning: {method: ir}\n",
                "--tuning.intervall", "3", "--run.seed=-1", "--data.fold=7/3"),
         "6 errors in the configuration: ..."),
    Case("an option without its value", options("--optim.lr"), "option ... needs a value"),
    Case("a word that is no option", lambda box: box.train("[a,", "b]"), "unexpected argument ...: options are written"),
    Case("labels named yes and no, which YAML reads as true and false", recipe("data: {labels: {yes: a, no: b}}\n"),
         "data.labels: ... is not text (YAML reads yes, no, on and off as truth values); put labels in quotes"),
    Case("a list with the same label twice", options("--data.labels=[x, x]"), "data.labels names a label twice: ..."),
    Case("an object where labels belong", class_path, "data.labels: takes list[str] ..., not ..."),
    Case("an empty path", options("--run.output_dir="), "run.output_dir is ...; accepted: a path"),
    Case("a path with a NUL character", recipe('run: {output_dir: "a\\0b"}\n'), "run.output_dir ...with a NUL character"),
    Case("a path of 300 characters without a slash", options("--data.path", "x" * 300), "data.path is ..., which cannot be looked up: ..."),
    Case("a path of 5,000 characters", options("--data.path", "x/" * 2500), "data.path has ... characters; accepted: at most ..."),
    Case("the home of a user that does not exist", options("--data.path", "~nobody-of-that-name/x"),
         "there is no user of that name with a home folder"),
    Case("a link that leads to itself", link_loop, "data.path is ..., which cannot be looked up: ..."),
    Case("half a character in a name", recipe('data: {before: "\\ud800"}\n'), "data.before is ..., which is not valid Unicode"),
    Case("a password in a model's address", options("--model.name_or_path", "https://me:pass4word@host/model"),
         "model.name_or_path holds a password or token"),
    Case("a token as value", recipe("data: {path: hf_AbCdEfGhIj0123456789KlMn}\n"), "data.path holds a password or token"),
    Case("an output folder that is a file", output_file, "run.output_dir: cannot write to ..."),
    Case("a global batch that the ranks cannot share", options("--optim.global_batch_size=3"),
         "optim.global_batch_size is ..., which is not a multiple of optim.micro_batch_size ...; accepted: 2 or 4, or optim.micro_batch_size 3 or 1"),
    Case("a global batch and another accumulation", options("--optim.global_batch_size=8", "--optim.gradient_accumulation_steps=3"),
         "optim.gradient_accumulation_steps is ..., but optim.global_batch_size ... makes it 4; remove one of the two"),
    Case("micro-batches of fewer tokens than the longest text", options("--optim.micro_batch_tokens=32"),
         "optim.micro_batch_tokens is ...; accepted: at least data.max_length, ..."),
    Case("micro-batches by tokens and a global batch of examples", options("--optim.micro_batch_tokens=256", "--optim.global_batch_size=8"),
         "optim.global_batch_size ... counts examples, but optim.micro_batch_tokens ... puts varying numbers of them into a micro-batch; remove one of the two"),
    Case("micro-batches by tokens and embeddings before the text",
         options("--optim.micro_batch_tokens=256", "--adapter.type=prompt", "--tuning.method=full"),
         "optim.micro_batch_tokens does not count the embeddings that adapter.type prompt puts before every text; remove it"),
    Case("a global batch of nothing", options("--optim.global_batch_size=0"), "optim.global_batch_size is ...; accepted: a whole number of at least 1"),
]  # fmt: skip
