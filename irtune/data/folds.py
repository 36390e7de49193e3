"""Development splits that a corpus does not bring: stratified by label, with documents kept whole."""

import warnings
from collections.abc import Sequence

import numpy as np


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
