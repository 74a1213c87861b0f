"""Texts, given to the model as UTF-8 bytes."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from pipelines.features.base import BaseFeature, RngFactory, Shapes, ViewConfig
from pipelines.transforms import BadSample
from pipelines.transforms.byte_ids import byte_tokens


class TextFeature(BaseFeature):
    """One text per sample; in a batch int64 (M,) ids and, as `<name>_mask`, bool (M,), True where there is a token."""

    arrow: ClassVar[pa.DataType] = pa.string()
    kind: Literal["text"] = "text"

    def shapes(self, name: str, view: ViewConfig, classes: int) -> Shapes:
        """Return (M,) int64 and (M,) bool, M = data.text_length."""
        return {name: ((view.text_length,), np.int64), f"{name}_mask": ((view.text_length,), np.bool_)}

    def decode(self, stored: Any, view: ViewConfig, classes: int) -> Any:
        """Return the text."""
        if not stored:
            raise BadSample("empty text")
        if not isinstance(stored, str):
            raise BadSample("invalid UTF-8")
        return stored

    def show(self, name: str, decoded: Any, view: ViewConfig, training: bool, rng: RngFactory) -> Mapping[str, Any]:
        """Return ids and mask. The task masks words for masked language modelling, on the device."""
        ids, count = byte_tokens(decoded, view.text_length)
        return {name: ids, f"{name}_mask": np.arange(view.text_length) < count}
