"""The weights of G-blend from the histories of runs, as `perceiver blend` prints them."""

from collections.abc import Mapping
from typing import Any

from perceiver.api.run_record import Run
from perceiver.config import UserError
from perceiver.train.blending import Losses, blend_weights, recorded_losses


def estimate(runs: Mapping[str, str], first: float | None = None, last: float | None = None) -> dict[str, Any]:
    """Return the weight of each classifier, with its losses at two evaluations.

    Args:
        runs: folder of a run by the name of the classifier that it trained.
        first: epoch of an evaluation that all runs have; default: the first.
        last: of a later one; default: the last that all have.

    Raises:
        UserError: a run has no such evaluation, or fewer than two.
    """
    found = {name: _losses(name, place) for name, place in runs.items()}
    common = sorted(set.intersection(*(set(losses) for losses in found.values())))
    if len(common) < 2:
        raise UserError(
            f"{', '.join(runs.values())} have {len(common)} evaluations at the same epochs; wanted two: train them "
            "with the same train.eval_every"
        )
    begin, end = _epoch("--from", first, common, common[0]), _epoch("--to", last, common, common[-1])
    if begin >= end:
        raise UserError(f"--from {begin:g} --to {end:g}: wanted an earlier and a later evaluation")
    before, after = ({name: losses[epoch] for name, losses in found.items()} for epoch in (begin, end))
    weights = blend_weights(before, after)
    return {
        "from": begin,
        "to": end,
        "runs": {
            name: {
                "train": [before[name].train, after[name].train],
                "held_out": [before[name].held_out, after[name].held_out],
                "weight": weights[name],
            }
            for name in runs
        },
    }


def _losses(name: str, place: str) -> dict[float, Losses]:
    """Return the losses of a run's classifier: that of the name if it trained several, else its own."""
    rows = Run(place).history
    several = any(f"eval/loss_{name}" in row for row in rows)
    try:
        return recorded_losses(rows, name if several else "")
    except UserError as error:
        raise UserError(f"{place}: {error}; wanted a run with two evaluations") from None


def _epoch(option: str, wanted: float | None, common: list[float], default: float) -> float:
    if wanted is None:
        return default
    if near := [epoch for epoch in common if abs(epoch - wanted) < 0.01]:
        return near[0]
    shown = ", ".join(f"{epoch:g}" for epoch in common[:10])
    raise UserError(f"{option} {wanted:g}: the runs have evaluations at the epochs {shown}")
