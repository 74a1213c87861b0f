"""Numbers to predict: one or several per sample."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from perceiver.config import Real
from pipelines.features.base import BaseFeature, RngFactory, Shapes, ViewConfig
from pipelines.transforms import BadSample

_Name = Annotated[str, Field(pattern=r"^\w+$", max_length=200)]
_Mean = Annotated[Real, Field(ge=-1e15, le=1e15)]
_Deviation = Annotated[Real, Field(ge=1e-15, le=1e15)]


class TargetFeature(BaseFeature):
    """One or several numbers per sample, in the units of the data; float32 (names,) in a batch.

    Mean and standard deviation are those of the split `train`; `prepare` computes them.
    """

    arrow: ClassVar[pa.DataType] = pa.list_(pa.float64())
    kind: Literal["target"] = "target"
    names: tuple[_Name, ...] = Field(min_length=1, description="name of each number, of letters, digits and _")
    mean: tuple[_Mean, ...] = Field(default=(), description="mean of each over the training split; empty: unknown")
    std: tuple[_Deviation, ...] = Field(default=(), description="its standard deviation; empty: unknown")

    @model_validator(mode="after")
    def _as_many_of_each(self) -> Self:
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"names {', '.join(self.names)}: wanted different ones")
        if {len(self.mean), len(self.std)} not in ({0}, {len(self.names)}):
            raise ValueError(
                f"{len(self.mean)} means and {len(self.std)} deviations: wanted {len(self.names)} or none of both"
            )
        return self

    def plain(self) -> Self:
        """Return the feature without what is measured on the data."""
        return self.model_copy(update={"mean": (), "std": ()})

    def shapes(self, name: str, view: ViewConfig, classes: int) -> Shapes:
        """Return (names,) float32."""
        return {name: ((len(self.names),), np.float32)}

    def decode(self, stored: Any, view: ViewConfig, classes: int) -> Any:
        """Return the numbers."""
        values = stored or []
        if len(values) != len(self.names):
            raise BadSample(f"{len(values)} targets, wanted {len(self.names)}")
        for name, value in zip(self.names, values, strict=True):
            if value is None or not math.isfinite(value):
                raise BadSample(f"target {name} is {'missing' if value is None else 'NaN or infinite'}")
        return np.asarray(values, np.float32)

    def show(self, name: str, decoded: Any, view: ViewConfig, training: bool, rng: RngFactory) -> Mapping[str, Any]:
        """Return the numbers."""
        return {name: decoded}
