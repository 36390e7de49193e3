"""Weights & Biases. WANDB_MODE=offline keeps everything in RUN/wandb, from where `wandb sync` sends it later."""

import numpy as np
import wandb

from irtune.tracking.writers.writer import Session, Writer


class WandbWriter(Writer):
    """Numbers and pictures over the key `step`, since the test split is told after later steps than its own."""

    def __init__(self, session: Session):
        # No console and no code: what a run prints may hold paths, and what it is made of is not wandb's business.
        settings = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False)
        self.run = wandb.init(project="irtune", id=session.key, name=session.folder.name, dir=str(session.folder),
                              config=session.config, resume="allow", settings=settings)  # fmt: skip
        self.run.define_metric("*", step_metric="step")

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers by tag."""
        self.run.log(values | {"step": step})

    def picture(self, tag: str, image: np.ndarray, step: int) -> None:
        """A picture."""
        self.run.log({tag: wandb.Image(image), "step": step})

    def outcome(self, choices: dict[str, str | float], final: dict[str, float], step: int) -> None:
        """The run's summary."""
        self.run.summary.update(final)

    def close(self) -> None:
        """Wait until everything is sent, or written."""
        self.run.finish()


def open_writer(session: Session) -> Writer:
    """The writer of a run."""
    return WandbWriter(session)
