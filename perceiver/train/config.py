"""The keys of a recipe's section `train`: length, batches, evaluations, checkpoints, and what else a run does."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, model_validator

from perceiver.config import Config, Count, CountOrZero, Epochs, Location, NonNegative, Real, Size, UserError
from perceiver.optim.averaging import EmaConfig
from perceiver.train.engine.protocol import Compile, Precision

MOST_PROFILED = 100


class KeepBest(Config):
    """Which checkpoints are kept for their metrics (recipe key `train.keep_best`)."""

    metric: str = Field(default="eval/accuracy", description="recorded metric; `eval/...` for one of an evaluation")
    mode: Literal["max", "min"] = Field(default="max", description="whether a larger or a smaller value is better")
    count: Count = Field(default=1, description="number of best checkpoints to keep")

    def better(self, one: float, other: float) -> bool:
        """Return whether the first value is strictly better; NaN is worse than anything."""
        if math.isnan(one) or math.isnan(other):
            return math.isnan(other) and not math.isnan(one)
        return one > other if self.mode == "max" else one < other


class EarlyStop(Config):
    """When a run ends before its last step (recipe key `train.early_stop`)."""

    metric: str = Field(default="eval/loss", description="metric of the evaluations that must improve")
    mode: Literal["max", "min"] = Field(default="min", description="whether a larger or a smaller value is better")
    patience: Count = Field(default=5, description="consecutive evaluations without an improvement that end the run")
    min_delta: NonNegative = Field(default=0.0, description="an improvement is a change by more than this")

    def decided(self, evaluations: Mapping[int, Mapping[str, float]]) -> tuple[int, str] | None:
        """Return the step of the evaluation that ends the run, and the reason; None if none does.

        NaN is no improvement.

        Args:
            evaluations: the metrics of all evaluations by step.
        """
        best, best_step, waited = math.nan, 0, 0
        for step in sorted(evaluations):
            value = evaluations[step].get(self.metric)
            if value is None:
                continue
            change = best - value if self.mode == "min" else value - best
            if change > self.min_delta or (math.isnan(best) and not math.isnan(value)):
                best, best_step, waited = value, step, 0
                continue
            waited += 1
            if waited == self.patience:
                more = f" by more than {self.min_delta:g}" if self.min_delta else ""
                return step, (
                    f"{self.metric} did not improve on {best:.4g} of step {best_step}{more} in {waited} "
                    f"evaluation{'s' * (waited > 1)}, up to step {step} (train.early_stop)"
                )
        return None


class ProfileConfig(Config):
    """Steps to profile (recipe key `train.profile`)."""

    steps: tuple[Count, Count] = Field(description="first and last step to profile, such as [20, 25]; 100 at most")
    memory: bool = Field(default=False, description="also record allocations and the memory of each operator")
    ranks: tuple[CountOrZero, ...] = Field(
        default=(0,), min_length=1, max_length=1000, description="ranks of the workers to profile"
    )

    @model_validator(mode="after")
    def _ordered(self) -> "ProfileConfig":
        first, last = self.steps
        if last < first or last - first >= MOST_PROFILED:
            raise ValueError(
                f"steps: got {[first, last]}, wanted [FIRST, LAST] in order, {MOST_PROFILED} steps at most"
            )
        return self

    def check(self, total_steps: int, workers: int) -> None:
        """Check that the steps and ranks exist.

        Raises:
            UserError: the run is shorter, or has fewer workers.
        """
        if self.steps[1] > total_steps:
            raise UserError(
                f"train.profile.steps = {list(self.steps)}: the run has {total_steps} steps; wanted a last step of at "
                f"most {total_steps}"
            )
        if unknown := [rank for rank in self.ranks if rank >= workers]:
            raise UserError(
                f"train.profile.ranks = {list(self.ranks)}: got rank {unknown[0]} with cluster.workers = {workers}, "
                f"wanted ranks from 0 to {workers - 1}"
            )


class SavingConfig(Config):
    """When checkpoints are written and which are kept; part of the recipe's `train:` section."""

    checkpoint_every: Epochs | Literal["auto"] = Field(
        default="auto",
        description="epochs between two checkpoints; auto: the interval of Young and Daly, from measured "
        "times and cluster.mtbf_hours, limited so that saving takes at most 1 % of the time",
    )
    keep_checkpoints: Count = Field(default=2, description="number of newest checkpoints to keep")
    keep_every: Count | None = Field(default=None, description="keep each n-th checkpoint permanently")
    keep_best: KeepBest | None = Field(default=None, description="also save after evaluations that are among the best")
    checkpoint_misses: Count = Field(default=3, description="consecutive failed checkpoints after which the run stops")


PartName = Annotated[str, Field(pattern=r"^\w+(\.\w+)*$", max_length=200)]
"""The dotted name of a module of a model."""


class TrainConfig(SavingConfig):
    """How long to train, batch sizes, evaluation and checkpoints (recipe key `train`)."""

    epochs: Epochs | None = Field(default=None, description="passes over the training data; give this or steps")
    steps: Count | None = Field(default=None, description="optimizer steps; give this or epochs")
    global_batch: Size = Field(default=128, description="samples per optimizer step, over all workers")
    micro_batch: Count | None = Field(
        default=None, description="samples per forward pass on one worker; default: a worker's whole share"
    )
    init_from: Location | dict[PartName, Location] | None = Field(
        default=None,
        description="initial weights: a run's folder, a checkpoint, a .safetensors file or a transformers folder; or "
        "one for each of some parts of the model, such as {front: runs/vgg-001}",
    )
    freeze: tuple[str, ...] = Field(
        default=(),
        max_length=1000,
        description="patterns of the names of parameters that are not trained, such as [cross_attends.*, latents]",
    )
    ema: EmaConfig | None = Field(
        default=None, description="Moving average of the weights, which is evaluated and written; null: none."
    )
    precision: Precision = Field(default="auto", description="fp32, bf16, or auto: bf16 on GPUs that have it")
    compile: Compile = Field(
        default="auto",
        description="compile a Perceiver's layers by torch.compile; auto: on GPUs, with ZeRO stages 0 to 2",
    )
    bf16_residual: bool = Field(
        default=False,
        description="also keep the latents between layers in bf16, under precision bf16: less memory and time",
    )
    log_every: Count = Field(default=10, description="steps between two records of the training metrics")
    eval_every: Epochs = Field(default=1.0, description="epochs between two evaluations")
    early_stop: EarlyStop | None = Field(
        default=None,
        description="end the run when its evaluations no longer improve; without keep_best, the best checkpoint by "
        "this metric is kept",
    )
    eval_async: bool = Field(
        default=False,
        validation_alias=AliasChoices("eval_async", "eval_beside"),
        description="evaluate checkpoints in a separate process while training continues, instead of between two "
        "steps; on GPUs it needs as much of a GPU as a worker",
    )
    on_bad_loss: Literal["stop", "skip", "rollback"] = Field(
        default="stop",
        description="when the loss is NaN or infinite: stop; skip the step; or restore the weights of the last "
        "checkpoint and continue with the samples after the step",
    )
    bad_loss_limit: Count = Field(
        default=10, description="number of skipped or rolled-back steps after which the run stops"
    )
    on_spike: Literal["stop", "skip", "rollback"] | None = Field(
        default=None, description="the same when the loss is far above those of the last steps; default: nothing"
    )
    spike_window: int = Field(
        default=100, ge=10, le=10_000, description="number of last steps with whose losses one is compared"
    )
    spike_factor: Real = Field(
        default=10,
        gt=0,
        le=1e6,
        description="a loss is a spike above median + factor x 1.4826 x median absolute deviation of the window",
    )
    replay_every: Count | None = Field(
        default=None,
        description="each n-th step first computes a micro-batch twice and compares loss and gradients bit by bit, to "
        "find faulty devices; ZeRO stages 0 to 2; on GPUs by deterministic algorithms. Default: never",
    )
    ledger: bool = Field(default=False, description="record the sample ids of each step in the run's folder ledger/")
    profile: ProfileConfig | None = Field(default=None, description="profile some steps with torch.profiler")

    @model_validator(mode="before")
    @classmethod
    def _keep_what_stops(cls, given: Any) -> Any:
        stop = given.get("early_stop") if isinstance(given, Mapping) else None
        if stop is None or given.get("keep_best") is not None:
            return given
        values = stop if isinstance(stop, Mapping) else stop.model_dump() if isinstance(stop, EarlyStop) else {}
        known = EarlyStop.model_fields
        best = {key: values.get(key, known[key].default) for key in ("metric", "mode")}
        return {**given, "keep_best": best} if all(isinstance(value, str) for value in best.values()) else given

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of train.epochs and train.steps")
        return self

    def initial_places(self) -> dict[str, str]:
        """Return the places of `init_from` by key: the key itself, or one for each part."""
        if isinstance(self.init_from, dict):
            return {f"train.init_from.{part}": place for part, place in self.init_from.items()}
        return {"train.init_from": self.init_from} if self.init_from else {}

    def total_steps(self, samples: int) -> int:
        """Return the number of optimizer steps of the whole run.

        With `epochs` it is samples x epochs / global batch, rounded up once for the whole run: no sample is seen less
        often than requested.

        Args:
            samples: number of training samples.
        """
        if self.steps is not None:
            return self.steps
        wanted = samples * Fraction(str(self.epochs))  # exact: 0.1 is a tenth
        return math.ceil(wanted / self.global_batch)

    def rows(self, world: int) -> int:
        """Return the rows of one worker per optimizer step, padding included: whole micro-batches."""
        return self.accumulation(world) * self.micro(world)

    def accumulation(self, world: int) -> int:
        """Return the number of micro-batches per step on one worker."""
        return -(-self._share(world) // self.micro(world))

    def micro(self, world: int) -> int:
        """Return the samples per forward pass on one worker."""
        return min(self.micro_batch or self._share(world), self._share(world))

    def _share(self, world: int) -> int:
        """Return the largest number of samples of one worker per step."""
        return -(-self.global_batch // world)
