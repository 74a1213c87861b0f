"""Texts, given to the model as UTF-8 bytes."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from perceiver.text_ids import CLS, SEP, SPECIALS, cut_parts
from pipelines.features.base import BaseFeature, RngFactory, Shapes, ViewConfig
from pipelines.transforms import BadSample


class TextFeature(BaseFeature):
    """One text per sample; in a batch int64 (M,) ids and, as `<name>_mask`, bool (M,), True where there is a token.

    Several texts, such as a pair of sentences, are stored as one (`perceiver.text_ids.joined`).
    """

    arrow: ClassVar[pa.DataType] = pa.string()
    bounded: ClassVar[bool] = True
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

    def exceeds(self, decoded: Any, view: ViewConfig) -> bool:
        """Return whether the text is cut."""
        return len(decoded.encode()) > view.text_length - 2  # BETWEEN takes a byte here and an id there

    def excess(self, view: ViewConfig) -> str:
        """See `BaseFeature`."""
        return (
            f"longer than data.text_length = {view.text_length:,} tokens (bytes and 2) and cut there: raise it, and "
            "model.inputs.length with it"
        )

    def show(self, name: str, decoded: Any, view: ViewConfig, training: bool, rng: RngFactory) -> Mapping[str, Any]:
        """Return ids and mask. The task masks words for masked language modelling, on the device."""
        ids, count = byte_tokens(decoded, view.text_length)
        return {name: ids, f"{name}_mask": np.arange(view.text_length) < count}


def byte_tokens(text: str, length: int) -> tuple[NDArray[np.int64], int]:
    """Return the ids (length,) of a text, see `perceiver.text_ids.byte_ids`, with padding.

    The second value is the number of ids that are not padding.
    """
    ids, end = np.zeros(length, np.int64), 1
    ids[0] = CLS
    for part in cut_parts(text, length):
        ids[end : end + len(part)] = np.frombuffer(part, np.uint8).astype(np.int64) + SPECIALS
        ids[end + len(part)] = SEP
        end += len(part) + 1
    return ids, end
