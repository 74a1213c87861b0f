"""Numbers: time series, and the rows of tables."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from perceiver.config import Size, UserError
from perceiver.storage import PrintableName
from pipelines.features.base import BaseFeature, RngFactory, Shapes, ViewConfig
from pipelines.transforms import BadSample
from pipelines.transforms.series import decode_series, shown_steps


class SeriesFeature(BaseFeature):
    """One series of numbers per sample, stored as little-endian float32, step by step.

    In a batch float32 (L, channels), and where lengths differ bool `<name>_mask` (L,), True where there is a step. Bad
    samples: no steps, an incomplete one, NaN or infinity.
    """

    arrow: ClassVar[pa.DataType] = pa.binary()
    bounded: ClassVar[bool] = True
    kind: Literal["series"] = "series"
    channels: Size = Field(default=1, description="numbers of a step")
    length: Size | None = Field(default=None, description="steps of all series; null if they differ")
    names: tuple[PrintableName, ...] = Field(default=(), description="of the channels, if they are known")

    def shapes(self, name: str, view: ViewConfig, classes: int) -> Shapes:
        """Return (L, channels) float32, and (L,) bool unless each of the L steps always exists."""
        length = self._length(view)
        if length is None:
            raise UserError(f"the series of feature '{name}' differ in length: set data.series.length, for example 128")
        shapes: Shapes = {name: ((length, self.channels), np.float32)}
        return shapes | ({f"{name}_mask": ((length,), np.bool_)} if self._masked(length) else {})

    def decoded_bytes(self) -> int:
        """Return the size of the numbers, if all series have the same length."""
        return 4 * self.channels * (self.length or 0)

    def normalised(self, name: str) -> dict[str, int]:
        """Return the channels."""
        return {name: self.channels}

    def values(self, name: str, stored: Any) -> Mapping[str, NDArray[np.floating]]:
        """Return all numbers, (length, channels)."""
        return {name: decode_series(stored or b"", self.channels)}

    def decode(self, stored: Any, view: ViewConfig, classes: int) -> Any:
        """Return all steps, (length, channels)."""
        steps = decode_series(stored or b"", self.channels)
        if self.length is not None and len(steps) != self.length:
            raise BadSample(f"{len(steps)} steps, wanted {self.length}")
        return steps

    def exceeds(self, decoded: Any, view: ViewConfig) -> bool:
        """Return whether the series is cut."""
        return len(decoded) > (self._length(view) or len(decoded))

    def excess(self, view: ViewConfig) -> str:
        """See `BaseFeature`."""
        return (
            f"longer than data.series.length = {self._length(view):,} steps, of which a random part is shown in "
            "training and the middle in an evaluation: raise it, and model.inputs.length with it"
        )

    def show(self, name: str, decoded: Any, view: ViewConfig, training: bool, rng: RngFactory) -> Mapping[str, Any]:
        """Return the steps that are shown, and the mask where there is one."""
        length = self._length(view) or len(decoded)
        steps = shown_steps(decoded, length, rng() if training and len(decoded) > length else None)
        return {name: steps} | ({f"{name}_mask": np.arange(length) < len(decoded)} if self._masked(length) else {})

    def _length(self, view: ViewConfig) -> int | None:
        return view.series.length or self.length

    def _masked(self, length: int) -> bool:
        return self.length is None or length > self.length
