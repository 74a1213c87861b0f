"""The Ray Tune `Tuner` of a search."""

import time
from typing import TYPE_CHECKING, Any

import ray.tune
from ray.tune.search.basic_variant import BasicVariantGenerator

from cluster.recipe.config import for_workers
from perceiver.storage import absolute
from perceiver.tracking.runs import TrackingConfig
from tune.search.coordinator import PATHS, Coordinator, CoordinatorCallback, CoordinatorSearcher, placed
from tune.search.schedulers import build_scheduler, replay, takes_turns
from tune.search.trial import TrialPlan, TrialRun
from tune.search_record import PARAMETERS, trial_name
from tune.space.space import look_up, with_values

if TYPE_CHECKING:
    from tune.search.state import SearchLaunch


def build_tuner(
    launch: "SearchLaunch", coordinator: Coordinator, control: Any, tracking: tuple[TrackingConfig, dict[str, str]]
) -> Any:
    """Return the tuner whose ``fit`` runs the remaining trials of a search.

    Args:
        launch: the search.
        coordinator: of the search.
        control: the monitor actor of the search.
        tracking: settings and tags of the trials' MLflow runs.
    """
    config, slots = launch.search.config, launch.slots
    numbers = list(coordinator.waiting)
    left = len(numbers) + max(0, launch.total - len(launch.record.trials))
    scheduler = build_scheduler(config, _epochs(launch), slots.concurrency, coordinator)
    replay(scheduler, next(iter(config.metrics)), launch.record.ended())
    plan = trial_plan(launch, control, tracking)
    place: Any = {"bundle_label_selector": [slots.labels]} if slots.labels else {}
    room = ray.tune.PlacementGroupFactory([slots.reserved], **place)
    trainable = ray.tune.with_resources(ray.tune.with_parameters(TrialRun, plan=plan), room)
    settings: dict[str, Any] = {"num_samples": left, "search_alg": CoordinatorSearcher(coordinator)}
    space: dict[str, Any] = {}
    if config.exchanges:
        # Ray does not support a searcher for a population.
        space = {"number": ray.tune.grid_search(numbers), "values": ray.tune.sample_from(RecordedValues(coordinator))}
        settings = {"num_samples": 1, "search_alg": BasicVariantGenerator(constant_grid_search=True)}
    return ray.tune.Tuner(
        trainable,
        param_space=space,
        tune_config=ray.tune.TuneConfig(
            scheduler=scheduler,
            max_concurrent_trials=slots.concurrency,
            reuse_actors=True,
            trial_name_creator=lambda trial: trial_name(trial.config["number"]),
            **settings,
        ),
        run_config=ray.tune.RunConfig(
            name=f"start-{time.time_ns()}",
            storage_path=absolute(launch.folder.location("ray")),
            failure_config=ray.tune.FailureConfig(max_failures=config.max_failures),
            # Runs write their own checkpoints; only a population needs pointers to them.
            checkpoint_config=ray.tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[CoordinatorCallback(coordinator)],
            verbose=0,
        ),
    )


def trial_plan(launch: "SearchLaunch", control: Any, tracking: tuple[TrackingConfig, dict[str, str]]) -> TrialPlan:
    """Return what all trials share."""
    config, tags = tracking
    resolved = for_workers(launch.search.recipe)
    places = {key: value for key in (*PATHS, "data.mixture") if (value := look_up(resolved, key))}
    return TrialPlan(
        base=with_values(launch.search.base, places),
        output=launch.trials_url,
        metrics=tuple(name for name in launch.record.metrics if name != PARAMETERS),
        share=launch.slots.share,
        here=launch.slots.here,
        pointers=launch.search.config.exchanges,
        turns=takes_turns(launch.search.config, launch.slots.concurrency),
        tracking=config,
        tags=tags,
        control=control,
    )


def _epochs(launch: "SearchLaunch") -> float:
    """Return the epochs of the base recipe, which determine the rungs."""
    steps, epoch_steps = launch.checker.total_steps({})
    return steps / epoch_steps


class RecordedValues:
    """Returns the recorded values of the trial of a configuration."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator

    def __call__(self, spec: Any) -> Any:
        """Return the values; Ray calls this for each trial."""
        return placed(self.coordinator.record.trial(spec.config["number"]).values)
