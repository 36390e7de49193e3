"""trackio: a database on this machine, in trackio's own folder (TRACKIO_DIR), where its dashboard looks for it."""

import contextlib
import io

import numpy as np
import trackio

from irtune.tracking.writers.writer import Session, Writer


class TrackioWriter(Writer):
    """Numbers and pictures of one run of the project irtune."""

    def __init__(self, session: Session):
        with contextlib.redirect_stdout(io.StringIO()):  # its advertisement; stdout is for irtune's lines
            self.run = trackio.init(project="irtune", name=f"{session.folder.name}-{session.key}", resume="allow",
                                    config=session.config, embed=False, auto_log_gpu=False,
                                    auto_log_cpu=False)  # fmt: skip

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers by tag."""
        self.run.log(dict(values), step=step)

    def picture(self, tag: str, image: np.ndarray, step: int) -> None:
        """A picture."""
        self.run.log({tag: trackio.Image(image)}, step=step)

    def outcome(self, choices: dict[str, str | float], final: dict[str, float], step: int) -> None:
        """Final metrics."""
        self.scalars(final, step)

    def close(self) -> None:
        """Wait until everything is written."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.run.finish()


def open_writer(session: Session) -> Writer:
    """The writer of a run."""
    return TrackioWriter(session)
