"""What a writer may take. What it does not override, it leaves out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a writer is opened with.

    folder: the run's. start_step: what comes after it in the tracker, of a session that was killed, is void. key: the
    run's name where names must differ. config: the run's config.yaml.
    """

    folder: Path
    start_step: int
    key: str
    config: dict[str, Any]


class Writer:
    """One tracker of a run; rank 0 calls it. Tags have the form section/name, with units in them."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers by tag, all of one step."""

    def picture(self, tag: str, image: np.ndarray, step: int) -> None:
        """A picture, uint8 [height, width, 3]."""

    def text(self, tag: str, text: str, step: int) -> None:
        """A text in Markdown."""

    def curve(self, tag: str, positive: torch.Tensor, probability: torch.Tensor, step: int) -> None:
        """A precision-recall curve: bool [examples], and float [examples]."""

    def outcome(self, choices: dict[str, str | float], final: dict[str, float], step: int) -> None:
        """What was chosen and what came of it, once, when the run ends."""

    def close(self) -> None:
        """Flush and close. A run that failed closes its writers too."""
