"""MLflow: the server of MLFLOW_TRACKING_URI, or without one the folder RUN/mlruns."""

import time

import mlflow
import numpy as np
from mlflow.entities import Metric, Param
from mlflow.environment_variables import MLFLOW_ALLOW_FILE_STORE

from irtune.tracking.writers.writer import Session, Writer

BATCH, VALUE = 900, 500  # metrics a call, and characters of a parameter, that servers take


class MlflowWriter(Writer):
    """A run of the experiment irtune, with the configuration as parameters and pictures as artifacts."""

    def __init__(self, session: Session):
        local = None
        if not mlflow.is_tracking_uri_set():
            MLFLOW_ALLOW_FILE_STORE.set(True)  # for one run a folder is enough; mlflow would rather have a database
            local = (session.folder / "mlruns").absolute().as_uri()
        self.client = mlflow.MlflowClient(tracking_uri=local)
        experiment = self.client.get_experiment_by_name("irtune")
        number = experiment.experiment_id if experiment else self.client.create_experiment("irtune")
        known = self.client.search_runs([number], f"tags.irtune = '{session.key}'")
        run = known[0] if known else self.client.create_run(number, tags={"irtune": session.key},
                                                            run_name=session.folder.name)  # fmt: skip
        self.id = run.info.run_id
        if not known:
            flat = [Param(f"{section}.{key}", str(value)[:VALUE]) for section, keys in session.config.items()
                    if isinstance(keys, dict) for key, value in keys.items()]  # fmt: skip
            for start in range(0, len(flat), 100):
                self.client.log_batch(self.id, params=flat[start : start + 100])

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers by tag; a % and other signs that mlflow refuses are left out of it."""
        now = int(time.time() * 1000)
        metrics = [Metric(_name(tag), float(value), now, step) for tag, value in values.items()]
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(self.id, metrics=metrics[start : start + BATCH])

    def picture(self, tag: str, image: np.ndarray, step: int) -> None:
        """A picture, one file for each step."""
        self.client.log_image(self.id, image, artifact_file=f"{_name(tag)}_{step}.png")

    def text(self, tag: str, text: str, step: int) -> None:
        """A text, of which the last one stays."""
        self.client.log_text(self.id, text, f"{_name(tag)}.md")

    def outcome(self, choices: dict[str, str | float], final: dict[str, float], step: int) -> None:
        """Final metrics; the choices are parameters already."""
        self.scalars(final, step)

    def close(self) -> None:
        """Mark the run as ended."""
        self.client.set_terminated(self.id)


def _name(tag: str) -> str:
    """A tag in letters that mlflow takes."""
    return "".join(letter if letter.isalnum() or letter in "_-./ :" else "_" for letter in tag)


def open_writer(session: Session) -> Writer:
    """The writer of a run."""
    return MlflowWriter(session)
