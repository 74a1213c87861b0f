"""The record of a search: its trials and their results in one JSON file, from which it resumes."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.record.run_folder import RunFolder
from perceiver.config import UserError
from perceiver.storage import NonNegativeCount, PositiveCount, StrictNumber, invalid_key, parse_json
from tune.config import PARAMETERS, Mode
from tune.space.space import Values

Status = Literal["waiting", "running", "finished", "stopped", "failed", "unfinished"]
Amount = Annotated[StrictNumber, Field(ge=0, allow_inf_nan=False)]
DONE: tuple[Status, ...] = ("finished", "stopped", "failed")

FORMAT = 1


class Evaluation(BaseModel):
    """The metrics of a trial at one step."""

    model_config = ConfigDict(ser_json_inf_nan="constants")  # A metric may be NaN.

    step: NonNegativeCount
    epoch: Amount
    metrics: dict[str, StrictNumber]
    at: Amount = Field(description="seconds since the epoch")


class Exchange(BaseModel):
    """A trial continued from another one's checkpoint with other values."""

    donor: NonNegativeCount = Field(description="number of the trial that the weights come from")
    step: NonNegativeCount = Field(description="of the checkpoint")
    values: Values = Field(description="the new values")


class TrialRecord(BaseModel):
    """One trial."""

    model_config = ConfigDict(validate_assignment=True)

    number: NonNegativeCount
    values: Values
    label: str = Field(default="", description="row of a table; else empty")
    status: Status = "waiting"
    reason: str = Field(default="", description="of a failure")
    parameters: NonNegativeCount = Field(default=0, description="of the model")
    total_steps: NonNegativeCount = Field(default=0, description="optimizer steps of the whole trial")
    evaluations: list[Evaluation] = []
    exchanges: list[Exchange] = []
    attempts: NonNegativeCount = Field(default=0, description="number of starts")
    seconds: Amount = Field(default=0, description="wall time of training over all attempts")
    samples_per_s: Amount | None = Field(default=None, description="the latest throughput")
    started: Amount | None = None

    @property
    def step(self) -> int:
        """Return the optimizer steps of the last evaluation."""
        return self.evaluations[-1].step if self.evaluations else 0

    @property
    def epoch(self) -> float:
        """Return the epochs of the last evaluation."""
        return self.evaluations[-1].epoch if self.evaluations else 0.0

    def scores(self, metrics: Sequence[str]) -> dict[str, float]:
        """Return the last values of some metrics; NaN and infinite values are left out."""
        last = {**(self.evaluations[-1].metrics if self.evaluations else {}), PARAMETERS: float(self.parameters)}
        return {name: last[name] for name in metrics if math.isfinite(last.get(name, math.nan))}

    def add(self, evaluation: Evaluation) -> None:
        """Add an evaluation; later ones from before a restart or an exchange are dropped."""
        self.evaluations = [e for e in self.evaluations if e.step < evaluation.step] + [evaluation]


class SearchRecord(BaseModel):
    """All trials of a search, in the order of their numbers."""

    format: PositiveCount = FORMAT
    metrics: dict[str, Mode] = Field(min_length=1)
    workers: PositiveCount = Field(description="training workers of each trial")
    trials: list[TrialRecord] = []
    seconds: Amount = Field(default=0, description="wall time of the search, over all its starts")

    @model_validator(mode="after")
    def _numbers_are_places(self) -> "SearchRecord":
        """Refuse trials that are missing or doubled; those that others continued from are among them."""
        numbers = [trial.number for trial in self.trials]
        if numbers != list(range(len(numbers))):
            raise ValueError(f"trials: got numbers {str(numbers)[:80]}, wanted 0 to {len(numbers) - 1} in order")
        for trial in self.trials:
            if strange := [e.donor for e in trial.exchanges if e.donor >= len(numbers)]:
                raise ValueError(f"trials.{trial.number}: continued from trial {strange[0]} of {len(numbers)}")
        return self

    def trial(self, number: int) -> TrialRecord:
        """Return a trial by its number."""
        return self.trials[number]

    def ended(self) -> list[TrialRecord]:
        """Return the trials that have ended."""
        return [trial for trial in self.trials if trial.status in DONE]

    def ranked(self) -> list[TrialRecord]:
        """Return the trials with a result, best first; finished trials precede all others."""
        (metric, mode), *_ = self.metrics.items()
        sign = -1 if mode == "max" else 1
        scored = [trial for trial in self.trials if metric in trial.scores([metric]) and trial.evaluations]
        return sorted(scored, key=lambda t: (t.status != "finished", sign * t.scores([metric])[metric], t.number))

    def best(self) -> TrialRecord | None:
        """Return the best trial by the first metric, of the finished trials if there are any."""
        return next(iter(self.ranked()), None)

    def front(self) -> list[TrialRecord]:
        """Return the finished trials that no other one beats in every metric (the Pareto front)."""
        names = list(self.metrics)
        rows = [t for t in self.ranked() if t.status == "finished" and len(t.scores(names)) == len(names)]
        return [t for t in rows if not any(self._beats(other, t) for other in rows)]

    def _beats(self, one: TrialRecord, other: TrialRecord) -> bool:
        """Return whether a trial is at least as good in every metric, and better in one."""
        gains = []
        for name, mode in self.metrics.items():
            gain = one.scores([name])[name] - other.scores([name])[name]
            gains.append(gain if mode == "max" else -gain)
        return min(gains) >= 0 and max(gains) > 0

    def worker_seconds(self) -> float:
        """Return the cost of the search: seconds of training times workers."""
        return self.workers * sum(trial.seconds for trial in self.trials)


def save_record(record: SearchRecord, folder: RunFolder) -> None:
    """Write `trials.json` atomically."""
    folder.write("trials.json", record.model_dump_json(indent=1) + "\n")


def load_record(folder: RunFolder) -> SearchRecord:
    """Read `trials.json`.

    Raises:
        UserError: it is missing, damaged, or of a newer format.
    """
    text, where = folder.read("trials.json"), folder.location("trials.json")
    if text is None:
        raise UserError(f"{folder.url} has no trials.json: the search was never started; start it without --resume")
    tree = parse_json(text, where)
    version = tree.get("format", FORMAT) if isinstance(tree, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise UserError(f"{where} has format {version}, this version reads up to {FORMAT}: install a newer one")
    try:
        return SearchRecord.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where} is damaged: {invalid_key(error)}: restore it") from None


def reopen(record: SearchRecord) -> list[int]:
    """Mark the trials that have not ended as unfinished; return their numbers."""
    open_trials = [trial for trial in record.trials if trial.status not in DONE]
    for trial in open_trials:
        trial.status = "unfinished"
    return [trial.number for trial in open_trials]


def trial_name(number: int) -> str:
    """Return the name of a trial's run folder."""
    return f"trial-{number:03d}"


def number_of(name: str) -> int:
    """Return the number of the trial with this name."""
    return int(name.rpartition("-")[2])
