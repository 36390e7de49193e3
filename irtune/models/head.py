"""The classification head of pretrained files: its rows put in the order of the corpus's labels, or the head anew.

A file's config.json says which row is which label. A head of the right shape is not enough: its rows may mean the same
labels in another order, or others.
"""

import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from irtune.models.anatomy import Anatomy

log = logging.getLogger("irtune")
ANEW = "the head of the files is for other labels (%s) than the corpus's (%s): it starts anew"


def set_labels(
    settings: PretrainedConfig, labels: Sequence[str], problem_type: Any = "single_label_classification"
) -> list[str]:
    """Write the labels of the corpus and the kind of problem, in transformers' words, into a model's configuration.

    Returns:
        The names that its rows had before.
    """
    names = getattr(settings, "id2label", None) or {}
    before = [str(names[number]) for number in sorted(names)]
    settings.id2label = dict(enumerate(labels))  # says how many there are, too
    settings.label2id = {label: number for number, label in enumerate(labels)}
    settings.problem_type = problem_type
    return before


@torch.no_grad()
def fit_head(
    model: nn.Module,
    anatomy: Anatomy,
    other: nn.Module,
    before: Sequence[str],
    labels: Sequence[str],
    random: Collection[str],
    replaced: Collection[str] = (),
) -> None:
    """Let row i of the head stand for label i.

    Args:
        model: freshly loaded; its head is whole.
        anatomy: of the model.
        other: the same model, without weights, for one label more: what differs in shape has a row per label.
        before: names of the rows in the files.
        labels: of the corpus.
        random: names of the parameters that are not from the files, or had another shape there.
        replaced: those of them that had another shape.
    """
    shapes = {name: parameter.shape for name, parameter in other.named_parameters()}
    rows = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if any(name.startswith(f"{part}.") for part in anatomy.head) and shapes.get(name) != parameter.shape
    ]
    anew = ", ".join(before), ", ".join(labels)
    if list(before) == list(labels) or any(name in random for name, _ in rows):
        if any(name in replaced for name, _ in rows):
            log.info(ANEW, *anew)
        return
    known = {_plain(name): number for number, name in enumerate(before)}
    order = [known.get(_plain(label)) for label in labels]
    if None not in order and len(known) == len(labels) == len(set(order)):
        places = torch.tensor(order)
        for name, parameter in rows:
            axis = [a == b for a, b in zip(parameter.shape, shapes[name], strict=True)].index(False)
            parameter.copy_(parameter.index_select(axis, places.to(parameter.device)))
        if order != list(range(len(labels))):
            log.info(
                "the head of the files has the labels in another order (%s): its rows are moved", ", ".join(before)
            )
        return
    deviation = getattr(model.config, "initializer_range", None) or 0.02
    for _, parameter in rows:
        parameter.normal_(0.0, deviation) if parameter.dim() > 1 else parameter.zero_()
    log.info(ANEW, *anew)


def _plain(name: str) -> str:
    """Names that differ in case, spaces, hyphens or underscores only are the same label."""
    return name.strip().casefold().replace("_", "-").replace(" ", "-")
