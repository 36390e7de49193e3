"""What a search tries next, and what became of each trial. optuna is imported late: it is an extra."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from irtune.config.search_space import Choices, Numbers, Space, Subset

STARTUP = 10  # trials at random before the guided ones; the row of random search begins with the same ones


@dataclass
class Trial:
    """A proposal, and its outcome once it has one.

    number: its place in the search, or in the random search beside it. guided: whether it belongs to the search alone.
    params: as optuna has them. values: by dotted key of the configuration.
    run: name of the folder of its run; that of an earlier trial with the same values, which is not repeated.
    metric, cost: the dev metric, and parameters or seconds: two numbers, or None. error: why there is neither.
    """

    number: int
    guided: bool
    params: dict[str, Any]
    values: dict[str, Any]
    run: str
    metric: Any = None
    cost: Any = None
    error: str | None = None

    @property
    def done(self) -> bool:
        """Whether it has an outcome."""
        return self.metric is not None or self.error is not None

    @property
    def shared(self) -> bool:
        """Whether it belongs to the search and to the random search."""
        return self.number < STARTUP


def of_search(trials: Sequence[Trial]) -> list[Trial]:
    """Those of the search, in their order."""
    return [trial for trial in trials if trial.guided or trial.shared]


def side_by_side(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    """Those of the search and, once there are as many, those of the random search."""
    mine, random = of_search(trials), [trial for trial in trials if not trial.guided]
    return {"search": mine} | ({"random search": random} if len(random) == len(mine) else {})


def propose(space: Space, before: Sequence[Trial], number: int, *, guided: bool, seed: int, sign: int) -> Trial:
    """The next trial after `before`, by optuna's multi-objective tree-structured Parzen estimator, or at random.

    Its draws depend on `seed` and `number` only, so that a search that goes on proposes what it would have proposed.

    Args:
        space: of the keys.
        before: earlier trials of the search, with outcomes.
        number: of the trial; the first `STARTUP` are random.
        guided: whether it is for the search; else for the random search.
        seed: run.seed.
        sign: 1 where more of the metric is better, -1 where less is.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    guided = guided and number >= STARTUP
    own_seed = int.from_bytes(hashlib.sha256(f"search/{seed}/{number}".encode()).digest()[:4], "big")
    samplers = optuna.samplers
    sampler = samplers.TPESampler(seed=own_seed, n_startup_trials=1) if guided else samplers.RandomSampler(own_seed)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    drawn = _distributions(space)
    done = [trial for trial in before if trial.metric is not None]
    for trial in before if guided and done else ():
        # A trial that failed was as bad as any, or it would be proposed again and again.
        metric = trial.metric if trial.error is None else sign * min(sign * other.metric for other in done)
        cost = trial.cost if trial.error is None else max(other.cost for other in done)
        outcome = optuna.trial.create_trial(params=trial.params, distributions=drawn, values=[sign * metric, cost])
        study.add_trial(outcome)
    params = study.ask(drawn).params
    while any(isinstance(what, Subset) and not values_of(space, params)[key] for key, what in space.items()):
        params = study.ask(drawn).params  # an empty subset is none
    name = f"{'trial' if guided or number < STARTUP else 'random'}_{number:03d}"
    return Trial(number, guided, params, values_of(space, params), name)


def _distributions(space: Space) -> dict[str, Any]:
    from optuna import distributions as d

    found: dict[str, Any] = {}
    for key, what in space.items():
        if isinstance(what, Choices):
            found[key] = d.CategoricalDistribution([json.dumps(value) for value in what.values])
        elif isinstance(what, Numbers):
            kind: Any = d.IntDistribution if isinstance(what.low, int) else d.FloatDistribution
            found[key] = kind(what.low, what.high, log=what.log)
        else:
            found |= {_item(key, value): d.CategoricalDistribution([False, True]) for value in what.values}
    return found


def _item(key: str, value: Any) -> str:
    return f"{key}[{value}]"


def values_of(space: Space, params: dict[str, Any]) -> dict[str, Any]:
    """The values of the keys, from optuna's parameters."""
    found: dict[str, Any] = {}
    for key, what in space.items():
        if isinstance(what, Choices):
            found[key] = json.loads(params[key])
        elif isinstance(what, Subset):
            chosen = [value for value in what.values if params[_item(key, value)]]
            found[key] = ",".join(map(str, chosen)) if what.text else chosen
        else:
            found[key] = params[key]
    return found


def first_values(space: Space) -> dict[str, Any]:
    """A value in range for every key, by which the rest of a recipe can be checked."""
    return {
        key: what.values[0]
        if isinstance(what, Choices)
        else what.low
        if isinstance(what, Numbers)
        else ",".join(map(str, what.values))
        if what.text
        else what.values
        for key, what in space.items()
    }


def options(values: dict[str, Any]) -> list[str]:
    """The trainer's options for `values`."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def front(trials: Sequence[Trial], sign: int) -> list[Trial]:
    """The trials that no other one beats in metric and cost, the cheapest first; of equal ones, the first."""
    done = sorted((t for t in trials if t.metric is not None), key=lambda t: (t.cost, -sign * t.metric))
    best, found = -float("inf"), list[Trial]()
    for trial in done:
        if sign * trial.metric > best:
            best = sign * trial.metric
            found.append(trial)
    return found


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """The area that `points`, of which more is better in both coordinates, dominate above `reference`."""
    area, height = 0.0, reference[1]
    for x, y in sorted(points, reverse=True):
        if x > reference[0] and y > height:
            area += (x - reference[0]) * (y - height)
            height = y
    return area
