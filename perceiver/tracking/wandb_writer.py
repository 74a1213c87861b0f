"""Sends the metrics of a run to Weights & Biases. Runs in a separate process, as MLflow's writer does.

Each row of `history.jsonl` is logged with its step as the metric `step`, which is the x axis of all others: W&B's own
counter only grows, while a row of an asynchronous evaluation is of an earlier step. `tracking/wandb.json` has the id of
the run and the last step that each metric was sent for, so that a resumed run, which repeats steps, continues the W&B
run with one point per step. Offline, each start writes all rows again, as for TensorBoard.
"""

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perceiver.storage import write_whole
from perceiver.tracking.following import follow
from perceiver.tracking.record import HISTORY, WANDB, read_rows

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read by the import: errors go to our log, not to W&B

import wandb  # noqa: E402

FOLDER = "wandb"


class RunWriter:
    """Copies the rows of a run's record to a W&B run.

    Args:
        request: what `WandbConfig.request` returns.
    """

    def __init__(self, request: Mapping[str, Any]) -> None:
        self._folder = Path(request["folder"])
        self._history, self._offset = self._folder / HISTORY, 0
        path = self._folder / WANDB
        state = json.loads(path.read_text()) if path.exists() else {"id": uuid.uuid4().hex[:8], "sent": {}}
        self._id: str = state["id"]
        self._sent: dict[str, int] = state["sent"]
        if request["mode"] == "offline":
            for before in (self._folder / FOLDER).glob(f"offline-run-*-{self._id}"):
                shutil.rmtree(before)
            self._sent = {}
        self._note()  # before the run exists: a start that is killed here continues it
        self._run = wandb.init(
            project=request["project"],
            entity=request["entity"],
            name=self._folder.name,
            id=self._id,
            resume="allow",
            mode=request["mode"],
            dir=str(self._folder),
            config=dict(request["config"]),
            # Neither the address of a git remote nor code, output or environment of this process belong to the run.
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_stats=True,
            ),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def send(self) -> None:
        """Log the rows that are recorded and not sent yet."""
        rows, end = read_rows(self._history, self._offset)
        while end > self._offset:
            for row in rows:
                self._log(int(row.pop("step")), row)
            self._offset = end
            self._note()
            rows, end = read_rows(self._history, end)

    def _log(self, step: int, row: dict[str, float]) -> None:
        """Log the metrics of a step that W&B does not have."""
        time_s = row.pop("time")
        new = {key: value for key, value in row.items() if step > self._sent.get(key, -1)}
        if new:
            self._run.log({**new, "step": step, "time": time_s})
            self._sent |= dict.fromkeys(new, step)

    def _note(self) -> None:
        write_whole(self._folder / WANDB, json.dumps({"id": self._id, "sent": self._sent}))

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


if __name__ == "__main__":
    follow(RunWriter)
