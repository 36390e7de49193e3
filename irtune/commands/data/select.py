"""`python -m irtune data select`: the candidates that are most worth training on or labelling."""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from irtune.commands.common import a_path, add_run, at_least, check_single, parser, ranks, trusted
from irtune.commands.predict import free_suffix, to_examples
from irtune.config.declarations import adapter_kinds
from irtune.data import Example, check_apart, read_corpus, read_table
from irtune.distributed import runtime
from irtune.errors import ConfigError, DataError
from irtune.evaluation.saved_run import LoadedRun, load_run
from irtune.evaluation.sparse_autoencoder import load_autoencoder, save_autoencoder, similarity, train_autoencoder
from irtune.evaluation.states import inner_states, pooled_states
from irtune.evaluation.transport import EPSILON, gradients
from irtune.files import to_json, write_text, writing

MOST_CELLS = 10**8  # of the table of distances, 8 bytes each
MOST_TEXTS = 4096  # whose states or features are in memory at a time; of each, TOKENS train an autoencoder
TOKENS = 16


def main(arguments: Sequence[str]) -> int:
    """Score all candidates and write the best of them, with their scores."""
    options = parser(
        "data select",
        "The candidates most worth labelling or training on. uncertainty: those whose predicted probabilities have the "
        "largest entropy. got-d: those that would bring the candidates nearest to the training split of the target, by "
        "entropic optimal transport between what the run's head reads of both. mona: those that share most features of "
        "a sparse autoencoder with that split. The output has all columns of the candidates and score, the best first "
        "(got-d: the smallest). Candidates in the target's dev or test split are refused.",
        "python -m irtune data select --method got-d --run runs/mine --candidates new.csv --count 99 "
        "--output best.jsonl",
    )
    add_run(options)
    options.add_argument("--method", required=True, choices=("got-d", "mona", "uncertainty"), help="how to choose")
    options.add_argument("--candidates", required=True, type=a_path, help="file with the text columns of the run")
    options.add_argument("--target", help="corpus with the columns of the run (default: the run's)")
    options.add_argument("--count", required=True, type=at_least(1), help="candidates to choose")
    options.add_argument(
        "--epsilon", type=_above_zero, help=f"entropy of got-d, in mean distances (default {EPSILON}); larger is faster"
    )
    options.add_argument("--sae", type=a_path, help="folder of mona's sparse autoencoder (cfg.json, sae.safetensors)")
    options.add_argument(
        "--train-sae", action="store_true", help="train one on the candidates and write it to the folder --sae"
    )
    options.add_argument("--output", required=True, type=a_path, help="file (.jsonl)")
    given = options.parse_args(list(arguments))
    if given.output.suffix != ".jsonl":
        raise ConfigError(f"--output {str(given.output)!r}: accepted: a name that ends with .jsonl")
    if given.output.exists():
        raise ConfigError(f"--output {str(given.output)!r} exists; name a file that does not")
    if given.epsilon is not None and given.method != "got-d":
        raise ConfigError(f"--epsilon goes with --method got-d, not {given.method}; leave it out")
    if (given.sae is not None or given.train_sae) and given.method != "mona":
        raise ConfigError(f"--sae and --train-sae go with --method mona, not {given.method}; leave them out")
    if given.method == "mona" and given.sae is None:
        raise ConfigError(
            "--method mona needs --sae FOLDER: that of a sparse autoencoder, or one to write with --train-sae"
        )
    if given.train_sae and given.sae.exists():
        raise ConfigError(f"--train-sae writes --sae {str(given.sae)!r}, which exists; name a folder that does not")
    with ranks() as world:
        with runtime.shared_errors():
            rows, where = read_table(given.candidates), str(given.candidates)
            if given.count > len(rows):
                raise ConfigError(f"--count {given.count} is more than the {len(rows)} candidates in {where}")
            run = load_run(given.run, world.device, trusted=trusted(given))
            data = run.config.data
            if given.method == "uncertainty":
                check_single(data, "--method uncertainty")
            if given.target is not None:
                data = dataclasses.replace(data, path=given.target, config=None, train=None, dev=None, test=None)
            corpus = read_corpus(data)
            candidates = to_examples(rows, where, data, advice="rename those with the texts")
            check_apart(candidates, corpus.splits, where)
        if given.method == "got-d":
            scores = got_d(run, corpus.splits["train"], candidates, given.batch_size, given.epsilon or EPSILON)
            best = scores.argsort(stable=True)[: given.count].tolist()
        elif given.method == "mona":
            scores = mona(run, corpus.splits["train"], candidates, given.batch_size, given.sae, train=given.train_sae)
            best = scores.argsort(descending=True, stable=True)[: given.count].tolist()
        else:
            probabilities = run.predict(candidates, given.batch_size).probabilities
            scores = torch.special.entr(probabilities).sum(1)
            best = scores.argsort(descending=True, stable=True)[: given.count].tolist()
        if world.is_main:
            name = "score" + free_suffix(["score"], {column for _, row in rows for column in row})
            lines = [to_json(rows[i][1] | {name: round(float(scores[i]), 6)}, other=str) + "\n" for i in best]
            with writing(given.output):
                given.output.parent.mkdir(parents=True, exist_ok=True)
                write_text(given.output, "".join(lines))
            sys.stderr.write(f"{len(best)} of {len(rows)} candidates are in {given.output}\n")
    return 0


def got_d(
    run: LoadedRun, target: Sequence[Example], candidates: Sequence[Example], batch_size: int, epsilon: float
) -> torch.Tensor:
    """A score for each candidate, float64 [candidates]: the smaller, the nearer would more of it bring the target.

    The cost is the Euclidean distance of pooled states over its mean, which `epsilon` is a share of. Collective.

    Raises:
        DataError: for a table of distances that is too large, and where the transport does not converge.
    """
    if len(target) * len(candidates) > MOST_CELLS:
        raise DataError(
            f"{len(target):,} rows of the target and {len(candidates):,} candidates make more than {MOST_CELLS:,} "
            "distances; give a smaller file of --candidates"
        )
    states = pooled_states(run, [*target, *candidates], batch_size).double()
    cost = torch.cdist(states[: len(target)], states[len(target) :])
    return gradients(cost / cost.mean().clamp(min=torch.finfo(cost.dtype).tiny), epsilon)


def mona(
    run: LoadedRun,
    target: Sequence[Example],
    candidates: Sequence[Example],
    batch_size: int,
    folder: Path,
    *,
    train: bool,
) -> torch.Tensor:
    """How much of the target's mean features of a sparse autoencoder each candidate has, float32 [candidates], 0 to 1.

    The features of a text are the mean over its tokens in the last layer but one. `train`: the autoencoder is trained
    on tokens of the candidates, and written to `folder`. Collective.

    Raises:
        ConfigError: for a run whose adapter reads a text once per label.
        RunError: for an autoencoder of another model.
    """
    if adapter_kinds()[run.config.adapter.type].reads_labels:
        raise ConfigError(
            f"--method mona does not go with adapter.type {run.config.adapter.type}, which reads a text once per label"
        )
    settings: Any = run.classifier.model.config
    width = int(settings.get_text_config().hidden_size)
    base = Path(run.config.model.name_or_path).name
    if train:
        some = candidates[:: -(-len(candidates) // MOST_TEXTS)]
        states = inner_states(run, some, batch_size, _sample, TOKENS * width).view(-1, width).to(run.device)
        coder, left = train_autoencoder(states)
        if runtime.rank() == 0:
            with writing(folder):
                save_autoencoder(coder, folder, base)
            sys.stderr.write(f"{folder}: the autoencoder leaves {left:.1%} of the variance unexplained\n")
    else:
        with runtime.shared_errors():
            coder = load_autoencoder(folder, width, base, run.device)
    size = len(coder.bias)

    def features(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The mean over tokens, [batch, features]."""
        return (coder.features(states) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    prototype = torch.zeros(size)
    for start in range(0, len(target), MOST_TEXTS):
        prototype += inner_states(run, target[start : start + MOST_TEXTS], batch_size, features, size).sum(0)
    prototype = (prototype / len(target)).to(run.device)
    return inner_states(run, candidates, batch_size, lambda *read: similarity(features(*read), prototype)[:, None], 1)[
        :, 0
    ]


def _sample(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`TOKENS` states of each text at equal distances, in one row: [batch, TOKENS x width]."""
    places = mask.argsort(dim=1, descending=True, stable=True)  # of the text's tokens, then of padding
    steps = (torch.arange(TOKENS, device=mask.device) + 0.5) / TOKENS
    chosen = places.gather(1, (mask.sum(1, keepdim=True) * steps).long())
    return states.gather(1, chosen[..., None].expand(-1, -1, states.shape[-1])).flatten(1)


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text[:100]!r}; accepted: a number above 0")
    return number
