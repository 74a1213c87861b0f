"""A population of numbered trials: Ray's PBT and PB2, with what they lack where trials fail, take turns or stop."""

import math
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

TIME = "epoch"
"""The key of a result by which schedulers measure how far a trial has come."""

ALMOST = 1 - 1e-6


class Unfinished:
    """A controller whose live trials can still report: Ray counts those that failed among them, for ever."""

    def __init__(self, tune_controller: Any) -> None:
        self._controller = tune_controller

    def get_live_trials(self) -> list[Any]:
        """Return the trials that are not over."""
        return [trial for trial in self._controller.get_live_trials() if not trial.is_finished()]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._controller, name)


class Population(PopulationBasedTraining):
    """Population based training of numbered trials.

    Trials that do not fit at a time take turns: each waits after its evaluation until all have come as far (Ray's
    ``synch``). Ray would start all of them at once whatever fits, opens that barrier only when a result arrives, so
    never if the trial that the others wait for fails, and may set the next one where all of them are already.

    Attributes:
        concurrency: trials at a time, where they take turns.
        epochs: length of a trial, at whose end there is nothing to take over for.
        desk: says whether the search is being stopped, and notes the trials that are then set aside.
    """

    concurrency = 1
    epochs = math.inf
    desk: Any = None

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take in a trial; where trials take turns it waits for its first one."""
        new = trial not in self._trial_state  # one that failed is added again
        super().on_trial_add(tune_controller, trial)
        if new and self._synch:
            trial.set_status(Trial.PAUSED)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide as Ray does; a barrier that opened is set anew, beyond where any trial is."""
        if result.get(TIME, 0.0) >= self.epochs * ALMOST:
            return TrialScheduler.CONTINUE
        before = self._next_perturbation_sync
        decision = super().on_trial_result(Unfinished(tune_controller), trial, result)  # pyright: ignore[reportArgumentType]
        if self._synch and self._next_perturbation_sync != before:
            times = [state.last_train_time for one, state in self._trial_state.items() if not one.is_finished()]
            self._next_perturbation_sync = max(times) + self._perturbation_interval
        return decision

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Return the next trial to run if there is room; Ray asks several times a second."""
        trials = [trial for trial in tune_controller.get_trials() if not trial.is_finished()]
        if self.desk is not None and self.desk.stopping:
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
        return behind[0] if behind and busy < self.concurrency else None

    def _behind(self, trials: list[Any]) -> list[Any]:
        """Return the trials that have not come to the barrier, the last first."""
        behind = [t for t in trials if self._trial_state[t].last_train_time < self._next_perturbation_sync]
        return sorted(behind, key=lambda trial: self._trial_state[trial].last_train_time)

    def _set_aside(self, tune_controller: Any, trials: list[Any]) -> None:
        """Have the trials that are not running stay as they are; the others save and end by themselves."""
        for trial in trials:
            if trial.status != Trial.RUNNING:
                self.desk.set_aside(trial.config["number"])
                tune_controller.stop_trial(trial)

    def _save_trial_state(self, state: Any, time: Any, result: dict[str, Any], trial: Any) -> Any:
        if result is state.last_result:  # told again to open the barrier
            return state.last_score
        return super()._save_trial_state(state, time, result, trial)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Leave a trial its own number where Ray hands it another trial's configuration."""
        changed, operations = super()._get_new_config(trial, trial_to_clone)
        return {**changed, "number": trial.config["number"]}, operations
