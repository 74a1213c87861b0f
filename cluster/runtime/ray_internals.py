"""All private names of Ray that the project uses. Each function documents what happens without it.

`PERCEIVER_PUBLIC_API=1` disables all of them; so does a Ray version that has renamed them.
"""

import contextlib
import functools
import importlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

log = logging.getLogger(__name__)

REST_S = 0.01
ALMOST = 1 - 1e-6
"""Share of an epoch that counts as the whole, in spite of rounding."""
LOOPBACK = "127.0.0.1"
CONNECT_S, ANSWER_S = 5, 30
"""Seconds for a connection to the job server, and for its answer."""


def allowed() -> bool:
    """Return whether private names may be used."""
    return os.environ.get("PERCEIVER_PUBLIC_API") != "1"


@functools.cache
def _rest_between_steps() -> Any:
    """Return a callback that pauses Ray Data's scheduling loop after each iteration; None if Ray lacks callbacks."""
    try:
        base: Any = importlib.import_module("ray.data._internal.execution.execution_callback").ExecutionCallback
    except (ImportError, AttributeError):
        return None

    def on_execution_step(self: Any, executor: Any) -> None:
        time.sleep(REST_S)  # an iteration takes one to two milliseconds

    # Data tasks receive the dataset's context and import the class by this name.
    return type("RestBetweenSteps", (base,), {"on_execution_step": on_execution_step, "__module__": __name__})


def __getattr__(name: str) -> Any:
    # Created on first use, so that importing this module does not import Ray.
    if name == "RestBetweenSteps" and (found := _rest_between_steps()) is not None:
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def rest_data_scheduler() -> None:
    """Pause Ray Data's scheduling loop in this process between two iterations.

    Without this the loop spins while finished rows wait for the training worker, which costs the worker half a core
    and its interpreter lock: 350 to 1,000 samples/s instead of 1,600 to 2,000 with a small model.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    callbacks = getattr(context, "custom_execution_callback_classes", None)
    rest = _rest_between_steps() if allowed() else None
    if rest is not None and callbacks is not None and rest not in callbacks:
        context.custom_execution_callback_classes = [*callbacks, rest]


def job_client_class() -> Any:
    """Return Ray's job client class with a timeout for each request.

    Without this a job server that accepts a connection but does not answer blocks `perceiver submit`, `logs`, `status`
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


@contextlib.contextmanager
def loopback_only() -> Iterator[None]:
    """Let the processes of a local Ray instance that is started inside listen on loopback only.

    Without this they listen on all interfaces, the metrics port among them, which asks for no token. On macOS and
    Windows it is Ray's default.
    """
    constants: Any = None
    with contextlib.suppress(ImportError):
        constants = importlib.import_module("ray._private.ray_constants") if allowed() else None
    before = getattr(constants, "ENABLE_RAY_CLUSTER", None)
    if before is None:
        yield
        return
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


def quiet_data_progress() -> None:
    """Silence Ray Data's log messages about progress bars; without this there is one for each dataset."""
    if allowed():
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


class _Unfinished:
    """A Tune controller whose live trials exclude failed ones, which Ray counts as live for ever."""

    def __init__(self, tune_controller: Any) -> None:
        self._controller = tune_controller

    def get_live_trials(self) -> list[Any]:
        """Return the unfinished trials."""
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
    """Return Ray's PBT or PB2 scheduler class, extended for trials that fail, take turns or are stopped.

    Without this (the base class is returned) a population must not be larger than the number of concurrent trials, and
    a trial that fails for good keeps the others from exchanging weights.

    Args:
        base: Ray's class.
        time_key: key of a result that measures a trial's progress.
        concurrency: concurrent trials, if they take turns.
        epochs: length of a trial; nothing is exchanged at its end.
        stopping: whether the search is being stopped.
        set_aside: called with each trial that is not running at that time.
    """
    if not can_take_turns(base):
        return base
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import TrialScheduler

    class TurnTaking(base):
        """A population that may have more trials than run at a time.

        Such trials take turns: each pauses after its evaluation until all have reached it (Ray's ``synch``). Ray would
        start all of them at once. It opens that barrier only when a result arrives, so never if the last trial to reach
        it fails, and may set the next barrier where all of them are already.
        """

        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            """Add a trial; paused at first if trials take turns."""
            new = trial not in self._trial_state  # a failed trial is added again
            super().on_trial_add(tune_controller, trial)
            if new and self._synch:
                trial.set_status(Trial.PAUSED)

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            """Decide as Ray does; after a barrier has opened, set the next one ahead of all trials."""
            if result.get(time_key, 0.0) >= epochs * ALMOST:
                return TrialScheduler.CONTINUE
            before = self._next_perturbation_sync
            decision = super().on_trial_result(_Unfinished(tune_controller), trial, result)  # pyright: ignore[reportArgumentType]
            if self._synch and self._next_perturbation_sync != before:
                times = [state.last_train_time for one, state in self._trial_state.items() if not one.is_finished()]
                self._next_perturbation_sync = max(times) + self._perturbation_interval
            return decision

        def choose_trial_to_run(self, tune_controller: Any) -> Any:
            """Return the next trial to run if there is room; Ray calls this several times per second."""
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
            """Return the trials that have not reached the barrier, the one furthest behind first."""
            behind = [t for t in trials if self._trial_state[t].last_train_time < self._next_perturbation_sync]
            return sorted(behind, key=lambda trial: self._trial_state[trial].last_train_time)

        def _set_aside(self, tune_controller: Any, trials: list[Any]) -> None:
            """Stop the trials that are not running; the running ones save a checkpoint and stop by themselves."""
            for trial in trials:
                if trial.status != Trial.RUNNING:
                    set_aside(trial)
                    tune_controller.stop_trial(trial)

        def _save_trial_state(self, state: Any, time: Any, result: dict[str, Any], trial: Any) -> Any:
            if result is state.last_result:  # repeated to open the barrier
                return state.last_score
            return super()._save_trial_state(state, time, result, trial)

    return TurnTaking


def can_take_turns(base: Any) -> bool:
    """Return whether a population may be larger than the number of concurrent trials."""
    if not allowed() or not hasattr(base, "_save_trial_state"):
        return False
    from ray.tune.schedulers import PopulationBasedTraining

    wanted = {"_trial_state", "_synch", "_next_perturbation_sync", "_perturbation_interval"}
    return wanted <= vars(PopulationBasedTraining(hyperparam_mutations={"any": [0, 1]})).keys()
