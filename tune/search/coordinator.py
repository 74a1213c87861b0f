"""The coordinator of a running search: starts trials, records their results, and keeps the record on disk."""

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.search import Searcher

from cluster.record.failures import one_line
from cluster.record.run_folder import RunFolder
from perceiver.config import UserError
from perceiver.storage import absolute
from tune.search_record import (
    DONE,
    Evaluation,
    Exchange,
    SearchRecord,
    TrialRecord,
    number_of,
    reopen,
    save_record,
    trial_name,
)
from tune.space.samplers import Ending, Sampler
from tune.space.space import Values

log = logging.getLogger(__name__)

PATHS = ("data.url", "train.init_from", "deepspeed.config")
"""Keys with values that may be paths, and the beginnings of such keys."""

Listener = Callable[[str, TrialRecord], None]
"""Called with an event of a trial (a word) and the trial."""


class Coordinator:
    """The only writer of the record: one call at a time, and each change is on disk when the call returns.

    Args:
        record: of the search.
        folder: of the search.
        sampler: returns the values of new trials.
        prepare: checks a new trial's recipe and returns its parameters and optimizer steps.
        waiting: numbers of the trials to run before new ones are drawn.
        total: number of trials of the search.

    Attributes:
        origins: the trials whose weights parts of a trial's model start from, by the part, by the trial's number; a
            trial is drawn when they have ended.
    """

    def __init__(
        self,
        record: SearchRecord,
        folder: RunFolder,
        sampler: Sampler,
        prepare: Callable[[Values], tuple[int, int]],
        waiting: list[int],
        total: int,
    ) -> None:
        self.record, self.folder, self.sampler, self.prepare = record, folder, sampler, prepare
        self.waiting, self.total = list(waiting), total
        self.origins: Mapping[int, Mapping[str, int]] = {}
        self.listeners: list[Listener] = []
        self.stopping = False
        self._lock = threading.RLock()
        self._since = time.monotonic()
        for trial in record.ended():
            self._tell(trial)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Coordinator":
        """Return the same coordinator: Tune copies objects that refer to it."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return an empty state: Tune pickles the coordinator, but nothing reads that."""
        return {}

    def next_trial(self) -> TrialRecord | None:
        """Return the next trial; None if there is none, or the search is being stopped.

        A drawn trial whose recipe cannot be trained is recorded as failed, and another one is drawn.
        """
        with self._lock:
            if self.stopping:
                return None
            if self.waiting:
                return self.record.trial(self.waiting.pop(0))
            while len(self.record.trials) < self.total and not self.is_early():
                trial = self.draw()
                if trial.status == "waiting":
                    return trial
            return None

    def is_early(self) -> bool:
        """Return whether the next new trial starts from one that has not ended."""
        with self._lock:
            number = len(self.record.trials)
            origins = self.origins.get(number, {}).values() if number < self.total and not self.waiting else ()
            return not self.stopping and any(self.record.trial(origin).status not in DONE for origin in origins)

    def draw(self) -> TrialRecord:
        """Add the next new trial to the record."""
        with self._lock:
            number = len(self.record.trials)
            values = dict(self.sampler.ask(number))
            trial = TrialRecord(number=number, values=values, label=self.sampler.label(number))
            self.record.trials.append(trial)
            try:
                values |= self._start(number)
                trial.values = values
                trial.parameters, trial.total_steps = self.prepare(trial.values)
            except UserError as error:
                self._end(trial, "failed", str(error))
            self._save()
            return trial

    def _start(self, number: int) -> Values:
        """Return the key of the weights that parts of a trial's model start from; refuse to start from a failed one."""
        origins = self.origins.get(number, {})
        for origin in origins.values():
            if (found := self.record.trial(origin)).status != "finished":
                raise UserError(f"it starts from trial {origin} ({found.label}), which has {found.status}")
        trials = self.folder.location("trials")
        places = {part: absolute(f"{trials}/{trial_name(origin)}") for part, origin in origins.items()}
        return {"train.init_from": places} if places else {}

    def started(self, number: int) -> None:
        """Record that a trial has a process."""
        with self._lock:
            trial = self.record.trial(number)
            trial.status, trial.started = "running", trial.started or time.time()
            trial.attempts += 1
            self._say("started", trial)

    def result(self, number: int, result: Mapping[str, Any]) -> None:
        """Record an evaluation or the ending of a trial."""
        with self._lock:
            trial = self.record.trial(number)
            trial.seconds += result.get("seconds", 0.0)
            trial.samples_per_s = result.get("throughput") or trial.samples_per_s
            match result.get("ending"):
                case None:
                    figures = dict(result["evaluation"])
                    trial.add(Evaluation(step=result["step"], epoch=result["epoch"], metrics=figures, at=time.time()))
                    self._say("evaluated", trial)
                case "finished":
                    self._end(trial, "finished")
                case "refused":
                    self._end(trial, "failed", result["error"])
                case _:
                    trial.status = "unfinished"
                    self._say("unfinished", trial)

    def over(self, number: int) -> None:
        """Record that Tune has ended a trial: if it is still running, the scheduler stopped it."""
        with self._lock:
            trial = self.record.trial(number)
            if trial.status == "running":
                self._end(trial, "stopped")

    def set_aside(self, number: int) -> None:
        """Leave a trial that is not running for --resume: the search is being stopped."""
        with self._lock:
            self.record.trial(number).status = "unfinished"
            self._save()

    def broke(self, number: int, reason: str, again: bool) -> None:
        """Record a failure of a trial, which restarts (`again`) or ends."""
        with self._lock:
            trial = self.record.trial(number)
            # If one worker refuses to continue, the trial ends its own process; the reason is in its folder.
            reason = RunFolder(self.folder.location("trials"), trial_name(number)).facts().get("refusal") or reason
            if again:
                trial.reason = reason
                self._say("again", trial)
            elif trial.status not in DONE:
                self._end(trial, "failed", reason)

    def exchanged(self, number: int, donor: int, step: int, values: Values) -> None:
        """Record that a trial continues from another one's checkpoint."""
        with self._lock:
            trial = self.record.trial(number)
            trial.exchanges.append(Exchange(donor=donor, step=step, values=values))
            trial.values = values
            self._say("exchanged", trial)

    def close(self) -> None:
        """Mark the trials that have not ended as unfinished."""
        with self._lock:
            reopen(self.record)
            self._save()

    def _end(self, trial: TrialRecord, ending: Ending, reason: str = "") -> None:
        trial.status, trial.reason = ending, reason
        self._tell(trial)
        self._say(ending, trial)

    def _tell(self, trial: TrialRecord) -> None:
        ending: Any = trial.status
        self.sampler.tell(trial.number, trial.values, ending, trial.scores(list(self.record.metrics)), trial.step)

    def _say(self, what: str, trial: TrialRecord) -> None:
        self._save()
        for listener in self.listeners:
            listener(what, trial)

    def _save(self) -> None:
        before, self._since = self._since, time.monotonic()
        self.record.seconds += self._since - before
        save_record(self.record, self.folder)


class CoordinatorSearcher(Searcher):
    """Returns the coordinator's next trial to Tune; it has no state."""

    def __init__(self, coordinator: Coordinator) -> None:
        super().__init__(metric=None, mode=None)
        self.coordinator = coordinator

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's configuration, or `FINISHED`."""
        trial = self.coordinator.next_trial()
        if trial is None:  # None: Tune asks again later
            return None if self.coordinator.is_early() else Searcher.FINISHED
        return configuration(trial)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: `CoordinatorCallback` calls the coordinator."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: a search resumes from its record."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: see `save`."""


class CoordinatorCallback(TrialProgressCallback):
    """Passes Tune's events to the coordinator; as a progress callback it replaces Tune's own output."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See `Coordinator.started`."""
        self.coordinator.started(number_of(str(trial)))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """See `Coordinator.result`."""
        self.coordinator.result(number_of(str(trial)), result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See `Coordinator.over`."""
        self.coordinator.over(number_of(str(trial)))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See `Coordinator.broke`."""
        self.coordinator.broke(number_of(str(trial)), failure(trial), again=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See `Coordinator.broke`."""
        self.coordinator.broke(number_of(str(trial)), failure(trial), again=False)


def configuration(trial: TrialRecord) -> dict[str, Any]:
    """Return the configuration of a trial's process."""
    return {"number": trial.number, "values": placed(trial.values), "label": trial.label}


def placed(values: Values) -> Values:
    """Return values with absolute local paths: a trial's process may run in another folder."""
    found = {key: absolute(v) if key.startswith(PATHS) and isinstance(v, str) else v for key, v in values.items()}
    if parts := values.get("data.mixture"):
        found["data.mixture"] = [{**part, "url": absolute(part["url"])} for part in parts]
    return found


def failure(trial: Any) -> str:
    """Return the reason of a Tune trial's last failure, in one line."""
    try:
        text = str(trial.get_error() or "")
    except OSError as error:
        log.warning("cannot read the reason of the failure of %s: %s", trial, error)
        text = ""
    return reason(text)


def reason(text: str) -> str:
    """Return the line of Ray's error file about the last failure."""
    last = re.split(r"^Failure # .*$", text, flags=re.MULTILINE)[-1].strip()
    if not last:
        return "the trial's process died"
    if re.search(r"ray\.exceptions\.OutOfMemoryError|node running low on memory|NODE_OUT_OF_MEMORY", last):
        return "out of memory: Ray terminated the trial's process"
    return one_line(Exception(last)).removeprefix("RuntimeError: ")
