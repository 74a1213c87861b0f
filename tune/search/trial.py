"""One trial: a training run inside a Ray Tune trial process.

The process builds the trainer of the trial's recipe and runs it with the driver's loop (`cluster.run.driver`): a Ray
Train worker group, or, for a single worker, the same worker function in this process, which then runs one trial after
the other. Each evaluation of rank 0 becomes a result for Tune. The run keeps the checkpoints; Tune gets a pointer.
"""

import gc
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import ray
import ray.tune

from cluster.recipe.config import build_recipe
from cluster.recipe.preflight import data_facts, tracked_data
from cluster.recipe.statistics import with_statistics
from cluster.recipe.targets import with_targets
from cluster.record.run_folder import RunFolder
from cluster.run.driver import POLLED, Fit
from cluster.run.metrics import RunMetrics, ray_export
from cluster.run.trainer import Share, build_local_trainer, build_trainer
from cluster.worker.monitor import ActorClient, ActorMonitor, Event, LocalMonitor, Monitor
from perceiver.config import UserError
from perceiver.tracking.code import code_facts
from perceiver.tracking.redaction import redact
from perceiver.tracking.runs import RunHandle, TrackingConfig, promise_run, reconcile
from pipelines.feed.ingest import load_data
from tune.search.exchange import Pointer, pointer_of, take_over
from tune.search_record import number_of, trial_name
from tune.space.space import Values, with_values

log = logging.getLogger(__name__)

SAVE_WAIT_S = 60.0
END: Event = {"kind": "end", "rank": 0}


@dataclass(frozen=True)
class TrialPlan:
    """What all trials of a search share.

    Attributes:
        base: tree of the base recipe with all overrides, valid in any folder.
        output: URL of the folder of the trials.
        metrics: names of the search's metrics in evaluations.
        share: a trial's part of the cluster.
        here: run the only worker in the trial's process.
        pointers: wait for the checkpoint of each evaluation, for other trials.
        turns: the run ends when Tune requests a pointer: another trial has the next turn.
        tracking: MLflow's settings with store and experiment filled in.
        tags: tags of each trial's MLflow run, such as its parent.
        control: the monitor actor of the search, which receives progress and requests stops.
    """

    base: dict[str, Any]
    output: str
    metrics: tuple[str, ...]
    share: Share
    here: bool
    pointers: bool
    turns: bool
    tracking: TrackingConfig
    tags: dict[str, str]
    control: Any

    def folder(self, number: int) -> RunFolder:
        """Return the run folder of a trial."""
        return RunFolder(self.output, trial_name(number))


class TrialRun(ray.tune.Trainable):
    """A trial as Ray Tune drives it.

    Its configuration is ``{"number": int, "values": {key: value}, "label": str}``. Its number is that of its name
    (`tune.search_record.trial_name`): in a population the configuration may be that of another trial.
    """

    def setup(self, config: dict[str, Any], plan: TrialPlan | None = None) -> None:
        """Set the plan; training starts with the first step, after a possible restore."""
        assert plan is not None
        self.plan: TrialPlan = plan
        self.run: TrialTraining | None = None

    def step(self) -> dict[str, Any]:
        """Train until the next evaluation; return its metrics."""
        if self.run is None:
            number, values = number_of(self.trial_name), dict(self.config["values"])
            if refusal := self.plan.folder(number).facts().get("refusal"):
                return {"done": True, "ending": "refused", "error": refusal, "seconds": 0.0}
            self.run = TrialTraining(self.plan, number, values, self.config.get("label", ""))
        return self.run.next_result()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write a pointer to the run's newest checkpoint; if trials take turns, end the run."""
        assert self.run is not None
        pointer = self.run.pointer()
        if self.plan.turns:
            self.run.end()
        pointer.write(checkpoint_dir)

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Continue from the checkpoint of a pointer: the trial's own, or a copy of another trial's."""
        number = number_of(self.trial_name)
        pointer = Pointer.read(checkpoint)
        if pointer.number == number:
            return
        folder = self.plan.folder(number)
        step = take_over(folder, pointer)
        if step is not None:
            exchange = {"trial": number, "donor": pointer.number, "step": step, "values": dict(self.config["values"])}
            self.plan.control.push.remote({"kind": "exchange", **exchange})

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Run another trial after the last one has ended."""
        self.cleanup()
        self.config = new_config
        return True

    def cleanup(self) -> None:
        """Stop the trial's workers, which first save a checkpoint."""
        run, self.run = self.run, None
        if run is not None:
            run.end()
            gc.collect()


class TrialTraining:
    """The training run of a trial in this process, whose events become results for Tune."""

    def __init__(self, plan: TrialPlan, number: int, values: Values, label: str = "") -> None:
        self.plan, self.number, self.values, self.label = plan, number, values, label
        self.folder = plan.folder(number)
        self.name = "/".join([plan.output.rstrip("/").split("/")[-2], self.folder.name])
        self.figures = RunMetrics(ray_export(self.name))
        recipe = build_recipe(with_values(plan.base, {**values, "name": self.folder.name, "output": plan.output}))
        manifest = load_data(recipe.data)
        self.recipe = with_targets(with_statistics(recipe, manifest), manifest)
        self.link = ActorClient(plan.control, rank=0, interval=0.5)
        self.refusal: dict[str, Any] = {}
        self.checkpoint: dict[str, Any] | None = None
        self.throughput: float | None = None
        self.result: dict[str, Any] = {}
        self._asked = self._over = False
        self._since = time.monotonic()
        self.samples = manifest.split(self.recipe.data.train_split).samples
        tree = redact(self.recipe.model_dump(mode="json"))
        if not self.folder.facts():
            self.folder.set_aside_record()
        self.folder.write("recipe.yaml", json.dumps(tree, indent=1))  # JSON is YAML
        data = asdict(data_facts(self.recipe.data, manifest))
        self.folder.note(values=self.values, status="running", data=data, code=code_facts())
        self.datasets = tracked_data(self.recipe.data, manifest)
        self.handle = self._handle()
        self.monitor: Monitor = LocalMonitor() if plan.here else ActorMonitor()
        build = build_local_trainer if plan.here else build_trainer
        if plan.here:
            _alone()
        trainer = build(self.recipe, self.folder, self.monitor.address, self.handle, plan.share)
        self.fit = Fit(ThreadPoolExecutor(1, self.folder.name).submit(trainer.fit), self.monitor)
        self._events = self.fit.events()
        self._held: deque[Event] = deque()

    @property
    def outcome(self) -> dict[str, Any]:
        """Return the outcome of the run, empty while it runs."""
        return {**({} if self.fit.running else self.fit.outcome), **self.refusal}

    def _handle(self) -> RunHandle | None:
        config = self.plan.tracking
        tags = {**self.plan.tags, **({"perceiver.row": self.label} if self.label else {})}
        known = {"params": self.values, "tags": tags, "datasets": self.datasets}
        return promise_run(config, self.name, output=self.folder.local, **known)

    def next_result(self) -> dict[str, Any]:
        """Wait for the next evaluation or the end.

        Raises:
            RuntimeError: the workers failed; Tune restarts the trial, or it has failed.
        """
        while True:
            event = self._next_event()
            if event["kind"] == "end":
                return self._ending()
            if (result := self._take(event)) is not None:
                return result

    def _next_event(self, deadline: float = math.inf) -> Event:
        """Wait for an event of the workers and pass on a request to stop; return `END` at the deadline."""
        if self._held:
            return self._held.popleft()
        while time.monotonic() < deadline and not self._over:
            event = next(self._events, END)
            if event["kind"] == "end" and self.fit.running:
                self._abandon()
            if not self._asked and self.link.stop_requested():
                self.ask_to_stop()
            if event is not POLLED:
                return event
        return END

    def _take(self, event: Mapping[str, Any]) -> dict[str, Any] | None:
        """Handle an event; return a result if it is an evaluation."""
        self.figures.note(event)
        match event["kind"]:
            case "progress":
                self._say("progress", step=event["step"], total_steps=event["total_steps"], epoch=event["epoch"])
            case "resumed":
                self._say("resumed", step=event["step"])
            case "refused":
                self._refuse(event["error"])
            case "checkpoint":
                self.checkpoint = {**event, "at": time.time()}
            case "metrics":
                return self._evaluated(int(event["step"]), event["metrics"])
        return None

    def _evaluated(self, step: int, metrics: Mapping[str, float]) -> dict[str, Any] | None:
        self.throughput = metrics.get("train/samples_per_s", self.throughput)
        figures = {k.removeprefix("eval/"): float(v) for k, v in metrics.items() if k.startswith("eval/")}
        if not figures:
            return None
        missing = [name for name in self.plan.metrics if name not in figures]
        if missing:
            self._refuse(f"metric = {missing[0]}, but the evaluations have {', '.join(sorted(figures))}")
            return self._ending()
        epoch = step * self.recipe.train.global_batch / self.samples
        self.result = {"step": step, "epoch": epoch, "evaluation": figures, **figures}
        return {**self.result, **self._cost(), "throughput": self.throughput}

    def _refuse(self, reason: str) -> None:
        """Record that the trial cannot continue, and why."""
        self.refusal = {"status": "refused", "error": reason}
        self.folder.note(refusal=reason)

    def _abandon(self) -> None:
        """Exit, with a worker group in which one worker has refused to continue and the others wait for it.

        Tune restarts the trial, which then reads the refusal in its folder.
        """
        log.error("%s: %s; the other workers are abandoned", self.folder.name, self.fit.refused)
        os._exit(1)

    def _cost(self) -> dict[str, float]:
        """Return the seconds since the last result."""
        before, self._since = self._since, time.monotonic()
        return {"seconds": self._since - before}

    def _ending(self) -> dict[str, Any]:
        """Return the last result of a run that has ended: its last metrics, and how it ended."""
        self.end()
        status = self.outcome.get("status", "failed")
        if status == "failed":
            raise RuntimeError(self.outcome.get("error", "the workers exited without an error message"))
        return {**self.result, **self._cost(), "done": True, "ending": status, "error": self.outcome.get("error", "")}

    def _say(self, kind: str, **facts: Any) -> None:
        self.link.send(kind, {"trial": self.number, "throughput": self.throughput, **facts}, urgent=kind != "progress")

    def pointer(self) -> Pointer:
        """Wait for the checkpoint of the last evaluation; return its pointer, or raise `UserError`."""
        wanted = self.result.get("step", 0)
        deadline = time.monotonic() + SAVE_WAIT_S
        waiting: list[Event] = []
        while (self.checkpoint or {}).get("step", -1) < wanted and time.monotonic() < deadline:
            event = self._next_event(deadline)
            if event["kind"] == "checkpoint":
                self._take(event)
                continue
            if event["kind"] == "end":
                break
            waiting.append(event)
        self._held.extend(waiting)
        if self.checkpoint is None:
            raise UserError(f"{self.folder.name} has no checkpoint of step {wanted} for another trial")
        return pointer_of(self.folder, self.number, self.values, self.checkpoint)

    def ask_to_stop(self) -> None:
        """Request the workers to save and stop."""
        self._asked = True
        self.monitor.request_stop()

    def end(self) -> None:
        """Stop the run if it is running, wait for its end, and record its status."""
        if self._over:
            return
        if self.fit.running:
            self.ask_to_stop()
        for event in self._events:
            self.figures.note(event)
        self._over = True
        self.monitor.close()
        self.link.flush()
        status = self.outcome.get("status", "failed")
        self.folder.note(status=status, step=self.outcome.get("step"), error=self.outcome.get("error"))
        if self.handle is not None and status == "refused":  # a failed trial may restart
            reconcile(self.plan.tracking, self.folder.local, status="failed")


def _alone() -> None:
    """Initialise a process group of this process alone, once: DeepSpeed keeps the first one."""
    import torch.distributed as dist

    if not dist.is_initialized():
        import torch

        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", store=store, rank=0, world_size=1)
