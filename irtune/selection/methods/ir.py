"""IR-Tuning: train the layers whose scores stand out (Liu and Litman, Findings of EMNLP 2025)."""

import math
from collections.abc import Sequence
from typing import Any

from irtune.config.declarations import Method
from irtune.config.schema import TuningConfig
from irtune.selection.chooser import Candidates, Observation, ScoreChooser
from irtune.selection.split import REFERENCE_WINDOW, raise_lowest, split_layers


class IRChooser(ScoreChooser):
    """Cuts the layers' latest scores with a split rule.

    With `own_mean`, each score is first divided by the mean of all the layer's scores before it: what stands out is
    what is high for that layer. The first selection has no such mean and cuts the scores themselves.

    A score that is not finite never counts as important: the whole selection is kept as it was, and the event counted.
    Layers that never had a score (stale scores only) count as 0.
    """

    def __init__(
        self,
        num_layers: int,
        interval: int = 10,
        seed: int = 0,
        *,
        rule: str = "otsu",
        num_splits: int = 1,
        min_fraction: float = 0.10,
        max_fraction: float = 0.65,
        ema: float = 0.0,
        random_first: bool = False,
        cost_weight: float = 0.0,
        own_mean: bool = False,
    ):
        super().__init__(num_layers, interval, seed)
        self.rule, self.num_splits = rule, num_splits
        self.min_fraction, self.max_fraction = min_fraction, max_fraction
        self.ema, self.random_first, self.cost_weight = ema, random_first, cost_weight
        self.own_mean, self.totals, self.counts = own_mean, [0.0] * num_layers, [0] * num_layers
        self.scores = [None] * num_layers

    def first(self) -> list[int] | None:
        """A random half when the preset asks for it (as the published code starts), else None."""
        return self.sample(max(1, self.num_layers // 2), step=0) if self.random_first else None

    def choose(self, seen: Observation) -> list[int]:
        """Smooth the fresh scores into the remembered ones and split them."""
        fresh = seen.scores if seen.scores is not None else []
        if not self.are_finite(fresh):
            return list(seen.selected)
        for layer, score in enumerate(fresh):
            old = self.scores[layer]
            if score is not None:  # s <- ema * s_old + (1 - ema) * s_new
                self.scores[layer] = score if old is None else self.ema * old + (1 - self.ema) * score
        scores = [score if score is not None else 0.0 for score in self.scores]
        if self.own_mean:
            scores = self._against_own_mean(scores, fresh)
        chosen = split_layers(scores, self.rule, self.num_splits, self.min_fraction, self.max_fraction)
        return raise_lowest(scores, chosen, self.cost_weight)

    def _against_own_mean(self, scores: list[float], fresh: Sequence[float | None]) -> list[float]:
        means = [total / count if count else 0.0 for total, count in zip(self.totals, self.counts)]
        for layer, score in enumerate(fresh):
            if score is not None:
                self.totals[layer] += score
                self.counts[layer] += 1
        if not any(means):
            return scores
        return [score / mean if mean else 0.0 for score, mean in zip(scores, means)]

    def state_dict(self) -> dict[str, Any]:
        """Remembered scores, their sums and counts (length L), and the count of bad selections in a row."""
        means = {"totals": list(self.totals), "counts": list(self.counts)} if self.own_mean else {}
        return super().state_dict() | means

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take all of it over."""
        super().load_state_dict(state)
        if self.own_mean:
            self.totals, self.counts = list(state["totals"]), list(state["counts"])


def _from_config(tuning: TuningConfig, candidates: Candidates) -> IRChooser:
    share = None if tuning.budget is None else candidates.count / candidates.num_layers
    return IRChooser(
        candidates.num_layers,
        tuning.interval,
        candidates.seed,
        rule=tuning.rule,
        num_splits=tuning.num_splits,
        min_fraction=tuning.min_fraction if share is None else share,
        max_fraction=tuning.max_fraction if share is None else share,
        ema=tuning.ema,
        random_first=tuning.first == "random_half",
        cost_weight=tuning.cost_weight,
        own_mean=tuning.own_mean,
    )


def _largest(tuning: TuningConfig, num_layers: int) -> int:
    """The most layers that the rule selects."""
    if tuning.rule == "reference":
        return num_layers - int(REFERENCE_WINDOW[0] * num_layers)
    return min(num_layers, max(1, math.floor(tuning.max_fraction * num_layers + 1e-9)))


METHOD = Method(
    name="ir",
    summary="layers whose gradient norms stand out",
    from_config=_from_config,
    takes_budget=True,
    largest=_largest,
    keys=("tuning.cost_weight", "tuning.own_mean"),
    refuses=(
        (
            {"tuning.budget": ..., "tuning.rule": "reference"},
            "tuning.budget cannot be kept by tuning.rule reference, which has limits of its own; use otsu",
        ),
    ),
)
