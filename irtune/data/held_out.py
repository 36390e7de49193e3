"""Development splits that a corpus does not bring: a share of the training split, or one of N folds."""

import random
import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np

MOVES = 2_000  # of documents, after the first draw
SWAPS = 2_000_000  # pairs of documents that are compared at a time


def draw_share(labels: Sequence[str], groups: Sequence[str], share: float, seed: int) -> tuple[list[bool], str | None]:
    """Whether each example goes to the dev split, and a remark where the split is not what was asked for.

    Every label gets its `share` to within one example, and the whole its share rounded to a whole number, where every
    example is a group of its own. Otherwise groups stay together and the numbers come as near as a search finds. A
    label keeps at least one example in training.
    """
    names = sorted(set(labels))
    counts = Counter(labels)
    if len(set(groups)) == len(groups):
        wanted = _quotas([counts[name] for name in names], share)
        chosen: set[int] = set()
        places: dict[str, list[int]] = {name: [] for name in names}
        for i, label in enumerate(labels):
            places[label].append(i)
        for name, count in zip(names, wanted):
            chosen.update(random.Random(f"dev/{seed}/{name}").sample(places[name], count))
        return [i in chosen for i in range(len(labels))], None
    held_out = _draw_groups(labels, groups, names, share, seed)
    dev = Counter(label for label, out in zip(labels, held_out) if out)
    far = [name for name in names if abs(dev[name] - share * counts[name]) >= 1]
    if not far:
        return held_out, None
    detail = ", ".join(f"{dev[name]} of {counts[name]} {name}" for name in far[:10])
    return held_out, (
        f"data.dev_fraction {share:g} of {len(labels)} examples asks for {share * len(labels):.0f}; with documents "
        f"kept whole, dev has {sum(held_out)} ({detail})"
    )


def _quotas(counts: Sequence[int], share: float) -> list[int]:
    """How many of each label: its share rounded up or down (largest remainders), so that the sum is right."""
    total = max(1, round(share * sum(counts)))
    exact = [share * count for count in counts]
    quotas = [int(value + 1e-9) for value in exact]
    # A label's last example stays in training.
    order = sorted(range(len(counts)), key=lambda i: (quotas[i] - exact[i], i))
    for i in order:
        if sum(quotas) < total and quotas[i] < min(exact[i] + 1 - 1e-9, counts[i] - 1):
            quotas[i] += 1
    return quotas


def _draw_groups(
    labels: Sequence[str], groups: Sequence[str], names: Sequence[str], share: float, seed: int
) -> list[bool]:
    """Whole groups for the dev split: a greedy draw in random order, large ones first, then single moves and swaps."""
    order = sorted(set(groups))
    random.Random(f"dev/{seed}").shuffle(order)
    number, column = {group: i for i, group in enumerate(order)}, {name: i for i, name in enumerate(names)}
    counts = np.zeros((len(order), len(names)))
    for label, group in zip(labels, groups):
        counts[number[group], column[label]] += 1
    total = counts.sum(0)
    # Besides each label, the whole: with many small labels it would drift.
    counts = np.concatenate([counts, counts.sum(1, keepdims=True)], axis=1)
    target, most = share * counts.sum(0), np.append(total - 1, np.inf)
    chosen, now = np.zeros(len(order), dtype=bool), np.zeros(counts.shape[1])

    def cost(sums: np.ndarray) -> np.ndarray:
        return np.where((sums <= most).all(-1), ((sums - target) ** 2).sum(-1), np.inf)

    for i in np.argsort(-counts[:, -1], kind="stable"):
        if cost(now + counts[i]) < cost(now):
            chosen[i], now = True, now + counts[i]
    for _ in range(MOVES):
        sign = np.where(chosen, -1.0, 1.0)[:, None]
        single = cost(now + sign * counts)
        inner, outer = np.flatnonzero(chosen), np.flatnonzero(~chosen)
        best, moved = single.min(), [int(single.argmin())]
        if len(inner) and len(outer) and len(inner) * len(outer) * len(target) <= SWAPS:
            swapped = cost(now + counts[outer][None] - counts[inner][:, None])
            if swapped.min() < best - 1e-9:
                i, j = np.unravel_index(int(swapped.argmin()), swapped.shape)
                best, moved = swapped.min(), [int(inner[i]), int(outer[j])]
        if not best < cost(now) - 1e-9:
            break
        for i in moved:
            now = now + (-1.0 if chosen[i] else 1.0) * counts[i]
            chosen[i] = not chosen[i]
    if not chosen.any() and np.isfinite(cost(counts)).any():  # a dev split without an example says nothing
        chosen[int(cost(counts).argmin())] = True
    return [bool(chosen[number[group]]) for group in groups]


def fold_of(labels: Sequence[str], groups: Sequence[str], folds: int, seed: int) -> list[int]:
    """The fold, 0 to `folds` - 1, of each example.

    Examples of one group (a document) are in one fold. A label whose examples are all in one fold stays out of every
    fold (-1: always in training): it could not be learnt when that fold is held out.
    """
    # Imported here: it takes more than a second, and most runs have a dev split.
    from sklearn.model_selection import StratifiedGroupKFold

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a label rarer than folds cannot be in each of them: expected here
        splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed % 2**32)
        result = np.zeros(len(labels), dtype=int)
        for number, (_, held_out) in enumerate(splitter.split(np.zeros(len(labels)), labels, groups)):
            result[held_out] = number
    for label in set(labels):
        places = [i for i, name in enumerate(labels) if name == label]
        if len({int(result[i]) for i in places}) == 1:
            kept = {groups[i] for i in places}
            result[[i for i, group in enumerate(groups) if group in kept]] = -1
    return [int(number) for number in result]
