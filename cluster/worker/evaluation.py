"""Asynchronous evaluation (`train.eval_async`): rank 0 requests it, a Ray task of the driver evaluates.

The metrics of a step are also written to the run's folder, as ``evaluations/step-00000120.json``, so that a resumed run
does not request them again.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.recipe.config import Recipe, build_recipe, eval_rows, for_workers
from cluster.record.run_folder import RunFolder, retried
from cluster.worker.monitor import ActorClient, ActorMonitor
from perceiver.config import UserError
from perceiver.storage import first_line, open_url
from perceiver.train.hooks import Scored

log = logging.getLogger(__name__)

FOLDER = "evaluations"
POLL_S = 0.25
"""Seconds between two requests of rank 0 for results."""


def score(tree: Mapping[str, Any], url: str, quarantine_url: str) -> dict[str, float]:
    """Evaluate a checkpoint in this process; return the task's metrics.

    Args:
        tree: the run's recipe, as sent to its workers.
        url: of the checkpoint.
        quarantine_url: folder for bad samples; written only if there are any.
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
    """Rank 0's end; implements the protocol `perceiver.train.hooks.Evaluator`."""

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
    """The driver's end: starts the requested evaluation and sends its metrics to rank 0.

    A failed evaluation has no metrics; the run continues.

    Attributes:
        recipe: of the run.
        folder: of the run.
        monitor: receives requests and sends metrics.
        show: shows an event to the user.
    """

    recipe: Recipe
    folder: RunFolder
    monitor: ActorMonitor
    show: Callable[[dict[str, Any]], None]
    _step: int | None = field(default=None, init=False)
    _task: Any = field(default=None, init=False)

    def note(self, event: Mapping[str, Any]) -> None:
        """Process an event of a worker; kinds other than `evaluate` are ignored."""
        if event["kind"] == "evaluate" and event["step"] != self._step:
            self.cancel()
            self._step, self._task = event["step"], self.start_task(event["step"])

    def collect(self) -> None:
        """Send the metrics of a finished evaluation to rank 0, or show why it failed."""
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
        """Cancel the running task, if there is one."""
        import ray

        if self._task is not None:
            ray.cancel(self._task, force=True)
        self._step = self._task = None

    def start_task(self, step: int) -> Any:
        """Start the Ray task that evaluates the checkpoint of a step; return its reference."""
        import ray

        cluster = self.recipe.cluster
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": cluster.gpus_per_worker, "name": f"evaluation of {step}"}
        if cluster.worker_labels:
            options["label_selector"] = cluster.worker_labels
        place = self.folder.checkpoints.location(step)
        bad = self.folder.location("quarantine", f"evaluation-{step:08d}")
        return ray.remote(score).options(**options).remote(for_workers(self.recipe), place, bad)  # type: ignore[attr-defined]


def write_score(folder: RunFolder, scored: Scored) -> None:
    """Write the metrics of a step to the run's folder."""
    text = json.dumps({"step": scored.step, "metrics": dict(scored.metrics)})
    folder.write(f"{FOLDER}/step-{scored.step:08d}.json", text + "\n")


def read_scores(folder: RunFolder) -> dict[int, Mapping[str, float]]:
    """Return the metrics of asynchronous evaluations in a run's folder, by step."""
    fs, root = open_url(folder.location(FOLDER))

    def read() -> list[dict[str, Any]]:
        fs.invalidate_cache()
        return [json.loads(fs.cat_file(path)) for path in fs.glob(f"{root}/step-*.json")]

    return {scored["step"]: scored["metrics"] for scored in retried(fs, f"reading {folder.location(FOLDER)}", read)}
