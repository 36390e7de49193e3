"""TensorBoard: an event file in the run's folder."""

from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from irtune.tracking.writers.writer import Session, Writer


class TensorBoardWriter(Writer):
    """All that a run tells, with hparams table and precision-recall curves."""

    def __init__(self, session: Session):
        purge = session.start_step + 1 if session.start_step else None
        self.board = SummaryWriter(str(session.folder / "tensorboard"), purge_step=purge)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers by tag."""
        for tag, value in values.items():
            self.board.add_scalar(tag, value, step)

    def picture(self, tag: str, image: np.ndarray, step: int) -> None:
        """A picture."""
        self.board.add_image(tag, image, step, dataformats="HWC")

    def text(self, tag: str, text: str, step: int) -> None:
        """Markdown, in the text tab."""
        self.board.add_text(tag, text, step)

    def curve(self, tag: str, positive: torch.Tensor, probability: torch.Tensor, step: int) -> None:
        """A curve of the tab of precision-recall curves."""
        self.board.add_pr_curve(tag, positive, probability, step)

    def outcome(self, choices: dict[str, str | float], final: dict[str, float], step: int) -> None:
        """The hparams tab. Not through add_hparams: it opens a run of its own, beside this one's curves."""
        writer: Any = self.board.file_writer
        for summary in hparams(choices, final):
            writer.add_summary(summary, step)
        self.scalars(final, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self.board.close()


def open_writer(session: Session) -> Writer:
    """The writer of a run."""
    return TensorBoardWriter(session)
