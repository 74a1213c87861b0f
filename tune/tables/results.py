"""The results of a table: mean and deviation of its rows over seeds, and a verdict on the paper's claims."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Literal

from tune.search_record import TrialRecord
from tune.tables.config import Claim, Row, ScaleName, TableConfig

SHARES = ("accuracy", "mean_average_precision", "general", "ap50", "exact")
"""Metrics in per cent, as in the papers."""

Verdict = Literal["holds", "does not hold", "open"]


@dataclass(frozen=True)
class Cost:
    """The cost of a row's model: parameters, and FLOPs of one sample's forward pass as the papers count them.

    Attributes:
        input_rf: see `perceiver.accounting.count_input_positions`; None if the table does not show it.
    """

    parameters: int
    flops: int
    input_rf: int | None = None


@dataclass(frozen=True)
class RowResult:
    """A row with its measurements.

    Attributes:
        row: of the table.
        cost: of its model; None if it is not run at this scale.
        scores: the metric of each finished seed, shares in per cent, by seed.
        seconds: wall time of each of these trials' training.
        failed: the reason why a seed has no score, by seed.
        others: scores of the table's other metrics, by metric and seed.
    """

    row: Row
    cost: Cost | None
    scores: Mapping[int, float]
    seconds: Sequence[float] = ()
    failed: Mapping[int, str] | None = None
    others: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    def of(self, metric: str | None) -> "RowResult":
        """Return the row with the scores of another metric; None: of the table's."""
        return self if metric is None else replace(self, scores=self.others.get(metric, {}))

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
    """A claim with our verdict and its reason."""

    claim: Claim
    verdict: Verdict
    reason: str


def is_share(metric: str) -> bool:
    """Return whether a metric is in per cent."""
    return metric.startswith(SHARES)


def results(
    table: TableConfig, scale: ScaleName, trials: Sequence[TrialRecord], costs: Mapping[str, Cost]
) -> list[RowResult]:
    """Gather the trials of each row.

    Args:
        table: the table.
        scale: its scale.
        trials: all trials, each with its seed among its values; their numbers determine the rows (`trial_row`).
        costs: of each row's model, by the row's name.
    """
    rows, metric = table.run_rows(scale), table.scale(scale).metric
    found = []
    for row in table.rows:
        own = [trial for trial in trials if row in rows and trial_row(rows, trial) == row]
        done = [trial for trial in own if trial.status == "finished" and trial.scores([metric])]
        scores = _scores(done, metric)
        others = {name: _scores(done, name) for name in table.others}
        failed = {int(trial.values["seed"]): trial.reason or trial.status for trial in own if trial not in done}
        found.append(RowResult(row, costs.get(row.name), scores, [trial.seconds for trial in done], failed, others))
    return found


def _scores(trials: Sequence[TrialRecord], metric: str) -> dict[int, float]:
    """Return a metric by seed, shares in per cent, of the trials that have it."""
    factor = 100 if is_share(metric) else 1
    found = {int(trial.values["seed"]): trial.scores([metric]) for trial in trials}
    return {seed: factor * scores[metric] for seed, scores in found.items() if metric in scores}


def trial_row(rows: Sequence[Row], trial: TrialRecord) -> Row:
    """Return the row of a trial: all rows with the first seed precede the others, so that more seeds add trials."""
    return rows[trial.number % len(rows)]


def seed_noise(found: Sequence[RowResult]) -> float | None:
    """Return the standard deviation over seeds pooled over all rows; None if no row has two seeds."""
    groups = [list(result.scores.values()) for result in found if len(result.scores) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        return None
    return math.sqrt(sum((len(group) - 1) * stdev(group) ** 2 for group in groups) / freedom)


def judge(table: TableConfig, found: Sequence[RowResult], mode: str = "max") -> list[JudgedClaim]:
    """Compare the table's claims with the results.

    Two means differ by more than chance if their difference exceeds twice its standard error, by the standard deviation
    over seeds, pooled over the rows.
    """
    judged = []
    for claim in table.claims:
        measured = [result.of(claim.metric) for result in found]
        by_name = {result.row.name: result for result in measured}
        judged.append(_judge(claim, [by_name[name] for name in claim.rows], seed_noise(measured), mode))
    return judged


def _judge(claim: Claim, rows: Sequence[RowResult], noise: float | None, mode: str) -> JudgedClaim:
    lacking = [result.row.label for result in rows if result.mean is None]
    if lacking:
        return JudgedClaim(claim, "open", f"not run: {', '.join(lacking)}")
    means = [result.mean or 0.0 for result in rows] + ([] if claim.above is None else [claim.above])
    gain = (means[0] - means[1]) * (1 if mode == "max" else -1)
    wanted = f", at least {claim.by:g} apart wanted" if claim.by else ""
    words = f"{means[0]:.1f} against {means[1]:.1f}{wanted}"
    if noise is None:
        if gain < claim.by and claim.same is None:
            return JudgedClaim(claim, "does not hold", f"{words}; one seed")
        return JudgedClaim(claim, "open", f"{words}; unknown noise with one seed")
    margin = 2 * noise * math.sqrt(sum(1 / len(result.scores) for result in rows))
    reason = f"{words}; by chance they differ by up to {margin:.1f}"
    if claim.same is not None:
        return JudgedClaim(claim, "holds" if abs(gain) <= margin else "does not hold", reason)
    if gain >= claim.by and (gain > margin or claim.by < 0):
        return JudgedClaim(claim, "holds", reason)
    return JudgedClaim(claim, "open" if gain + margin >= claim.by else "does not hold", reason)
