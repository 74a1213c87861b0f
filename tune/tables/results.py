"""What trials come to as rows of a table: mean and deviation over seeds, and whether the paper's claims hold here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from tune.record import TrialRecord
from tune.tables.config import Claim, Row, ScaleName, TableConfig

SHARES = ("accuracy", "mean_average_precision")
"""Metrics that a table gives in per cent, as the papers do."""

Verdict = Literal["holds", "does not hold", "open"]


@dataclass(frozen=True)
class Cost:
    """What a row's model costs: parameters, and FLOPs of one sample's forward pass as the papers count them."""

    parameters: int
    flops: int


@dataclass(frozen=True)
class RowResult:
    """A row with what was measured.

    Attributes:
        row: of the table.
        cost: of its model; None if it is not run at this scale.
        scores: the metric of each seed that came to its end, in per cent where it is a share, by seed.
        seconds: wall time of each of these trials' training.
        failed: seed -> why it has no score.
    """

    row: Row
    cost: Cost | None
    scores: Mapping[int, float]
    seconds: Sequence[float] = ()
    failed: Mapping[int, str] | None = None

    @property
    def mean(self) -> float | None:
        """Return the mean over seeds."""
        return fmean(self.scores.values()) if self.scores else None

    @property
    def deviation(self) -> float | None:
        """Return the sample standard deviation over seeds; None for fewer than two."""
        return stdev(self.scores.values()) if len(self.scores) > 1 else None

    @property
    def wall(self) -> float | None:
        """Return the mean wall time of a trial in seconds."""
        return fmean(self.seconds) if self.seconds else None


@dataclass(frozen=True)
class JudgedClaim:
    """A claim, what our figures say about it, and the reason in a few words."""

    claim: Claim
    verdict: Verdict
    reason: str


def is_share(metric: str) -> bool:
    """Whether a metric is given in per cent."""
    return metric.startswith(SHARES)


def results(
    table: TableConfig, scale: ScaleName, trials: Sequence[TrialRecord], costs: Mapping[str, Cost]
) -> list[RowResult]:
    """Gather the trials of each row.

    Args:
        table: whose rows are wanted.
        scale: the one that was run.
        trials: all there are; each belongs to the row that its number says (`trial_row`), its values hold the seed.
        costs: of each row's model, by the row's name.
    """
    rows, metric = table.run_rows(scale), table.scale(scale).metric
    factor = 100 if is_share(metric) else 1
    found = []
    for row in table.rows:
        own = [trial for trial in trials if row in rows and trial_row(rows, trial) == row]
        done = [trial for trial in own if trial.status == "finished" and trial.scores([metric])]
        scores = {int(trial.values["seed"]): factor * trial.scores([metric])[metric] for trial in done}
        failed = {int(trial.values["seed"]): trial.reason or trial.status for trial in own if trial not in done}
        found.append(RowResult(row, costs.get(row.name), scores, [trial.seconds for trial in done], failed))
    return found


def trial_row(rows: Sequence[Row], trial: TrialRecord) -> Row:
    """Return the row of a trial: all rows with the first seed come first, so that more seeds only add trials."""
    return rows[trial.number % len(rows)]


def seed_noise(found: Sequence[RowResult]) -> float | None:
    """Return the standard deviation over seeds pooled over all rows; None if no row has two seeds."""
    groups = [list(result.scores.values()) for result in found if len(result.scores) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        return None
    return math.sqrt(sum((len(group) - 1) * stdev(group) ** 2 for group in groups) / freedom)


def judge(table: TableConfig, found: Sequence[RowResult], mode: str = "max") -> list[JudgedClaim]:
    """Hold the table's claims against the results.

    Two means are taken to differ by more than chance if they lie further apart than twice the standard error that the
    deviation over seeds, pooled over the rows, gives their difference.
    """
    by_name = {result.row.name: result for result in found}
    noise = seed_noise(found)
    return [_judge(claim, by_name, noise, mode) for claim in table.claims]


def _judge(claim: Claim, by_name: Mapping[str, RowResult], noise: float | None, mode: str) -> JudgedClaim:
    first, second = (by_name[name] for name in claim.rows)
    lacking = [result.row.label for result in (first, second) if result.mean is None]
    if first.mean is None or second.mean is None:
        return JudgedClaim(claim, "open", f"not run: {', '.join(lacking)}")
    gain = (first.mean - second.mean) * (1 if mode == "max" else -1)
    wanted = f", at least {claim.by:g} apart wanted" if claim.by else ""
    words = f"{first.mean:.1f} against {second.mean:.1f}{wanted}"
    if noise is None:
        if gain < claim.by and claim.same is None:
            return JudgedClaim(claim, "does not hold", f"{words}; one seed")
        return JudgedClaim(claim, "open", f"{words}; one seed tells no noise")
    margin = 2 * noise * math.sqrt(1 / len(first.scores) + 1 / len(second.scores))
    reason = f"{words}; by chance they differ by up to {margin:.1f}"
    if claim.same is not None:
        return JudgedClaim(claim, "holds" if abs(gain) <= margin else "does not hold", reason)
    if gain >= claim.by and gain > margin:
        return JudgedClaim(claim, "holds", reason)
    return JudgedClaim(claim, "open" if gain + margin >= claim.by else "does not hold", reason)
