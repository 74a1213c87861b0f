"""Marks of samples."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from pipelines.features.base import BaseFeature, RngFactory, Shapes, ViewConfig
from pipelines.transforms import BadSample


class FlagFeature(BaseFeature):
    """Whether a sample is of some kind, such as one that training never shows; bool () in a batch."""

    arrow: ClassVar[pa.DataType] = pa.bool_()
    kind: Literal["flag"] = "flag"

    def shapes(self, name: str, view: ViewConfig, classes: int) -> Shapes:
        """Return () bool."""
        return {name: ((), np.bool_)}

    def decode(self, stored: Any, view: ViewConfig, classes: int) -> Any:
        """Return the mark."""
        if not isinstance(stored, bool):
            raise BadSample(f"the mark {stored!r}, wanted true or false")
        return stored

    def show(self, name: str, decoded: Any, view: ViewConfig, training: bool, rng: RngFactory) -> Mapping[str, Any]:
        """Return the mark."""
        return {name: decoded}
