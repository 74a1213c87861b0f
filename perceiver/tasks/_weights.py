"""Weights of classes in the loss."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from perceiver.config import Real, UserError

MOST = 1e6
_Weight = Annotated[Real, Field(ge=0, le=MOST)]
ClassWeights = Literal["balanced"] | tuple[_Weight, ...] | None
"""`balanced`, which a run replaces by numbers from its data, or one number per class."""
WEIGHTS: Any = Field(default=None, description="Weight of each class in the loss: numbers, or `balanced` by frequency.")


def balanced(counts: Sequence[int]) -> tuple[float, ...]:
    """Return the weights with which all classes count alike: samples / (classes * samples of the class).

    A class without samples has the weight 1, and is not among those that count. No weight is above `MOST`.
    """
    there = sum(count > 0 for count in counts)
    return tuple(min(sum(counts) / (there * count), MOST) if count else 1.0 for count in counts)


def balanced_positives(counts: Sequence[int], samples: int) -> tuple[float, ...]:
    """Return the weight of each class's positives with which they count as its negatives do; 1 without positives."""
    return tuple(min((samples - count) / count, MOST) if 0 < count < samples else 1.0 for count in counts)


def weight_tensor(weights: ClassWeights, classes: int) -> Tensor | None:
    """Return the weights as a tensor (classes,), None without weights.

    Raises:
        UserError: `balanced` was not replaced by numbers, or their number is not that of the classes.
    """
    if weights is None:
        return None
    if weights == "balanced":
        raise UserError("task.class_weights: got balanced without the data's counts; wanted a number for each class")
    if len(weights) != classes:
        raise UserError(f"task.class_weights has {len(weights)} numbers, the data have {classes} classes: give as many")
    return torch.tensor(weights, dtype=torch.float32)
