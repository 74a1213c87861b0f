"""Evaluation in a separate process (`train.eval_async`): rank 0 asks, a Ray task of the driver evaluates.

The figures of a step are also written to the run's folder, as ``evaluations/step-00000120.json``: a resumed run does
not ask for them again.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import fsspec

from cluster.recipe.config import Recipe, build_recipe, eval_rows, for_workers
from cluster.record.run_folder import RunFolder, retried
from cluster.run.monitor import ActorClient, ActorMonitor
from perceiver.config import UserError
from perceiver.storage import first_line
from perceiver.train.hooks import Scored

log = logging.getLogger(__name__)

FOLDER = "evaluations"
POLL_S = 0.25
"""Between two questions of rank 0 whether there is news."""


def score(tree: Mapping[str, Any], url: str, quarantine_url: str) -> dict[str, float]:
    """Evaluate a checkpoint in this process; return the task's figures.

    Args:
        tree: the run's recipe, as its workers have it.
        url: of the checkpoint.
        quarantine_url: the folder for the bad samples that are met, if there are any.
    """
    import torch

    from cluster.predict.scoring import Scoring
    from perceiver.export.weights import open_weights
    from pipelines.feed.ingest import load_data
    from pipelines.shards.quarantine import Quarantine

    recipe = build_recipe(tree)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    saved, quarantine = open_weights(url), Quarantine(recipe.data.max_bad_fraction)
    rows = eval_rows(recipe, recipe.cluster.workers)
    figures = Scoring(saved, recipe, load_data(recipe.data), saved.build().to(device), rows).metrics(quarantine)
    if quarantine.problems:
        quarantine.write(quarantine_url)
    return figures


@dataclass
class RemoteEvaluator:
    """Rank 0's end: implements the protocol `perceiver.train.hooks.Evaluator`."""

    client: ActorClient
    _asked: Any = field(default=None, init=False)
    _last: float = field(default=0.0, init=False)

    def ask(self, step: int) -> None:
        """See the protocol."""
        self.client.send("evaluate", {"step": step}, urgent=True)

    def results(self, wait: bool) -> list[Scored]:
        """See the protocol."""
        import ray

        if self._asked is None and (wait or time.monotonic() - self._last > POLL_S):
            self._asked, self._last = self.client.handle.take.remote(), time.monotonic()
        if self._asked is None or not ray.wait([self._asked], timeout=POLL_S if wait else 0)[0]:
            return []
        posted, self._asked = ray.get(self._asked), None
        if wait and not posted:
            time.sleep(POLL_S)
        return [Scored(news["step"], news["metrics"]) for news in posted]


@dataclass
class EvaluationTasks:
    """The driver's end: starts the task that rank 0 asked for, and passes on what it finds.

    An evaluation that fails costs its figures, not the run.

    Attributes:
        recipe: of the run.
        folder: of the run.
        monitor: through which the workers ask and are told.
        show: shows the user an event.
    """

    recipe: Recipe
    folder: RunFolder
    monitor: ActorMonitor
    show: Callable[[dict[str, Any]], None]
    _step: int | None = field(default=None, init=False)
    _task: Any = field(default=None, init=False)

    def note(self, event: Mapping[str, Any]) -> None:
        """Take in an event of a worker; kinds other than `evaluate` change nothing."""
        if event["kind"] == "evaluate" and event["step"] != self._step:
            self.cancel()
            self._step, self._task = event["step"], self._start(event["step"])

    def collect(self) -> None:
        """Pass the figures on if they are there, or show why there are none."""
        import ray
        from ray.exceptions import RayError

        if self._task is None or not ray.wait([self._task], timeout=0)[0]:
            return
        step, task = self._step, self._task
        assert step is not None
        self._step = self._task = None
        try:
            metrics: Any = ray.get(task)
            write_score(self.folder, Scored(step, metrics))
        except (RayError, UserError) as error:
            self.monitor.post({"step": step, "metrics": {}})
            log.error("the evaluation of step %d failed: %s", step, error)
            reason = first_line(getattr(error, "cause", None) or error)
            self.show({"kind": "unscored", "rank": 0, "step": step, "reason": reason})
        else:
            self.monitor.post({"step": step, "metrics": metrics})

    def cancel(self) -> None:
        """End the task that runs, if there is one."""
        import ray

        if self._task is not None:
            ray.cancel(self._task, force=True)
        self._step = self._task = None

    def _start(self, step: int) -> Any:
        import ray

        cluster = self.recipe.cluster
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": cluster.gpus_per_worker, "name": f"evaluation of {step}"}
        if cluster.worker_labels:
            options["label_selector"] = cluster.worker_labels
        place = self.folder.checkpoints.location(step)
        bad = self.folder.location("quarantine", f"evaluation-{step:08d}")
        return ray.remote(score).options(**options).remote(for_workers(self.recipe), place, bad)  # type: ignore[attr-defined]


def write_score(folder: RunFolder, scored: Scored) -> None:
    """Keep the figures of a step in the run's folder."""
    text = json.dumps({"step": scored.step, "metrics": dict(scored.metrics)})
    folder.write(f"{FOLDER}/step-{scored.step:08d}.json", text + "\n")


def read_scores(folder: RunFolder) -> dict[int, Mapping[str, float]]:
    """Return the figures that were found beside the run, by step."""
    fs, root = fsspec.core.url_to_fs(folder.location(FOLDER))

    def read() -> list[dict[str, Any]]:
        fs.invalidate_cache()
        return [json.loads(fs.cat_file(path)) for path in fs.glob(f"{root}/step-*.json")]

    return {scored["step"]: scored["metrics"] for scored in retried(fs, f"reading {folder.location(FOLDER)}", read)}
