"""Development splits that a corpus does not bring, a share of the training split or one of N folds, and smaller
training splits.
"""

import random
import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np

MOVES = 2_000  # of documents, after the first draw
SWAPS = 2_000_000  # pairs of documents that are compared at a time


Labels = Sequence[str | tuple[str, ...]]  # of examples: one label each, or several


def _sets(labels: Labels) -> list[tuple[str, ...]]:
    return [label if isinstance(label, tuple) else (label,) for label in labels]


def draw_share(labels: Labels, groups: Sequence[str], share: float, seed: int) -> tuple[list[bool], str | None]:
    """Whether each example goes to the dev split, and a remark where the split is not what was asked for.

    Every label gets its `share` to within one example, and the whole its share rounded to a whole number, where every
    example is a group of its own and has one label. Otherwise groups stay together and the numbers come as near as a
    search finds. A label keeps at least one example in training.
    """
    sets = _sets(labels)
    counts = Counter(label for found in sets for label in found)
    names = sorted(counts)
    if len(set(groups)) == len(groups) and all(len(found) == 1 for found in sets):
        wanted = _quotas([counts[name] for name in names], share)
        chosen: set[int] = set()
        places: dict[str, list[int]] = {name: [] for name in names}
        for i, (label,) in enumerate(sets):
            places[label].append(i)
        for name, count in zip(names, wanted):
            chosen.update(random.Random(f"dev/{seed}/{name}").sample(places[name], count))
        return [i in chosen for i in range(len(labels))], None
    held_out = _draw_groups(sets, groups, names, share, seed)
    dev = Counter(label for found, out in zip(sets, held_out) if out for label in found)
    far = [name for name in names if abs(dev[name] - share * counts[name]) >= 1]
    if not far:
        return held_out, None
    detail = ", ".join(f"{dev[name]} of {counts[name]} {name}" for name in far[:10])
    kept = "documents kept whole" if len(set(groups)) < len(groups) else "several labels per example"
    return held_out, (
        f"data.dev_fraction {share:g} of {len(labels)} examples asks for {share * len(labels):.0f}; with {kept}, dev "
        f"has {sum(held_out)} ({detail})"
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
    labels: Sequence[Sequence[str]], groups: Sequence[str], names: Sequence[str], share: float, seed: int
) -> list[bool]:
    """Whole groups for the dev split: a greedy draw in random order, large ones first, then single moves and swaps."""
    order = sorted(set(groups))
    random.Random(f"dev/{seed}").shuffle(order)
    number = {group: i for i, group in enumerate(order)}
    counts = _counts(labels, [number[group] for group in groups], names)
    # Besides each label, the whole: with many small labels it would drift.
    target, most = share * counts.sum(0), np.append(counts.sum(0)[:-1] - 1, np.inf)
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


def _counts(labels: Sequence[Sequence[str]], groups: Sequence[int], names: Sequence[str]) -> np.ndarray:
    """Examples of each group that have each label, and in the last column all of them, float64 [groups, labels + 1]."""
    column = {name: i for i, name in enumerate(names)}
    counts = np.zeros((max(groups) + 1, len(names) + 1))
    for found, group in zip(labels, groups):
        counts[group, [*(column[label] for label in found), -1]] += 1
    return counts


def fold_of(labels: Labels, groups: Sequence[str], folds: int, seed: int) -> list[int]:
    """The fold, 0 to `folds` - 1, of each example.

    Examples of one group (a document) are in one fold. A label whose examples are all in one fold stays out of every
    fold (-1: always in training): it could not be learnt when that fold is held out.
    """
    sets = _sets(labels)
    if all(len(found) == 1 for found in sets):
        result = _stratified([label for (label,) in sets], groups, folds, seed)
    else:
        result = _iteratively_stratified(sets, groups, folds, seed)
    for label in sorted({label for found in sets for label in found}):
        places = [i for i, found in enumerate(sets) if label in found]
        if len({int(result[i]) for i in places}) == 1:
            kept = {groups[i] for i in places}
            result[[i for i, group in enumerate(groups) if group in kept]] = -1
    return [int(number) for number in result]


def _stratified(labels: Sequence[str], groups: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """The fold of each example, which has one label."""
    # Imported here: it takes more than a second, and most runs have a dev split.
    from sklearn.model_selection import StratifiedGroupKFold

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a label rarer than folds cannot be in each of them: expected here
        splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed % 2**32)
        result = np.zeros(len(labels), dtype=int)
        for number, (_, held_out) in enumerate(splitter.split(np.zeros(len(labels)), labels, groups)):
            result[held_out] = number
    return result


def _iteratively_stratified(
    labels: Sequence[Sequence[str]], groups: Sequence[str], folds: int, seed: int
) -> np.ndarray:
    """The fold of each example with any number of labels: the rarest label first, each group to the fold that lacks
    most of it, then most of all examples (Sechidis et al., ECML PKDD 2011, with groups in place of examples).

    The package iterative-stratification (0.1.9, of 2024) cannot keep groups together.
    """
    order = sorted(set(groups))
    random.Random(f"folds/{seed}").shuffle(order)
    number = {group: i for i, group in enumerate(order)}
    place = np.array([number[group] for group in groups])
    counts = _counts(labels, place.tolist(), sorted({label for found in labels for label in found}))
    lacking = np.tile(counts.sum(0) / folds, (folds, 1))
    fold = np.full(len(order), -1)
    while (fold < 0).any():
        left = np.where(fold < 0, counts.T, 0).sum(1)  # of each label; the last column, all, when none of them is left
        label = int(np.where(left[:-1] > 0, left[:-1], np.inf).argmin()) if (left[:-1] > 0).any() else -1
        mine = np.flatnonzero((fold < 0) & (counts[:, label] > 0))
        for group in mine[np.argsort(-counts[mine, label], kind="stable")]:
            best = int(np.lexsort((-lacking[:, -1], -lacking[:, label]))[0])
            fold[group] = best
            lacking[best] -= counts[group]
    return fold[place]


def nested_subset(labels: Labels, share: float, seed: int) -> list[bool]:
    """Whether each example is in the subset of a `share` of each label's examples; smaller shares are in larger ones.

    Of n examples with one label, round(share n) are kept. Of examples with several, each set of labels has its share
    on average. Every label keeps at least one example.
    """
    sets = _sets(labels)
    order = list(range(len(sets)))
    random.Random(f"subset/{seed}").shuffle(order)
    sizes, seen, covered = Counter(sets), Counter[tuple[str, ...]](), set[str]()
    single = all(len(found) == 1 for found in sets)
    kept = [False] * len(sets)
    for i in order:
        found = sets[i]
        start = 0.5 if single else random.Random(f"subset/{seed}/{found}").random()
        first = not covered.issuperset(found)
        kept[i] = first or (seen[found] + start) / sizes[found] < share
        seen[found] += 1
        covered.update(found)
    return kept
