"""What a search would do, said without doing it."""

from tune.config import Asha, Search
from tune.report.numbers import workers
from tune.search.checks import Checker, number
from tune.search.estimate import estimate, say_estimate
from tune.search.resources import Slots
from tune.space.samplers import RandomDraw
from tune.space.space import Values, sample

SHOWN = 20


def say_plan(search: Search, checker: Checker, slots: Slots, known: list[Values] | None) -> None:
    """Print trials, resources, concurrency and expected time.

    Args:
        search: the search.
        checker: of its recipes.
        slots: how the cluster is divided.
        known: the trials where they do not depend on results; else examples are drawn.
    """
    config, recipe = search.config, search.recipe
    total = len(known) if known is not None else config.trials
    steps, epoch_steps = checker.total_steps({})
    print(
        f"{config.name}: {total} trials of {recipe.name}, search {config.search.kind}, "
        f"scheduler {config.scheduler.kind}"
    )
    print(f"a whole trial: {steps:,} steps of {recipe.train.global_batch} samples ({steps / epoch_steps:.4g} epochs)")
    if isinstance(config.scheduler, Asha):
        ladder = ", ".join(f"{rung:.4g}" for rung in config.scheduler.rungs(steps / epoch_steps))
        print(f"rungs at epoch {ladder}: 1 in {config.scheduler.reduction:g} goes on")
    say_resources(search, slots)
    samples = steps * recipe.train.global_batch
    print(say_estimate(estimate(search, slots, samples, total)))
    _say_trials(search, known, total)


def say_resources(search: Search, slots: Slots) -> None:
    """Print how many trials run at a time, and on what.

    Args:
        search: the search.
        slots: how the cluster is divided.
    """
    recipe = search.recipe
    where = "in the trial's own process" if slots.here else "Ray Train workers"
    gpus = (
        f" and {recipe.cluster.workers * recipe.cluster.gpus_per_worker:g} GPUs"
        if recipe.cluster.gpus_per_worker
        else ""
    )
    print(
        f"{slots.concurrency} trials at a time, each {workers(recipe)} ({where}) with data tasks "
        f"on {slots.share.cpus:.4g} CPUs{gpus}"
    )


def _say_trials(search: Search, known: list[Values] | None, total: int) -> None:
    if known is None:
        print("the trials depend on the results; drawn at random they would look like")
        draw = RandomDraw(search.config.seed)
        trials = [sample(search.config.space, search.resolved, draw) for _ in range(min(3, total))]
    else:
        trials = known
    for index, values in enumerate(trials[:SHOWN]):
        base = "  (the base recipe)" if index == 0 and known is not None and search.config.with_baseline else ""
        print(f"  trial {index}  " + "  ".join(f"{key}={number(value)}" for key, value in values.items()) + base)
    if len(trials) > SHOWN:
        print(f"  and {len(trials) - SHOWN} more")
