"""Numbers to predict: their names and units, their losses, and figures from sums that add up over workers."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from perceiver.config import Config, Real, UserError
from perceiver.tasks._agreement import pearson, spearman

Loss = Literal["mse", "l1", "huber"]
_Mean = Annotated[Real, Field(ge=-1e15, le=1e15)]
_Deviation = Annotated[Real, Field(ge=1e-15, le=1e15)]


class Targets(Config):
    """The numbers that a model predicts: what the training data have, which a run takes from their manifest."""

    names: tuple[str, ...] = Field(min_length=1, description="Names of the numbers, in the order of the outputs.")
    mean: tuple[_Mean, ...] = Field(description="Mean of each over the training split.")
    std: tuple[_Deviation, ...] = Field(description="Standard deviation of each over the training split.")

    @model_validator(mode="after")
    def _as_many_of_each(self) -> "Targets":
        if not len(self.names) == len(self.mean) == len(self.std):
            raise ValueError(f"{len(self.names)} names, {len(self.mean)} means and {len(self.std)} deviations")
        return self


def label_key(name: str) -> str:
    """Return the feature, and the batch key, of the class that a task of several predicts."""
    return name if name == "label" else f"label_{name}"


class TaskTarget(Config):
    """What one of the tasks predicts: a class, or a number of the batch key `target`."""

    classes: tuple[str, ...] = Field(default=(), description="Names of its classes; empty: unknown, or a number.")
    column: int | None = Field(default=None, ge=0, le=1 << 20, description="Column of the number; null: a class.")
    scale: Targets | None = Field(default=None, description="Mean and deviation of the number.")

    @model_validator(mode="after")
    def _is_one_of_both(self) -> "TaskTarget":
        if (self.column is None) != (self.scale is None) or (
            self.scale and (self.classes or len(self.scale.names) != 1)
        ):
            raise ValueError("wanted classes, or the column and the scale of one number")
        return self


def given(targets: Targets | None) -> Targets:
    """Return the targets.

    Raises:
        UserError: they were not taken from the data.
    """
    if targets is None:
        raise UserError("task.targets: got none; wanted names, mean and std, which a run takes from its data")
    return targets


class Scale:
    """Between numbers in units, (B, k), and normalised ones of mean 0 and deviation 1 over the training split."""

    def __init__(self, targets: Targets) -> None:
        self.names = targets.names
        self.mean = torch.tensor(targets.mean, dtype=torch.float64)
        self.std = torch.tensor(targets.std, dtype=torch.float64)

    def normalised(self, values: Tensor) -> Tensor:
        """Return values in units as normalised ones, float32."""
        mean, std = self.mean.to(values.device), self.std.to(values.device)
        return ((values.double() - mean) / std).float()

    def in_units(self, outputs: Tensor) -> Tensor:
        """Return a model's outputs in units, float32."""
        mean, std = self.mean.to(outputs.device, torch.float32), self.std.to(outputs.device, torch.float32)
        return outputs.float() * std + mean


def elementwise(kind: Loss, outputs: Tensor, wanted: Tensor, delta: float) -> Tensor:
    """Return the loss of each normalised output; of `huber` beyond `delta` deviations it is linear."""
    if kind == "mse":
        return nn.functional.mse_loss(outputs, wanted, reduction="none")
    if kind == "l1":
        return nn.functional.l1_loss(outputs, wanted, reduction="none")
    return nn.functional.huber_loss(outputs, wanted, reduction="none", delta=delta)


def error_sums(names: Sequence[str], outputs: Tensor, wanted: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Return what `error_figures` needs of a batch, summed over the valid rows.

    Args:
        names: of the numbers.
        outputs: (B, k) normalised.
        wanted: (B, k) normalised; rows that are not valid may have any value.
        valid: (B,) bool.
    """
    keep = valid[:, None]
    zero = torch.zeros((), dtype=torch.float64, device=valid.device)
    error = (outputs.detach().double() - wanted.double()).where(keep, zero)
    true = wanted.double().where(keep, zero)
    given = outputs.detach().double().where(keep, zero)
    sums = {"absolute": error.abs(), "square": error.square(), "true": true, "true_square": true.square()}
    sums |= {"given": given, "given_square": given.square(), "product": given * true}
    return {f"{what}/{name}": column for what, each in sums.items() for name, column in zip(names, each.sum(0))}


def error_figures(names: Sequence[str], std: Sequence[float], sums: Mapping[str, Any], n: float) -> dict[str, float]:
    """Return mae and rmse in units, r2, and Pearson's and Spearman's correlation of each number, as `mae/NAME`.

    Spearman's needs the rows of an evaluation (`number_rows`).

    R2 is 1 - the squared errors over the squared deviations from the mean of the evaluated samples, both from sums, so
    that it is the same on any number of workers. It is 0 if all true values are the same.
    """
    n, figures = max(n, 1.0), {}
    for name, scale in zip(names, std, strict=True):
        spread = sums[f"true_square/{name}"] - sums[f"true/{name}"] ** 2 / n
        figures[f"mae/{name}"] = scale * sums[f"absolute/{name}"] / n
        figures[f"rmse/{name}"] = scale * math.sqrt(max(sums[f"square/{name}"], 0.0) / n)
        figures[f"r2/{name}"] = 1 - sums[f"square/{name}"] / spread if spread > 1e-12 * n else 0.0
        squares = sums[f"given_square/{name}"], sums[f"true_square/{name}"]
        figures[f"pearson/{name}"] = pearson(
            sums[f"product/{name}"], sums[f"given/{name}"], sums[f"true/{name}"], squares, n
        )
        if (rows := f"numbers/{name}") in sums:
            figures[f"spearman/{name}"] = spearman(sums[rows])
    return figures
