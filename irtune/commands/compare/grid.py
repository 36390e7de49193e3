"""Which runs a comparison consists of, and the command-line arguments of each."""

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from irtune.config import load_config
from irtune.config.declarations import methods
from irtune.errors import ConfigError

VARIANT_KEY = re.compile(r"[a-z_]+")


@dataclass(frozen=True)
class Variant:
    """A method with keys of the tuning section, as `ir+preset=reference` spells it."""

    name: str
    method: str
    settings: tuple[tuple[str, str], ...] = ()

    def arguments(self, budget: str | None) -> list[str]:
        """Options of the trainer; `budget` holds where the method can keep one and sets none of its own."""
        settings = dict(self.settings)
        method = methods().get(self.method)  # an unknown one is refused with the trainer's other options
        reference = settings.get("preset") == "reference" or settings.get("rule") == "reference"
        if budget is not None and "budget" not in settings and not reference and method and method.takes_budget:
            settings["budget"] = budget
        return [f"--tuning.method={self.method}", *(f"--tuning.{key}={value}" for key, value in settings.items())]


@dataclass(frozen=True)
class Corpus:
    """A corpus of the comparison: what the user wrote, its short name and the trainer's options for it."""

    name: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One run: its place in the grid, its folder, and the trainer's command line.

    fraction: of the training rows, where learning curves are asked for.
    """

    data: str
    adapter: str
    variant: str
    seed: int
    folder: Path
    arguments: tuple[str, ...] = field(repr=False)
    fraction: float | None = None

    @property
    def title(self) -> str:
        """For people."""
        share = "" if self.fraction is None else f", {self.fraction:g} of the training rows"
        return f"{self.data}{share}, {self.adapter}, {self.variant}, seed {self.seed}"


def parse_variants(text: str) -> list[Variant]:
    """Methods from a comma-separated list such as `full,ir,ir+preset=reference+interval=5`.

    Raises:
        ConfigError: for a variant that is not spelt METHOD or METHOD+KEY=VALUE.
    """
    variants, problems = [], []
    for name in _listed(text):
        method, *pairs = name.split("+")
        settings = [tuple(pair.split("=", 1)) for pair in pairs]
        if not method or any(len(pair) != 2 or not VARIANT_KEY.fullmatch(pair[0]) for pair in settings):
            problems.append(f"--methods: {name!r} is not METHOD or METHOD+KEY=VALUE, with a KEY of the tuning section")
        else:
            variants.append(Variant(name, method, tuple((key, value) for key, value in settings)))
    problems += [f"--methods names {name!r} twice" for name in {v.name for v in variants if variants.count(v) > 1}]
    if problems or not variants:
        raise ConfigError(problems or ["--methods is empty; for example full,rst,ir"])
    return variants


def parse_corpora(text: str | None) -> list[Corpus]:
    """Corpora from a comma-separated list of PATH or PRESET=PATH; without one, that of the recipe."""
    if text is None:
        return [Corpus("recipe", ())]
    corpora = []
    for item in _listed(text):
        preset, _, path = item.rpartition("=")
        arguments = (f"--data.path={path}", *([f"--data.preset={preset}"] if preset else []))
        corpora.append(Corpus(preset or Path(path).stem, arguments))
    names = [corpus.name for corpus in corpora]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"--data: {text!r}; accepted: PATH or PRESET=PATH, comma-separated, each with another name")
    return corpora


def parse_fractions(text: str) -> list[float]:
    """Shares of the training rows in ascending order from a comma-separated list.

    Raises:
        ConfigError: for what is not a number above 0 and at most 1, and for one that is named twice.
    """
    fractions, problems = [], []
    for item in _listed(text):
        try:
            fraction = float(item)
        except ValueError:
            fraction = 0.0
        if not 0 < fraction <= 1:
            problems.append(f"--fractions: {item[:100]!r}; accepted: numbers above 0, at most 1")
        elif fraction in fractions:
            problems.append(f"--fractions names {fraction:g} twice")
        fractions.append(fraction)
    if problems or not fractions:
        raise ConfigError(problems or ["--fractions is empty; for example 0.05,0.1,0.25,1"])
    return sorted(fractions)


def build_grid(
    *,
    variants: list[Variant],
    adapters: list[str | None],
    corpora: list[Corpus],
    seeds: int,
    budget: str | None,
    folder: Path,
    arguments: list[str],
    fractions: Sequence[float | None] = (None,),
) -> list[Cell]:
    """Every run, seed by seed, so that a comparison that is cut short has something of everything.

    With `fractions`, all methods see the same rows, and every seed draws others.

    Raises:
        ConfigError: with the errors of all configurations at once.
    """
    cells, problems = [], dict[str, None]()
    for seed, corpus, fraction, adapter, variant in itertools.product(
        range(seeds), corpora, fractions, adapters, variants
    ):
        own, place = list(corpus.arguments), folder / corpus.name
        if fraction is not None:
            own += [f"--data.train_fraction={fraction:g}", f"--data.subset_seed={seed}"]
            place /= f"fraction_{fraction:g}"
        place = place / (adapter or "adapter") / _folder_name(variant.name) / f"seed_{seed}"
        own += [f"--adapter.type={adapter}"] if adapter else []
        line = [*arguments, *own, *variant.arguments(budget), f"--run.seed={seed}", f"--run.output_dir={place}"]
        try:
            config = load_config(line)
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
            continue
        cells.append(Cell(corpus.name, config.adapter.type, variant.name, seed, place, tuple(line), fraction))
    if problems:
        raise ConfigError(list(problems))
    return cells


def _folder_name(name: str) -> str:
    """The variant's name where it is a harmless file name; a short hash keeps others apart."""
    safe = re.sub(r"[^\w.,=+-]", "_", name)
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]
