"""Class labels: one per sample, or any number."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipelines.features.base import BaseFeature, RngFactory, Shapes, ViewConfig
from pipelines.transforms import BadSample


class LabelFeature(BaseFeature):
    """One class index per sample; int64 () in a batch.

    One of several labels of a sample has classes of its own, and is -1 where it is unknown.
    """

    arrow: ClassVar[pa.DataType] = pa.int64()
    kind: Literal["label"] = "label"
    classes: tuple[str, ...] = Field(default=(), description="names of its classes; empty: those of the data set")

    def shapes(self, name: str, view: ViewConfig, classes: int) -> Shapes:
        """Return () int64."""
        return {name: ((), np.int64)}

    def decode(self, stored: Any, view: ViewConfig, classes: int) -> Any:
        """Return the class index."""
        if self.classes and stored is None:
            return -1
        return _checked(stored, len(self.classes) or classes)

    def show(self, name: str, decoded: Any, view: ViewConfig, training: bool, rng: RngFactory) -> Mapping[str, Any]:
        """Return the class index."""
        return {name: decoded}


class LabelsFeature(BaseFeature):
    """Any number of class indices per sample; float32 (classes,) of zeros and ones in a batch."""

    arrow: ClassVar[pa.DataType] = pa.list_(pa.int64())
    kind: Literal["labels"] = "labels"

    def shapes(self, name: str, view: ViewConfig, classes: int) -> Shapes:
        """Return (classes,) float32."""
        return {name: ((classes,), np.float32)}

    def decode(self, stored: Any, view: ViewConfig, classes: int) -> Any:
        """Return the indices as a vector of zeros and ones."""
        vector = np.zeros(classes, np.float32)
        vector[[_checked(label, classes) for label in stored or []]] = 1
        return vector

    def show(self, name: str, decoded: Any, view: ViewConfig, training: bool, rng: RngFactory) -> Mapping[str, Any]:
        """Return the vector."""
        return {name: decoded}


def _checked(label: Any, classes: int) -> int:
    if label is None or not 0 <= label < classes:
        raise BadSample(f"label {label} is not one of {classes} classes")
    return label
