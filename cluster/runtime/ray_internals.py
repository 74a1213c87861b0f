"""Every name of Ray that is not public. Each function says what happens without it.

`PERCEIVER_PUBLIC_API=1` switches all of them off; so does a Ray version that has renamed them.
"""

import functools
import importlib
import logging
import os
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

REST_S = 0.01
ALMOST = 1 - 1e-6
"""Of an epoch: an evaluation at its end counts in spite of rounding."""
CONNECT_S, ANSWER_S = 5, 30
"""Seconds for a connection to the job server, and for its answer."""


def allowed() -> bool:
    """Return whether private names may be used."""
    return os.environ.get("PERCEIVER_PUBLIC_API") != "1"


@functools.cache
def _rest_between_steps() -> Any:
    """Return a callback that lets Ray Data's scheduling loop rest after each turn; None if this Ray has none."""
    try:
        base: Any = importlib.import_module("ray.data._internal.execution.execution_callback").ExecutionCallback
    except (ImportError, AttributeError):
        return None

    def on_execution_step(self: Any, executor: Any) -> None:
        time.sleep(REST_S)  # a turn takes one to two milliseconds

    # By this name the processes of the data tasks import it, which get the dataset's context.
    return type("RestBetweenSteps", (base,), {"on_execution_step": on_execution_step, "__module__": __name__})


def __getattr__(name: str) -> Any:
    # Made on use, so that importing this module does not import Ray.
    if name == "RestBetweenSteps" and (found := _rest_between_steps()) is not None:
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def rest_data_scheduler() -> None:
    """Have Ray Data's scheduling loop in this process rest between two turns.

    Without this the loop turns without a pause while finished rows wait for the training worker, which costs the worker
    half a core and its interpreter lock: 350 to 1,000 samples/s in place of 1,600 to 2,000 with a small model.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    callbacks = getattr(context, "custom_execution_callback_classes", None)
    rest = _rest_between_steps() if allowed() else None
    if rest is not None and callbacks is not None and rest not in callbacks:
        context.custom_execution_callback_classes = [*callbacks, rest]


def job_client_class() -> Any:
    """Return Ray's job client with a time-out for each request.

    Without this a job server that accepts a connection and does not answer blocks `perceiver submit`, `logs`, `status`
    and `stop` until Ctrl-C.
    """
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    if not allowed() or not hasattr(JobSubmissionClient, "_do_request"):
        return JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, **{"timeout": (CONNECT_S, ANSWER_S), **options})

    return Client


def quiet_data_progress() -> None:
    """Keep Ray Data's remarks on its progress bars out of the log; without this there is one for each dataset."""
    if allowed():
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


class _Unfinished:
    """A controller whose live trials can still report: Ray counts those that failed among them, for ever."""

    def __init__(self, tune_controller: Any) -> None:
        self._controller = tune_controller

    def get_live_trials(self) -> list[Any]:
        """Return the trials that are not over."""
        return [trial for trial in self._controller.get_live_trials() if not trial.is_finished()]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._controller, name)


def population_class(
    base: Any,
    *,
    time_key: str,
    concurrency: int,
    epochs: float,
    stopping: Callable[[], bool],
    set_aside: Callable[[Any], None],
) -> Any:
    """Return Ray's scheduler for a population, PBT or PB2, with what it lacks where trials fail, take turns or stop.

    Without this (the base class is returned) a population must not be larger than the number of trials that run at a
    time, and a trial that fails for good keeps the others from exchanging weights.

    Args:
        base: Ray's class.
        time_key: key of a result by which the scheduler measures how far a trial has come.
        concurrency: trials at a time, where they take turns.
        epochs: length of a trial, at whose end nothing is taken over.
        stopping: whether the search is being stopped.
        set_aside: called with each trial that is not running then.
    """
    if not can_take_turns(base):
        return base
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import TrialScheduler

    class TurnTaking(base):
        """A population of which more trials may exist than run at a time.

        Trials that do not fit at a time take turns: each waits after its evaluation until all have come as far (Ray's
        ``synch``). Ray would start all of them at once whatever fits, opens that barrier only when a result arrives, so
        never if the trial that the others wait for fails, and may set the next one where all of them are already.

        """

        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            """Take in a trial; where trials take turns it waits for its first one."""
            new = trial not in self._trial_state  # one that failed is added again
            super().on_trial_add(tune_controller, trial)
            if new and self._synch:
                trial.set_status(Trial.PAUSED)

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            """Decide as Ray does; a barrier that opened is set anew, beyond where any trial is."""
            if result.get(time_key, 0.0) >= epochs * ALMOST:
                return TrialScheduler.CONTINUE
            before = self._next_perturbation_sync
            decision = super().on_trial_result(_Unfinished(tune_controller), trial, result)  # pyright: ignore[reportArgumentType]
            if self._synch and self._next_perturbation_sync != before:
                times = [state.last_train_time for one, state in self._trial_state.items() if not one.is_finished()]
                self._next_perturbation_sync = max(times) + self._perturbation_interval
            return decision

        def choose_trial_to_run(self, tune_controller: Any) -> Any:
            """Return the next trial to run if there is room; Ray asks several times a second."""
            trials = [trial for trial in tune_controller.get_trials() if not trial.is_finished()]
            if stopping():
                self._set_aside(tune_controller, trials)
                return None
            if not self._synch:
                return super().choose_trial_to_run(tune_controller)
            paused = [trial for trial in trials if trial.status == Trial.PAUSED]
            busy = len(trials) - len(paused)
            if paused and not busy and not self._behind(paused):
                last = max(paused, key=lambda trial: self._trial_state[trial].last_train_time)
                self.on_trial_result(tune_controller, last, self._trial_state[last].last_result or {})
            behind = self._behind(paused)
            return behind[0] if behind and busy < concurrency else None

        def _behind(self, trials: list[Any]) -> list[Any]:
            """Return the trials that have not come to the barrier, the last first."""
            behind = [t for t in trials if self._trial_state[t].last_train_time < self._next_perturbation_sync]
            return sorted(behind, key=lambda trial: self._trial_state[trial].last_train_time)

        def _set_aside(self, tune_controller: Any, trials: list[Any]) -> None:
            """Have the trials that are not running stay as they are; the others save and end by themselves."""
            for trial in trials:
                if trial.status != Trial.RUNNING:
                    set_aside(trial)
                    tune_controller.stop_trial(trial)

        def _save_trial_state(self, state: Any, time: Any, result: dict[str, Any], trial: Any) -> Any:
            if result is state.last_result:  # told again to open the barrier
                return state.last_score
            return super()._save_trial_state(state, time, result, trial)

    return TurnTaking


def can_take_turns(base: Any) -> bool:
    """Return whether a population may be larger than the number of trials that run at a time."""
    return allowed() and hasattr(base, "_save_trial_state")
