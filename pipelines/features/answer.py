"""Texts that a model is to write, and those that are right for a sample."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from perceiver.config import Count, UserError
from perceiver.storage import NonNegativeCount
from perceiver.text_ids import SEP, SPECIALS
from pipelines.features.base import BaseFeature, RngFactory, Shapes, ViewConfig
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
            raise BadSample(_too_long(size, view))
        return stored or ""

    def show(self, name: str, decoded: Any, view: ViewConfig, training: bool, rng: RngFactory) -> Mapping[str, Any]:
        """Return ids and mask."""
        ids = _ids(decoded, view.answer_length)
        return {name: ids, f"{name}_mask": ids > 0}


class AnswersFeature(BaseFeature):
    """Several right texts of a sample for its evaluation, such as captions, or the answers of ten people.

    Empty or null where there are none. In a batch int64 (R, T), R = `most`: the ids of `AnswerFeature` for each text;
    then rows of zeros.
    """

    arrow: ClassVar[pa.DataType] = pa.list_(pa.string())
    kind: Literal["answers"] = "answers"
    most: Count = Field(default=10, description="most texts of a sample; more are a bad sample")

    def shapes(self, name: str, view: ViewConfig, classes: int) -> Shapes:
        """Return (R, T) int64, T = data.answer_length."""
        return {name: ((self.most, view.answer_length), np.int64)}

    def decode(self, stored: Any, view: ViewConfig, classes: int) -> Any:
        """Return the texts."""
        texts = list(stored) if stored is not None else []
        if len(texts) > self.most:
            raise BadSample(f"{len(texts)} answers, wanted up to {self.most}")
        for text in texts:
            if not isinstance(text, str) or not text:
                raise BadSample("an answer that is empty, null or invalid UTF-8")
            if (size := len(text.encode())) >= view.answer_length:
                raise BadSample(_too_long(size, view))
        return texts

    def show(self, name: str, decoded: Any, view: ViewConfig, training: bool, rng: RngFactory) -> Mapping[str, Any]:
        """Return the ids."""
        ids = np.zeros((self.most, view.answer_length), np.int64)
        for row, text in zip(ids, decoded, strict=False):
            row[:] = _ids(text, view.answer_length)
        return {name: ids}


def _too_long(size: int, view: ViewConfig) -> str:
    return f"an answer of {size} bytes, wanted fewer than data.answer_length = {view.answer_length}"


def _ids(text: str, length: int) -> NDArray[np.int64]:
    """Return bytes + 6, SEP and padding; zeros for an empty text."""
    ids, raw = np.zeros(length, np.int64), np.frombuffer(text.encode(), np.uint8)
    if raw.size:
        ids[: raw.size] = raw.astype(np.int64) + SPECIALS
        ids[raw.size] = SEP
    return ids
