"""Texts that a model is to write."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field

from perceiver.config import UserError
from perceiver.storage import NonNegativeCount
from pipelines.features.base import BaseFeature, RngFactory, Shapes, ViewConfig
from pipelines.features.text import SEP, SPECIALS
from pipelines.transforms import BadSample


class AnswerFeature(BaseFeature):
    """One text per sample to be written by a model, empty or null where it is to write none.

    In a batch int64 (T,): its UTF-8 bytes + 6, SEP, padding, and `<name>_mask` bool (T,), True up to SEP; of an empty
    text both are zeros.
    """

    arrow: ClassVar[pa.DataType] = pa.string()
    kind: Literal["answer"] = "answer"
    longest: NonNegativeCount | None = Field(default=None, description="bytes of the longest one; null: not known")

    def plain(self) -> Self:
        """Return the feature without what is measured on the data."""
        return self.model_copy(update={"longest": None})

    def shapes(self, name: str, view: ViewConfig, classes: int) -> Shapes:
        """Return (T,) int64 and (T,) bool, T = data.answer_length."""
        if (self.longest or 0) >= view.answer_length:
            raise UserError(
                f"data.answer_length = {view.answer_length}, but '{name}' has texts of up to {self.longest} bytes:"
                f" set data.answer_length to at least {(self.longest or 0) + 1}"
            )
        return {name: ((view.answer_length,), np.int64), f"{name}_mask": ((view.answer_length,), np.bool_)}

    def decode(self, stored: Any, view: ViewConfig, classes: int) -> Any:
        """Return the text."""
        if not isinstance(stored, str | None):
            raise BadSample("invalid UTF-8")
        size = len((stored or "").encode())
        if size >= view.answer_length:
            raise BadSample(f"an answer of {size} bytes, wanted fewer than data.answer_length = {view.answer_length}")
        return stored or ""

    def show(self, name: str, decoded: Any, view: ViewConfig, training: bool, rng: RngFactory) -> Mapping[str, Any]:
        """Return ids and mask."""
        ids, raw = np.zeros(view.answer_length, np.int64), np.frombuffer(decoded.encode(), np.uint8)
        if raw.size:
            ids[: raw.size] = raw.astype(np.int64) + SPECIALS
            ids[raw.size] = SEP
        return {name: ids, f"{name}_mask": ids > 0}
