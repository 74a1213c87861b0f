"""What a search will take, said beforehand with its basis: samples a second of a former run in the output folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np

from cluster.record.run_folder import RunFolder, run_names
from tune.config import Asha, Search
from tune.record import load_record
from tune.report.numbers import duration
from tune.search.resources import Slots

SECONDS_A_TRIAL = 5.0
"""Start, evaluation, checkpoints and end of a trial beside its training steps: an allowance."""


@dataclass(frozen=True)
class SearchEstimate:
    """Seconds of a search if no trial is stopped early, if the scheduler stops as planned, and where they come from."""

    longest: float
    likely: float
    basis: str


def estimate(search: Search, slots: Slots, samples: float, trials: int) -> SearchEstimate | None:
    """Estimate the wall time of a search; None if nothing in the output folder tells a speed.

    Args:
        search: the search.
        slots: how many trials run at a time.
        samples: training samples of one whole trial.
        trials: how many trials.
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
    """Return the share of all training that successive halving would leave, were all trials compared at once."""
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
        return "expected time: unknown, no former run of this recipe or search in the output folder tells a speed"
    line = f"expected time: at most about {duration(found.longest)}"
    if found.likely < found.longest:
        line += f", about {duration(found.likely)} if trials are stopped as planned"
    return f"{line} (basis: {found.basis})"


def _former_search(search: Search) -> tuple[float, str] | None:
    """Return a trial's samples a second in the newest former search of the name, beside its neighbours."""
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
    """Return what the newest former run of the recipe trained a second, divided among the trials at a time."""
    for name in reversed(run_names(search.recipe.output, search.recipe.name)):
        folder = RunFolder(search.recipe.output, name)
        rates = [row["train/samples_per_s"] for row in _history(folder) if "train/samples_per_s" in row]
        if rates:
            whole = float(np.median(rates))
            speed = whole / slots.concurrency
            return speed, f"{whole:,.0f} samples/s of {folder.url}, shared by {slots.concurrency} trials"
    return None


def _history(folder: RunFolder) -> list[Mapping[str, Any]]:
    """Return the metrics that a run recorded, by its newest checkpoint."""
    fs, root = fsspec.core.url_to_fs(folder.location("checkpoints"))
    files = sorted(fs.glob(f"{root}/step-*/history.jsonl"))
    return [json.loads(line) for line in fs.cat_file(files[-1]).decode().splitlines()] if files else []
