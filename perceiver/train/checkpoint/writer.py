"""Checkpoints beside training: staged at the step, uploaded and committed in the background, on a schedule, pruned.

A save costs the step only the writing of each rank's state to its local disk. The rest (checksums, upload, receipts,
manifest, pruning) happens in a thread. One save is in flight at a time: one that falls due meanwhile is taken as soon
as that has ended.
"""

import contextlib
import logging
import math
import os
import random
import shutil
import statistics
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import Field, PositiveFloat, PositiveInt
from safetensors import SafetensorError

from perceiver.config import Config, UserError
from perceiver.train.checkpoint.store import CheckpointManifest, CheckpointStore, Snapshot, Staged
from perceiver.train.engine.protocol import Engine

log = logging.getLogger(__name__)

PROBE_STEPS = 5
"""Steps before the first checkpoint of a run whose interval is chosen by measuring."""
STALL_SHARE = 0.01
"""Share of the time that checkpoints may take from training where the interval is chosen by measuring."""
ATTEMPTS = 6
BACKOFF_S = (1.0, 30.0)
REFUSALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"}


class KeepBest(Config):
    """Which checkpoints are kept for their figures."""

    metric: str = Field(default="eval/accuracy", description="recorded metric; after an evaluation, for `eval/...`")
    mode: Literal["max", "min"] = Field(default="max", description="whether more or less of it is better")
    count: PositiveInt = Field(default=1, description="how many of the best to keep")

    def better(self, one: float, other: float) -> bool:
        """Whether the first value is strictly better; NaN is worse than anything."""
        if math.isnan(one) or math.isnan(other):
            return math.isnan(other) and not math.isnan(one)
        return one > other if self.mode == "max" else one < other


class SavingConfig(Config):
    """When checkpoints are made and which are kept; part of the recipe's ``train:`` section."""

    checkpoint_every: PositiveFloat | Literal["auto"] = Field(
        default="auto",
        description="epochs between two checkpoints; auto: by Young and Daly, from measured times and "
        "cluster.mtbf_hours, and never so often that steps stall for more than 1 % of the time",
    )
    keep_checkpoints: PositiveInt = Field(default=2, description="how many checkpoints to keep, the newest")
    keep_every: PositiveInt | None = Field(default=None, description="keep each n-th checkpoint for good")
    keep_best: KeepBest | None = Field(default=None, description="also save after an evaluation that is among the best")
    checkpoint_misses: PositiveInt = Field(
        default=3, description="checkpoints in a row that cannot be saved, after which the run stops"
    )


def kept(manifests: Mapping[int, CheckpointManifest], config: SavingConfig) -> set[int]:
    """The steps to keep of all complete checkpoints: the newest, each n-th, the best."""
    steps = sorted(manifests)
    keep = set(steps[-config.keep_checkpoints :])
    if config.keep_every:
        keep |= {step for step in steps if manifests[step].number % config.keep_every == 0}
    return keep | set(best_steps(manifests, config.keep_best))


def best_steps(manifests: Mapping[int, CheckpointManifest], config: KeepBest | None) -> list[int]:
    """The best steps, best first; of equals the earlier. Those without the metric are left out."""
    if config is None:
        return []
    sign = -1 if config.mode == "max" else 1
    values = {step: m.metrics[config.metric] for step, m in manifests.items() if config.metric in m.metrics}
    ranked = sorted((sign * value, step) for step, value in values.items() if not math.isnan(value))
    return [step for _, step in ranked[: config.count]]


class Cadence(Protocol):
    """When a checkpoint is due. All ranks hold one, and must come to the same answer."""

    def due(self, step: int, completes: Callable[[float], bool]) -> bool:
        """Whether one is due after this step; ``completes`` says whether the step completes so many epochs."""
        ...

    def saved(self, step: int, stall_s: float, step_s: float) -> None:
        """Learn what a save cost; every rank calls this after the same step."""
        ...


@dataclass
class EveryEpochs:
    """Whenever another ``epochs`` passes over the data are complete."""

    epochs: float

    def due(self, step: int, completes: Callable[[float], bool]) -> bool:
        """See `Cadence`."""
        return completes(self.epochs)

    def saved(self, step: int, stall_s: float, step_s: float) -> None:
        """Nothing to learn."""


class Measured:
    """At the interval of Young and Daly, the square root of 2 x cost of a checkpoint x mean time between failures.

    The cost is what a save takes from the steps, the median of the last ones; the interval is at least a hundred times
    that. The first checkpoint comes after 5 steps: it measures, and finds early that the store cannot be written. Rank
    0 decides after each save, in steps, and tells the others. So where checkpoints fall depends on the machine; what is
    computed does not depend on where they fall.

    Args:
        engine: joins the ranks.
        mtbf_s: mean seconds between two failures of the run.
        start_step: steps done when this process began.
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
    """Seconds between two checkpoints that cost so much (Young 1974, Daly 2006), stalling at most 1 % of the time."""
    return max(math.sqrt(2 * cost_s * mtbf_s), cost_s / STALL_SHARE)


class BackgroundSaver:
    """Saves the checkpoints of one run while training goes on; each rank holds one.

    Args:
        store: where to.
        config: which to keep.
        attempts: how often an upload is tried.
        backoff_s: first and longest pause between two tries; doubled each time, with jitter.
        before: done with the step, by each rank in the background, before its part is published.

    Attributes:
        holds: steps whose checkpoints must stay, whatever the config says.
        scores: figures by step that were found after the checkpoint was saved.
        failure: why this rank's last save failed; empty if it did not.
        refused: why no further one can succeed (credentials); empty otherwise.
        done: (step, step of the best or None) of committed checkpoints that were not told yet.
    """

    def __init__(
        self,
        store: CheckpointStore,
        config: SavingConfig,
        attempts: int = ATTEMPTS,
        backoff_s: tuple[float, float] = BACKOFF_S,
        before: Callable[[int], None] | None = None,
    ) -> None:
        self.store, self.config, self.attempts, self.backoff_s = store, config, attempts, backoff_s
        self.before = before
        self.holds: Callable[[], Collection[int]] = tuple
        self.scores: dict[int, Mapping[str, float]] = {}
        self.failure = self.refused = ""
        self.done: deque[tuple[int, int | None]] = deque()
        self.manifests: dict[int, CheckpointManifest] = {}
        self._thread: threading.Thread | None = None
        self._abandoned = threading.Event()

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, engine: Engine, snapshot: Snapshot) -> None:
        """Stage a checkpoint, then publish it in the background; every rank calls this, when none is in flight."""
        assert not self.busy, "one save at a time"
        self._abandoned.clear()
        self.failure = ""
        try:
            staged = self.store.stage(engine, snapshot)
        except (OSError, SafetensorError) as error:
            self._fail(snapshot.step, error)
            return
        self._thread = threading.Thread(target=self._run, args=(staged,), name="checkpoint", daemon=True)
        self._thread.start()

    def abandon(self) -> None:
        """Give up the save in flight, since another rank's part of it has failed; wait for the thread."""
        self._abandoned.set()
        self.join()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the save in flight, if there is one."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def known(self) -> dict[int, CheckpointManifest]:
        """The manifests of the complete checkpoints; each is read once."""
        found: dict[int, CheckpointManifest] = {}
        for step in self.store.steps():
            with contextlib.suppress(UserError):  # a manifest that cannot be read makes no checkpoint: it is pruned
                found[step] = self.manifests.get(step) or self.store.manifest(step)
        self.manifests = {step: self._scored(manifest) for step, manifest in found.items()}
        return self.manifests

    def learn(self, step: int, figures: Mapping[str, float]) -> int | None:
        """Add figures to a checkpoint that is there; return the step of the best one now, None if that is not known."""
        self.scores = {**self.scores, step: figures}
        self.manifests = {at: self._scored(manifest) for at, manifest in self.manifests.items()}
        return next(iter(best_steps(self.manifests, self.config.keep_best)), None)

    def _scored(self, manifest: CheckpointManifest) -> CheckpointManifest:
        news = self.scores.get(manifest.step)
        return manifest.model_copy(update={"metrics": {**manifest.metrics, **news}}) if news else manifest

    def _run(self, staged: Staged) -> None:
        step = staged.snapshot.step
        try:
            if (before := self.before) is not None:
                self._persist(lambda: before(step))
            self._persist(lambda: self.store.publish(staged))
            if staged.rank == 0:
                self._persist(lambda: self._commit(staged))
        except Exception as error:  # noqa: BLE001  each store raises its own; training goes on without this checkpoint
            self._fail(step, error)
        finally:
            shutil.rmtree(staged.folder, ignore_errors=True)

    def _commit(self, staged: Staged) -> None:
        manifest = self.store.commit(staged, self._abandoned.is_set)
        if manifest is None:
            return
        self.manifests = {**self.manifests, manifest.step: manifest}
        found = self.known()
        self.store.prune(kept(found, self.config) | set(self.holds()))
        best = best_steps(found, self.config.keep_best)
        self.done.append((manifest.step, best[0] if best else None))

    def _persist(self, work: Callable[[], None]) -> None:
        """Do the work, again after a pause if it fails; what cannot get better is raised at once."""
        for attempt in range(1, self.attempts + 1):
            try:
                work()
                return
            except Exception as error:  # noqa: BLE001  each store raises its own
                if is_refusal(error) or attempt == self.attempts or self._abandoned.is_set():
                    raise
                pause = min(self.backoff_s[1], self.backoff_s[0] * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5)
                log.warning("checkpoint upload to %s failed (%s); again in %.0f s", self.store.url, error, pause)
                self._abandoned.wait(pause)

    def _fail(self, step: int, error: Exception) -> None:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        if is_refusal(error):
            self.refused = refusal(self.store.url, reason)
        self.failure = f"checkpoint {self.store.location(step)} was not saved: {type(error).__name__}: {reason}"
        log.error("%s", self.failure)


def is_refusal(error: Exception) -> bool:
    """Whether a store said no, so that trying again cannot help."""
    return isinstance(error, PermissionError) or type(error).__name__ in REFUSALS


def refusal(url: str, reason: str) -> str:
    """The line for a store that says no."""
    return f"{url} refuses {identity()} ({reason}): check the credentials and their right to write"


def identity() -> str:
    """Who we are to an object store, without a secret: the end of the access key's id, or the user of this machine."""
    key = os.environ.get("AWS_ACCESS_KEY_ID", "")
    profile = os.environ.get("AWS_PROFILE", "")
    return f"access key ...{key[-4:]}" if key else f"profile {profile}" if profile else f"user {os.getuid()}"


@dataclass(frozen=True)
class Flags:
    """What the ranks say together of the save in flight: whether any is at it, has failed, was refused."""

    busy: bool
    failed: bool
    refused: bool


def exchange(engine: Engine, saver: BackgroundSaver) -> Flags:
    """Ask all ranks; every rank calls this."""
    values = [float(saver.busy), float(bool(saver.failure)), float(bool(saver.refused))]
    return Flags(*(total > 0 for total in engine.sum(values)))
