"""The plan of a search: trials, resources, and expected time by the speed of a previous run."""

from dataclasses import dataclass

import numpy as np

from cluster.record.run_folder import RunFolder, run_names
from cluster.run.console import duration
from perceiver.config import UserError
from perceiver.tracking.printable import say
from perceiver.train.hooks import History
from tune.config import Asha, Search
from tune.report.numbers import values_text, workers
from tune.search.checks import Checker
from tune.search.resources import Slots
from tune.search_record import load_record
from tune.space.samplers import RandomDraw
from tune.space.space import Values, sample

SHOWN = 20
SECONDS_A_TRIAL = 5.0
"""Allowance for the start, evaluations, checkpoints and end of a trial."""


def say_plan(search: Search, checker: Checker, slots: Slots, known: list[Values] | None) -> None:
    """Print trials, resources, concurrency and expected time.

    Args:
        search: the search.
        checker: of its recipes.
        slots: the division of the cluster.
        known: the trials if they do not depend on results; else examples are drawn.
    """
    config, recipe = search.config, search.recipe
    total = len(known) if known is not None else config.trials
    steps, epoch_steps = checker.total_steps({})
    say(
        f"{config.name}: {total} trials of {recipe.name}, search {config.search.kind}, "
        f"scheduler {config.scheduler.kind}"
    )
    say(f"one trial: {steps:,} steps of {recipe.train.global_batch} samples ({steps / epoch_steps:.4g} epochs)")
    if isinstance(config.scheduler, Asha):
        ladder = ", ".join(f"{rung:.4g}" for rung in config.scheduler.rungs(steps / epoch_steps))
        say(f"rungs at epoch {ladder}: 1 in {config.scheduler.reduction:g} continues")
    say_resources(search, slots)
    samples = steps * recipe.train.global_batch
    say(say_estimate(estimate(search, slots, samples, total)))
    _say_trials(search, known, total)


def say_resources(search: Search, slots: Slots) -> None:
    """Print the number of trials at a time and their resources."""
    recipe = search.recipe
    where = "in the trial's own process" if slots.here else "Ray Train workers"
    gpus = (
        f" and {recipe.cluster.workers * recipe.cluster.gpus_per_worker:g} GPUs"
        if recipe.cluster.gpus_per_worker
        else ""
    )
    say(
        f"{slots.concurrency} trials at a time, each {workers(recipe)} ({where}) with data tasks "
        f"on {slots.share.cpus:.4g} CPUs{gpus}"
    )


def _say_trials(search: Search, known: list[Values] | None, total: int) -> None:
    if known is None:
        say("the trials depend on the results; random examples:")
        draw = RandomDraw(search.config.seed)
        trials = [sample(search.config.space, search.resolved, draw) for _ in range(min(3, total))]
    else:
        trials = known
    for index, values in enumerate(trials[:SHOWN]):
        base = "  (the base recipe)" if index == 0 and known is not None and search.config.with_baseline else ""
        say(f"  trial {index}  " + values_text(values) + base)
    if len(trials) > SHOWN:
        say(f"  and {len(trials) - SHOWN} more")


@dataclass(frozen=True)
class SearchEstimate:
    """Seconds of a search without early stopping and with the planned early stopping, and the basis of the estimate."""

    longest: float
    likely: float
    basis: str


def estimate(search: Search, slots: Slots, samples: float, trials: int) -> SearchEstimate | None:
    """Estimate the wall time of a search; None if the output folder has no run with a measured speed.

    Args:
        search: the search.
        slots: the division of the cluster.
        samples: training samples of one whole trial.
        trials: number of trials.
    """
    found = _former_search(search) or _former_run(search, slots)
    if found is None:
        return None
    speed, basis = found
    turns = -(-trials // slots.concurrency)
    longest = turns * (samples / speed + SECONDS_A_TRIAL)
    share = kept_share(search, trials)
    return SearchEstimate(longest, max(share * longest, samples / speed + SECONDS_A_TRIAL), basis)


def kept_share(search: Search, trials: int) -> float:
    """Return the share of all training that successive halving keeps if all trials are compared at once."""
    settings, epochs = search.config.scheduler, search.recipe.train.epochs
    if not isinstance(settings, Asha) or epochs is None:
        return 1.0
    left, trained, before = float(trials), 0.0, 0.0
    for rung in [*settings.rungs(epochs), epochs]:
        trained += left * (rung - before)
        left, before = max(1.0, left / settings.reduction), rung
    return trained / (trials * epochs)


def say_estimate(found: SearchEstimate | None) -> str:
    """Return the estimate as one line."""
    if found is None:
        return "expected time: unknown, the output folder has no previous run of this recipe or search"
    line = f"expected time: at most about {duration(found.longest)}"
    if found.likely < found.longest:
        line += f", about {duration(found.likely)} if trials are stopped as planned"
    return f"{line} (basis: {found.basis})"


def _former_search(search: Search) -> tuple[float, str] | None:
    """Return a trial's samples per second in the newest previous search of this name."""
    for name in reversed(run_names(search.recipe.output, search.config.name)):
        folder = RunFolder(search.recipe.output, name)
        if folder.read("trials.json") is None:
            continue
        rates = [trial.samples_per_s for trial in load_record(folder).trials if trial.samples_per_s]
        if rates:
            speed = float(np.median(rates))
            return speed, f"{speed:,.0f} samples/s of a trial of {folder.url}"
    return None


def _former_run(search: Search, slots: Slots) -> tuple[float, str] | None:
    """Return the samples per second of the newest previous run of the recipe, divided among concurrent trials."""
    for name in reversed(run_names(search.recipe.output, search.recipe.name)):
        folder = RunFolder(search.recipe.output, name)
        try:
            steps = folder.checkpoints.steps()
            rows = History(folder.checkpoints.history(steps[-1])).rows if steps else []
        except UserError:  # a damaged run tells no speed
            continue
        rates = [row["train/samples_per_s"] for row in rows if "train/samples_per_s" in row]
        if rates:
            whole = float(np.median(rates))
            speed = whole / slots.concurrency
            return speed, f"{whole:,.0f} samples/s of {folder.url}, shared by {slots.concurrency} trials"
    return None
