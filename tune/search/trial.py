"""One trial: a whole training run inside a Ray Tune trial process, evaluated step by step.

The process builds the trainer of the trial's recipe and fits it in a thread: a Ray Train worker group, or, for a single
worker, the same worker function in this very process, which then serves one trial after the other. Each evaluation that
rank 0 reports becomes a result for Tune. Checkpoints are the run's own; Tune is given a pointer to them.
"""

import gc
import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.tune

from cluster.recipe.config import build_recipe
from cluster.recipe.origin import data_facts
from cluster.record.failures import failure_reason
from cluster.record.run_folder import RunFolder, redacted_recipe
from cluster.run.metrics import RunMetrics, ray_export
from cluster.run.monitor import LocalMonitor, MonitorClient, pump, start_monitor
from cluster.run.trainer import Share, build_local_trainer, build_trainer
from perceiver.config import UserError
from perceiver.tracking.runs import RunHandle, TrackingConfig, promise_run, reconcile
from pipelines.feed.ingest import load_data
from tune.record import trial_name
from tune.search.exchange import Pointer, pointer_of, take_over
from tune.space.space import Values, with_values

log = logging.getLogger(__name__)

SAVE_WAIT_S = 60.0
REFUSED_GRACE_S = 3.0


@dataclass(frozen=True)
class TrialPlan:
    """What all trials of a search share.

    Attributes:
        base: tree of the base recipe with all overrides, meaningful in any folder.
        output: URL of the folder that trials lie in.
        metrics: names of the evaluation's figures that the search looks at.
        share: a trial's part of the cluster.
        here: run the only worker in the trial's process.
        pointers: wait for the checkpoint of each evaluation, to be handed to other trials.
        turns: the run ends when Tune asks for a pointer: another trial has the next turn.
        tracking: MLflow's settings with store and experiment filled in.
        tags: tags of each trial's MLflow run, such as its parent.
        control: the monitor actor of the search, which takes progress and asks to stop.
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
    """A trial as Ray Tune drives it. Its configuration is ``{"number": int, "values": {key: value}, "label": str}``."""

    def setup(self, config: dict[str, Any], plan: TrialPlan | None = None) -> None:
        """Take the plan; training begins with the first step, when Tune has said whether to restore."""
        assert plan is not None
        self.plan: TrialPlan = plan
        self.run: Running | None = None

    def step(self) -> dict[str, Any]:
        """Train until the next evaluation; return its figures."""
        if self.run is None:
            number, values = int(self.config["number"]), dict(self.config["values"])
            if refusal := self.plan.folder(number).facts().get("refusal"):
                return {"done": True, "ending": "refused", "error": refusal, "seconds": 0.0}
            self.run = Running(self.plan, number, values, self.config.get("label", ""))
        return self.run.next_result()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write a pointer to the run's newest checkpoint; where trials take turns, the run is over then."""
        assert self.run is not None
        pointer = self.run.pointer()
        if self.plan.turns:
            self.run.end()
        pointer.write(checkpoint_dir)

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Go on from the checkpoint a pointer names: the trial's own, or another trial's, which is copied."""
        number = int(self.config["number"])
        pointer = Pointer.read(checkpoint)
        if pointer.number == number:
            return
        folder = self.plan.folder(number)
        step = take_over(folder, pointer)
        if step is not None:
            exchange = {"trial": number, "donor": pointer.number, "step": step, "values": dict(self.config["values"])}
            self.plan.control.push.remote({"kind": "exchange", **exchange})

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Serve another trial, after the last one has ended."""
        self.cleanup()
        self.config = new_config
        return True

    def cleanup(self) -> None:
        """End the trial's workers; they save a checkpoint first."""
        run, self.run = self.run, None
        if run is not None:
            run.end()
            gc.collect()


class Running:
    """A training run in a thread of this process, and what it says."""

    def __init__(self, plan: TrialPlan, number: int, values: Values, label: str = "") -> None:
        self.plan, self.number, self.values, self.label = plan, number, values, label
        self.folder = plan.folder(number)
        self.name = "/".join([plan.output.rstrip("/").split("/")[-2], self.folder.name])
        self.figures = RunMetrics(ray_export(self.name))
        self.recipe = build_recipe(with_values(plan.base, {**values, "name": self.folder.name, "output": plan.output}))
        self.link = MonitorClient(plan.control, rank=0, interval=0.5)
        self.outcome: dict[str, Any] = {}
        self.refusal: dict[str, Any] = {}
        self.refused_at: float | None = None
        self.checkpoint: dict[str, Any] | None = None
        self.throughput: float | None = None
        self.result: dict[str, Any] = {}
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._pumping = threading.Lock()
        self._asked = self._over = False
        self._since = time.monotonic()
        manifest = load_data(self.recipe.data)
        self.samples = manifest.split(self.recipe.data.train_split).samples
        self._start(data_facts(manifest))

    def _start(self, data: Mapping[str, Any]) -> None:
        tree = redacted_recipe(self.recipe.model_dump(mode="json"))
        self.folder.write("recipe.yaml", json.dumps(tree, indent=1))  # JSON is YAML
        self.folder.note(values=self.values, status="running", data=data)
        self.handle = self._handle()
        if self.plan.here:
            self.monitor: Any = LocalMonitor(self._events)
            _alone()
            build = build_local_trainer
        else:
            self.monitor = start_monitor()
            build = build_trainer
        trainer = build(self.recipe, self.folder, self.monitor, self.handle, self.plan.share)
        self.thread = threading.Thread(target=self._fit, args=(trainer,), daemon=True, name=self.folder.name)
        self.thread.start()

    def _handle(self) -> RunHandle | None:
        config = self.plan.tracking
        tags = {**self.plan.tags, **({"perceiver.row": self.label} if self.label else {})}
        return promise_run(config, self.name, output=self.folder.local, params=self.values, tags=tags)

    def _fit(self, trainer: Any) -> None:
        try:
            self.outcome = {**(trainer.fit().return_value or {}), **self.refusal}
        except Exception as error:  # noqa: BLE001  whatever Ray or the worker raises is the trial's failure
            log.exception("%s failed", self.folder.name)
            self.outcome = {"status": "failed", "error": failure_reason(error)}
        self._pump()
        self._events.put({"kind": "end"})

    def _pump(self) -> None:
        """Fetch the events of a worker group; those of a worker in this process come by themselves."""
        if not self.plan.here:
            with self._pumping:
                pump(self.monitor, self._events.put)

    def next_result(self) -> dict[str, Any]:
        """Wait for the next evaluation or the end.

        Raises:
            RuntimeError: the workers failed; Tune starts the trial again, or gives it up.
        """
        while True:
            event = self._next_event()
            if event["kind"] == "end":
                return self._ending()
            if (result := self._take(event)) is not None:
                return result

    def _next_event(self, deadline: float = math.inf) -> dict[str, Any]:
        """Wait for an event of the workers, passing on a request to stop; the end if none comes in time."""
        while time.monotonic() < deadline and not self._over:
            if not self._asked and self.link.stop_requested():
                self.ask_to_stop()
            if self.refused_at is not None and time.monotonic() - self.refused_at > REFUSED_GRACE_S:
                self._abandon()
            if self.thread.is_alive():
                self._pump()
            try:
                return self._events.get(timeout=0.1)
            except queue.Empty:
                continue
        return {"kind": "end"}

    def _take(self, event: Mapping[str, Any]) -> dict[str, Any] | None:
        """Take note of an event; return a result if it is an evaluation (with pointers: its checkpoint)."""
        self.figures.note(event)
        match event["kind"]:
            case "progress":
                self._say("progress", step=event["step"], total_steps=event["total_steps"], epoch=event["epoch"])
            case "resumed":
                self._say("resumed", step=event["step"])
            case "refused":
                self._refuse(event["error"])
                self.refused_at = time.monotonic()
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
            self._refuse(f"metric = {missing[0]}, but the evaluations give {', '.join(sorted(figures))}")
            return self._ending()
        epoch = step * self.recipe.train.global_batch / self.samples
        self.result = {"step": step, "epoch": epoch, "evaluation": figures, **figures}
        return {**self.result, **self._cost(), "throughput": self.throughput}

    def _refuse(self, reason: str) -> None:
        """Note that going on makes no sense, and why."""
        self.refusal = {"status": "refused", "error": reason}
        self.folder.note(refusal=reason)

    def _abandon(self) -> None:
        """End this process, and with it a worker group in which one refused to go on and the others wait for it.

        Tune starts the trial again, which then finds the refusal in its folder.
        """
        if self.thread.is_alive():
            log.error("%s: %s; the other workers are abandoned", self.folder.name, self.refusal["error"])
            os._exit(1)

    def _cost(self) -> dict[str, float]:
        """Return the seconds since the last result."""
        before, self._since = self._since, time.monotonic()
        return {"seconds": self._since - before}

    def _ending(self) -> dict[str, Any]:
        """Return the last result of a run that is over: the last figures again, with how it ended."""
        self.end()
        status = self.outcome.get("status", "failed")
        if status == "failed":
            raise RuntimeError(self.outcome.get("error", "the workers ended without a word"))
        return {**self.result, **self._cost(), "done": True, "ending": status, "error": self.outcome.get("error", "")}

    def _say(self, kind: str, **facts: Any) -> None:
        self.link.send(kind, {"trial": self.number, "throughput": self.throughput, **facts}, urgent=kind != "progress")

    def pointer(self) -> Pointer:
        """Return the pointer to the checkpoint of the last evaluation, once it is there.

        Raises:
            UserError: none came.
        """
        wanted = self.result.get("step", 0)
        deadline = time.monotonic() + SAVE_WAIT_S
        waiting: list[dict[str, Any]] = []
        while (self.checkpoint or {}).get("step", -1) < wanted and time.monotonic() < deadline:
            event = self._next_event(deadline)
            if event["kind"] == "checkpoint":
                self._take(event)
                continue
            if event["kind"] == "end":
                if not self.thread.is_alive():
                    waiting.append(event)
                break
            waiting.append(event)
        for event in waiting:
            self._events.put(event)
        if self.checkpoint is None:
            raise UserError(
                f"{self.folder.name} made no checkpoint by step {wanted} that another trial could take over"
            )
        return pointer_of(self.folder, self.number, self.values, self.checkpoint)

    def ask_to_stop(self) -> None:
        """Have the workers save and end."""
        self._asked = True
        if self.plan.here:
            self.monitor.stop = True
        else:
            self.monitor.request_stop.remote()

    def end(self) -> None:
        """Wait until nothing of the run is left, asking it to stop if it goes on; record how it ended."""
        if self.thread.is_alive():
            self.ask_to_stop()
            self.thread.join()
        if self._over:
            return
        self._over = True
        if not self.plan.here:
            ray.kill(self.monitor)
        self.link.flush()
        status = self.outcome.get("status", "failed")
        self.folder.note(status=status, step=self.outcome.get("step"), error=self.outcome.get("error"))
        if self.handle is not None and status == "refused":  # one that failed may start again
            reconcile(self.plan.tracking, self.folder.local, status="failed")


def _alone() -> None:
    """Make this process a process group of its own, once: DeepSpeed keeps the first one that it meets."""
    import torch.distributed as dist

    if not dist.is_initialized():
        import torch

        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", store=store, rank=0, world_size=1)
