"""When checkpoints are written and which are kept: a hook that saves in the background while training continues.

A save delays a step only by the time to write each rank's state to its local disk. Checksums, upload, receipts,
manifest and pruning run in a thread (`BackgroundSaver`). One save is in progress at a time; if another is due
meanwhile, it starts afterwards. `perceiver.train.checkpoint.store` defines how a checkpoint is stored.
"""

import contextlib
import itertools
import logging
import math
import os
import shutil
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from safetensors import SafetensorError

from perceiver.config import UserError
from perceiver.storage import RetryPolicy, first_line, is_refusal, retry_pause
from perceiver.train.checkpoint.fence import TakenOverError
from perceiver.train.checkpoint.store import CheckpointManifest, CheckpointStore, Snapshot, Staged
from perceiver.train.config import KeepBest, SavingConfig
from perceiver.train.engine.protocol import Engine
from perceiver.train.hooks import History
from perceiver.train.loop import Flags, StepInfo

log = logging.getLogger(__name__)

PROBE_STEPS = 5
"""Steps before the first checkpoint of a run with a measured interval."""
STALL_SHARE = 0.01
"""Largest share of the time that checkpoints may take with a measured interval."""
UPLOADS = RetryPolicy(attempts=7, backoff=1.0, longest=30.0)
POLL_S = 0.02


def kept(manifests: Mapping[int, CheckpointManifest], config: SavingConfig) -> set[int]:
    """Return the steps of the checkpoints to keep: the newest, each n-th, the best."""
    steps = sorted(manifests)
    keep = set(steps[-config.keep_checkpoints :])
    if config.keep_every:
        keep |= {step for step in steps if manifests[step].number % config.keep_every == 0}
    return keep | set(best_steps(manifests, config.keep_best))


def best_steps(manifests: Mapping[int, CheckpointManifest], config: KeepBest | None) -> list[int]:
    """Return the best steps, best first, ties by the earlier step. Checkpoints without the metric are skipped."""
    if config is None:
        return []
    sign = -1 if config.mode == "max" else 1
    values = {step: m.metrics[config.metric] for step, m in manifests.items() if config.metric in m.metrics}
    ranked = sorted((sign * value, step) for step, value in values.items() if not math.isnan(value))
    return [step for _, step in ranked[: config.count]]


class Cadence(Protocol):
    """When a checkpoint is due. Every rank has one, and all must agree."""

    def due(self, step: int, completes: Callable[[float], bool]) -> bool:
        """Return whether one is due after this step; `completes(n)` is whether the step completes n more epochs."""
        ...

    def saved(self, step: int, stall_s: float, step_s: float) -> None:
        """Take note of the cost of a save; every rank calls this after the same step."""
        ...


@dataclass
class EveryEpochs:
    """A checkpoint every `epochs` passes over the data."""

    epochs: float

    def due(self, step: int, completes: Callable[[float], bool]) -> bool:
        """See `Cadence`."""
        return completes(self.epochs)

    def saved(self, step: int, stall_s: float, step_s: float) -> None:
        """See `Cadence`."""


class Measured:
    """At the interval of Young and Daly: the square root of 2 x cost of a checkpoint x mean time between failures.

    The cost is the time that a save delays the steps, the median of the last ones; the interval is at least a hundred
    times that. The first checkpoint is due after 5 steps: it measures the cost, and shows early if the store cannot be
    written. Rank 0 decides after each save, in steps, for all ranks. The times of checkpoints depend on the machine;
    the results of training do not.

    Args:
        engine: connects the ranks.
        mtbf_s: mean seconds between two failures of the run.
        start_step: number of steps at the start of this process.
    """

    def __init__(self, engine: Engine, mtbf_s: float, start_step: int) -> None:
        self.engine, self.mtbf_s = engine, mtbf_s
        self.next = start_step + PROBE_STEPS
        self.stalls: deque[float] = deque(maxlen=5)

    def due(self, step: int, completes: Callable[[float], bool]) -> bool:
        """See `Cadence`."""
        return step >= self.next

    def saved(self, step: int, stall_s: float, step_s: float) -> None:
        """See `Cadence`."""
        self.stalls.append(stall_s)
        steps = interval_s(statistics.median(self.stalls), self.mtbf_s) / max(step_s, 1e-6)
        decided = self.engine.sum([float(max(1, math.ceil(steps))) if self.engine.rank == 0 else 0.0])[0]
        self.next = step + int(decided)


def interval_s(cost_s: float, mtbf_s: float) -> float:
    """Return the seconds between two checkpoints (Young 1974, Daly 2006); saving takes at most 1 % of the time."""
    return max(math.sqrt(2 * cost_s * mtbf_s), cost_s / STALL_SHARE)


class BackgroundSaver:
    """Writes the checkpoints of one run while training continues; every rank has one.

    Args:
        store: receives the checkpoints.
        config: which checkpoints to keep.
        retries: attempts to upload and the pauses between them.
        before: called with the step by each rank, in the background, before its part is published.
        scores: return metrics by step that were computed after the checkpoint was saved.
        in_use: return steps whose checkpoints must not be deleted.

    Attributes:
        failure: why this rank's last save failed; empty if it succeeded.
        refused: why no later save can succeed (credentials, another driver); empty otherwise.
        done: (step, step of the best or None) of committed checkpoints that are not announced yet.
    """

    def __init__(
        self,
        store: CheckpointStore,
        config: SavingConfig,
        *,
        retries: RetryPolicy = UPLOADS,
        before: Callable[[int], None] | None = None,
        scores: Callable[[], Mapping[int, Mapping[str, float]]] = dict,
        in_use: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self.store, self.config, self.retries = store, config, retries
        self.before, self.scores, self.in_use = before, scores, in_use
        self.failure = self.refused = ""
        self.done: deque[tuple[int, int | None]] = deque()
        self._manifests: dict[int, CheckpointManifest] = {}
        self._thread: threading.Thread | None = None
        self._began = 0.0
        self._abandoned = threading.Event()

    @property
    def busy(self) -> bool:
        """Whether a save is in progress."""
        return self._thread is not None and self._thread.is_alive()

    def busy_s(self) -> float:
        """Return for how many seconds the save in progress has been published, 0 if there is none."""
        return time.monotonic() - self._began if self.busy else 0.0

    def start(self, engine: Engine, snapshot: Snapshot) -> None:
        """Stage a checkpoint, then publish it in the background; every rank calls this, when no save is in progress."""
        assert not self.busy, "one save at a time"
        self._abandoned.clear()
        self.failure = ""
        try:
            staged = self.store.stage(engine, snapshot)
        except (OSError, SafetensorError) as error:
            self._fail(snapshot.step, error)
            return
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run, args=(staged,), name="checkpoint", daemon=True)
        self._thread.start()

    def abandon(self) -> None:
        """Abandon the save in progress, because it failed on another rank; wait for the thread."""
        self._abandoned.set()
        self.join()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the save in progress, if there is one."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def refresh(self) -> dict[int, CheckpointManifest]:
        """Return the manifests of the complete checkpoints in the store; each is read once."""
        found: dict[int, CheckpointManifest] = {}
        for step in self.store.steps():
            with contextlib.suppress(UserError):  # unreadable manifest: not a checkpoint, it is pruned
                found[step] = self._manifests.get(step) or self.store.manifest(step)
        self._manifests = found
        return self.manifests()

    def manifests(self) -> dict[int, CheckpointManifest]:
        """Return the known manifests, with the metrics that were computed after the checkpoint was saved."""
        scores = self.scores()
        return {
            step: manifest.model_copy(update={"metrics": {**manifest.metrics, **scores[step]}})
            if step in scores
            else manifest
            for step, manifest in self._manifests.items()
        }

    def best(self) -> int | None:
        """Return the step of the best checkpoint; None if it is not known."""
        return next(iter(best_steps(self.manifests(), self.config.keep_best)), None)

    def _run(self, staged: Staged) -> None:
        step = staged.snapshot.step
        try:
            if (before := self.before) is not None:
                self._persist(lambda: before(step))
            self._persist(lambda: self.store.publish(staged))
            if staged.rank == 0:
                self._persist(lambda: self._commit(staged))
        except Exception as error:  # noqa: BLE001  each store raises its own; training continues without this checkpoint
            self._fail(step, error)
        finally:
            shutil.rmtree(staged.folder, ignore_errors=True)

    def _commit(self, staged: Staged) -> None:
        manifest = self.store.commit(staged, self._abandoned.is_set)
        if manifest is None:
            return
        self._manifests = {**self._manifests, manifest.step: manifest}
        self.store.prune(kept(self.refresh(), self.config) | set(self.in_use()))
        self.done.append((manifest.step, self.best()))

    def _persist(self, work: Callable[[], None]) -> None:
        """Run `work` with retries, until the save is abandoned."""
        for attempt in itertools.count(1):
            try:
                work()
                return
            except Exception as error:
                # A mounted folder may be missing for a moment.
                pause = retry_pause(
                    error, attempt, f"checkpoint upload to {self.store.url}", self.retries, final=(TakenOverError,)
                )
                if self._abandoned.wait(pause):
                    raise

    def _fail(self, step: int, error: Exception) -> None:
        reason = first_line(error)
        if isinstance(error, TakenOverError):
            self.refused = str(error)
        elif is_refusal(error):
            self.refused = refusal(self.store.url, reason)
        self.failure = f"checkpoint {self.store.location(step)} was not saved: {type(error).__name__}: {reason}"
        log.error("%s", self.failure)


def refusal(url: str, reason: str) -> str:
    """Return the error message for a store that refuses access."""
    return f"{url} refuses {identity()} ({reason}): check the credentials and their right to write"


def identity() -> str:
    """Return who accesses the store, without a secret: the end of the access key id, the profile or the user."""
    key = os.environ.get("AWS_ACCESS_KEY_ID", "")
    profile = os.environ.get("AWS_PROFILE", "")
    return f"access key ...{key[-4:]}" if key else f"profile {profile}" if profile else f"user {os.getuid()}"


def _ignore(step: int, url: str) -> None:
    return None


@dataclass(frozen=True)
class Listeners:
    """Callbacks for checkpoint events, called in the training thread.

    Attributes:
        saved: step and URL of a committed checkpoint (rank 0).
        best: step and URL of the new best checkpoint (rank 0).
        missed: why a checkpoint could not be saved (the rank that failed).
        committed: step and URL of a committed checkpoint (every rank, after the same step).
    """

    saved: Callable[[int, str], None] = _ignore
    best: Callable[[int, str], None] = _ignore
    missed: Callable[[str], None] = lambda reason: None
    committed: Callable[[int, str], None] = _ignore


@dataclass
class CheckpointHook:
    """Saves when the cadence is due, after an evaluation among the best, at the end and before a stop.

    Every rank has one. A failed save only loses that checkpoint; after `train.checkpoint_misses` consecutive failures,
    or if the store refuses access, the run stops.

    Attributes:
        engine: its state is saved.
        saver: writes in the background.
        cadence: when a checkpoint is due.
        history: records the share of time that saves take.
        snapshot: return what a save records, from the step, its metrics and the number of the checkpoint.
        figures: return the metrics of a step.
        listeners: callbacks.
        wanted: return whether a checkpoint is needed after a step for another reason; the same on all ranks.
        started: start of training in this process, for the share of time that saves take.
    """

    engine: Engine
    saver: BackgroundSaver
    cadence: Cadence
    history: History
    snapshot: Callable[[StepInfo, Mapping[str, float], int], Snapshot]
    figures: Callable[[StepInfo], Mapping[str, float]]
    listeners: Listeners = Listeners()
    wanted: Callable[[StepInfo], bool] = lambda info: False
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self._pending, self._reason = False, ""
        self._in_flight: int | None = None
        self._missed = self._number = 0
        self._stalled = 0.0
        self._best: int | None = None
        self._steps: deque[float] = deque(maxlen=50)
        if self.engine.rank == 0:
            self._number = max((manifest.number + 1 for manifest in self.saver.refresh().values()), default=0)

    def flags(self) -> Flags:
        """Return this rank's part of `Flags`. A store that refuses access is a reason to stop."""
        saver = self.saver
        refused = bool(saver.refused)
        return Flags(stop=refused, saving=saver.busy, save_failed=bool(saver.failure), save_refused=refused)

    def __call__(self, info: StepInfo) -> None:
        began = time.perf_counter()
        self._steps.append(info.seconds)
        self._tell()
        busy = self._in_flight is not None and info.flags.saving and not info.flags.save_failed
        if self._in_flight is not None and not busy:
            self._settle(info.flags)
        due = self._pending or self.wanted(info) or self.cadence.due(info.step, info.completes)
        if info.last:
            self._finish(info)
        elif self._improves(info):
            # A later checkpoint would not have these metrics, so wait for the save in progress.
            self.drain()
            self._save(info, began)
        elif due and not busy:
            self._save(info, began)
        self._pending = due and busy
        self._stalled += time.perf_counter() - began

    def drain(self) -> bool:
        """Wait for the save in progress on all ranks; return whether it was committed. Every rank calls this."""
        while (flags := self._exchange()).saving and not flags.save_failed:
            time.sleep(POLL_S)
        self._settle(flags)
        self._tell()
        return not flags.save_failed

    def _exchange(self) -> Flags:
        return Flags(*(total > 0 for total in self.engine.sum([float(flag) for flag in self.flags()])))

    def _save(self, info: StepInfo, began: float) -> None:
        self._tell()
        self.saver.start(self.engine, self.snapshot(info, self.figures(info), self._number))
        self._number += 1
        self._in_flight = info.step
        stall = time.perf_counter() - began
        self.cadence.saved(info.step, stall, statistics.median(self._steps))
        if self.engine.rank == 0:
            share = (self._stalled + stall) / (time.perf_counter() - self.started)
            self.history.record(info.step, {"train/checkpoint_stall_share": share})

    def _finish(self, info: StepInfo) -> None:
        """Write the last checkpoint of this process, which must succeed."""
        self.drain()
        self._save(info, time.perf_counter())
        if not self.drain():
            raise UserError(f"the last {self._reason}; free space in the store, then continue with --resume")

    def _settle(self, flags: Flags) -> None:
        """Handle the outcome of the last save, once all ranks know it."""
        ended, self._in_flight = self._in_flight, None
        self._missed = self._missed + 1 if flags.save_failed else 0
        if flags.save_refused:
            self.saver.abandon()
            elsewhere = refusal(self.saver.store.url, "reported by another worker, see its log")
            raise UserError(self.saver.refused or elsewhere)
        if flags.save_failed:
            self.saver.abandon()
            self._reason = self.saver.failure or "checkpoint was not saved by another worker, see its log"
            if self.saver.failure:
                self.listeners.missed(self.saver.failure)
            self.saver.failure = ""
        elif ended is not None:
            self.listeners.committed(ended, self.saver.store.location(ended))
        if self._missed >= self.saver.config.checkpoint_misses:
            raise UserError(f"{self._missed} consecutive checkpoints failed (train.checkpoint_misses): {self._reason}")

    def _improves(self, info: StepInfo) -> bool:
        """Return whether this step's metrics are among the best; rank 0 decides for all."""
        config = self.saver.config.keep_best
        value = self.figures(info).get(config.metric) if config and config.metric.startswith("eval/") else None
        if config is None or value is None:
            return False
        others = [m.metrics[config.metric] for m in self.saver.manifests().values() if config.metric in m.metrics]
        better = sum(not config.better(value, other) for other in others) < config.count
        return self.engine.sum([float(better and self.engine.rank == 0)])[0] > 0

    def _tell(self) -> None:
        """Announce committed checkpoints and a new best one; rank 0 only."""
        store = self.saver.store
        while self.saver.done:
            step, best = self.saver.done.popleft()
            self.listeners.saved(step, store.location(step))
            self._tell_best(best)
        if self.saver.config.keep_best is not None and self.engine.rank == 0:
            self._tell_best(self.saver.best())  # an asynchronous evaluation may have changed it

    def _tell_best(self, best: int | None) -> None:
        if best is not None and best != self._best:
            self._best = best
            self.listeners.best(best, self.saver.store.location(best))
