"""What a run has left behind: `perceiver.Run`."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from perceiver.config import UserError
from perceiver.tracking.redaction import redact_text

if TYPE_CHECKING:
    from cluster.record.run_folder import RunFolder
    from perceiver.api.recipes import Place


class RunError(Exception):
    """A run that failed after its workers had started.

    Attributes:
        run: the run, which `perceiver.resume` continues from its last checkpoint.
    """

    def __init__(self, message: str, run: "Run") -> None:
        super().__init__(redact_text(message))
        self.run = run


@dataclass(frozen=True)
class Run:
    """A run by its folder. Everything is read from there when it is asked for, also while the run is training.

    Attributes:
        folder: a path or an fsspec URL.

    Raises:
        UserError: from the properties, if the folder cannot be read or a file in it is damaged.
    """

    folder: str

    def __init__(self, folder: "Place") -> None:
        object.__setattr__(self, "folder", os.fspath(folder).rstrip("/"))

    def __fspath__(self) -> str:
        return self.folder

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.rpartition("/")[2]

    @property
    def status(self) -> str:
        """`running`, `finished`, `stopped`, `refused` or `failed`."""
        return str(facts_of(self).get("status") or "")

    @property
    def step(self) -> int | None:
        """Optimizer steps of the last end of the run; None before."""
        return facts_of(self).get("step")

    @property
    def metrics(self) -> dict[str, float]:
        """The figures of the last evaluation of a finished run, such as `accuracy`; empty before."""
        return dict(facts_of(self).get("evaluation") or {})

    @property
    def history(self) -> list[dict[str, Any]]:
        """The recorded metrics in order: `step`, `time`, `train/loss`, `eval/accuracy`, ...

        Of a run that trained on another machine, those up to its newest checkpoint.
        """
        from perceiver.tracking.record import HISTORY, read_rows

        path, found, offset = place_of(self).local / HISTORY, [], 0
        if not path.exists():
            store = place_of(self).checkpoints
            steps = store.steps()
            return [json.loads(line) for line in store.history(steps[-1]).splitlines() if line] if steps else []
        while (rows := read_rows(path, offset))[1] > offset:
            found += rows[0]
            offset = rows[1]
        return found

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe; secrets in it are `***`."""
        from perceiver.yaml_reader import parse_yaml

        return parse_yaml(place_of(self).read("recipe.yaml") or "{}", f"{self.folder}/recipe.yaml")

    @property
    def checkpoint(self) -> str | None:
        """The folder of the newest checkpoint; None without one."""
        store = place_of(self).checkpoints
        steps = store.steps()
        return store.location(steps[-1]) if steps else None

    @property
    def report(self) -> str | None:
        """The HTML page of a finished run; None before."""
        from cluster.record.run_folder import REPORT

        return place_of(self).location(REPORT) if place_of(self).exists(REPORT) else None

    @property
    def mlflow_run_id(self) -> str | None:
        """Id of the MLflow run; None without one."""
        from perceiver.tracking.runs import load_handle

        handle = load_handle(place_of(self).local)
        return (handle.run_id if handle else None) or facts_of(self).get("mlflow_run")


def place_of(run: "Place") -> "RunFolder":
    """Return a run's folder as its output folder and its name."""
    from cluster.record.run_folder import RunFolder

    above, _, name = os.fspath(run).rstrip("/").rpartition("/")
    return RunFolder(above or ".", name)


def facts_of(run: "Place") -> Mapping[str, Any]:
    """Return a run's run.json.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder = place_of(run)
    if facts := folder.facts():
        return facts
    raise UserError(f"{folder.url} is not the folder of a run: wanted one with run.json, such as runs/photos-001")
