"""Requests to a served model: texts, encoded images and arrays, as clients have them, become the model's raw arrays."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from perceiver.modalities.text import BYTE_VOCABULARY
from perceiver.text_ids import byte_ids

Arrays = dict[str, NDArray[Any]]


class Requests:
    """Turns requests into arrays by name, samples along the first axis.

    `text` takes texts, for models of bytes; `image` takes encoded images (JPEG, PNG, ...) as base64 text, with or
    without `data:image/png;base64,` before it, or as bytes. They are shown as in training's evaluations. Arrays are
    checked: names, shapes, and numbers of the input's type.

    Args:
        model: the model.
        view: `eval_crop`, `stretch` and `max_pixels` of the recipe's `data` section.
    """

    def __init__(self, model: nn.Module, view: Mapping[str, Any]) -> None:
        self.like: Arrays = {name: like.numpy() for name, like in cast(Any, model).example(1, "cpu").items()}
        self.optional: Sequence[str] = tuple(getattr(model, "optional_keys", ()))
        tables = [getattr(module, "tokens", None) for module in model.modules()]
        self.vocabulary = min((table.num_embeddings for table in tables if isinstance(table, nn.Embedding)), default=0)
        self.view = view

    def samples(self, inputs: Any) -> dict[str, Any]:
        """Check a whole request; return its inputs by name: texts and encoded images as lists, others as arrays.

        Raises:
            ValueError: an input is missing or unknown, a single value, mixes texts with others, or is of another shape
                or type; or there are no samples, or the inputs differ in number.
        """
        if not isinstance(inputs, Mapping) or not self.like.keys() & inputs.keys():
            raise ValueError(f"got {_described(inputs)}; wanted samples by name: {', '.join(self.like)}")
        found: dict[str, Any] = {}
        for name, values in inputs.items():
            texts = texts_in(values)
            if texts is None and _has_text(values):  # NumPy would make all of them as wide as the longest text
                raise ValueError(f"{name}: got texts among other values")
            found[name] = (
                texts if texts and name in self.like and name in ("text", "image") else self._array(name, values)
            )
        if missing := [name for name in self.like if name not in found and name not in self.optional]:
            raise ValueError(f"got {_described(inputs)} without {', '.join(missing)}")
        counts = {name: len(values) for name, values in found.items()}
        if set(counts.values()) == {0} or len(set(counts.values())) != 1:
            raise ValueError(f"got {counts} samples by input; wanted at least one, and the same number in each")
        ids = found.get("text")
        if isinstance(ids, list) and self.vocabulary and self.vocabulary < BYTE_VOCABULARY:
            raise ValueError(
                f"text: got texts; wanted ids of 0 to {self.vocabulary - 1}: the model is not one of bytes"
            )
        if isinstance(ids, np.ndarray) and self.vocabulary and not 0 <= ids.min() <= ids.max() < self.vocabulary:
            raise ValueError(f"text: got ids of {ids.min()} to {ids.max()}; wanted ids of 0 to {self.vocabulary - 1}")
        return found

    def __call__(self, samples: Mapping[str, Any], first: int = 0) -> Arrays:
        """Return the arrays of consecutive samples: texts become ids, encoded images pixels.

        Args:
            samples: what `samples` returned, or the same part of each of its inputs.
            first: number of the first one, for errors.

        Raises:
            ValueError: an image cannot be decoded.
        """
        found: Arrays = {}
        for name, values in samples.items():
            if not isinstance(values, list):
                found[name] = values
            elif name == "text":
                found["text"], found["text_mask"] = self._ids(as_text(values))
            else:
                found["image"] = np.stack([self._pixels(number, value) for number, value in enumerate(values, first)])
        return found

    def _ids(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
        length = self.like["text"].shape[1]
        pairs = [byte_ids(text, length) for text in texts]
        ids = np.zeros((len(pairs), length), np.int64)
        for row, found in zip(ids, pairs, strict=True):
            row[: len(found)] = found
        return ids, np.arange(length) < np.array([[len(found)] for found in pairs])

    def _pixels(self, number: int, value: str | bytes) -> NDArray[Any]:
        from pipelines.transforms import BadSample
        from pipelines.transforms.decode import MAX_PIXELS, decode_image
        from pipelines.transforms.image import evaluation_view

        channels, height, width = self.like["image"].shape[1:]
        try:
            encoded = (
                value if isinstance(value, bytes) else base64.b64decode(str(value).partition("base64,")[2] or value)
            )
            picture = decode_image(encoded, channels, self.view.get("max_pixels", MAX_PIXELS))
        except (BadSample, binascii.Error, ValueError) as error:
            raise ValueError(f"image {number} cannot be decoded ({error}); wanted a JPEG or PNG in base64") from None
        crop, stretch = self.view.get("eval_crop", 1.0), self.view.get("stretch", False)
        return evaluation_view(picture, (height, width), crop, stretch=stretch)

    def _array(self, name: str, values: Any) -> NDArray[Any]:
        try:
            found = np.asarray(values)
        except ValueError:  # NumPy does not name the input
            raise ValueError(f"{name}: got samples of different shapes") from None
        if found.ndim == 0:
            raise ValueError(f"{name}: got a single value; wanted samples")
        like = self.like.get(name)
        if like is None and name in self.optional:
            like = np.zeros(self.like[name.removesuffix("_mask")].shape, np.bool_)
        if like is None:
            raise ValueError(f"{name}: unknown input; wanted {', '.join([*self.like, *self.optional])}")
        if found.shape[1:] != like.shape[1:]:
            raise ValueError(f"{name}: got the shape {found.shape}; wanted {('samples', *like.shape[1:])}")
        kind = like.dtype
        if np.issubdtype(kind, np.integer):
            limits = np.iinfo(cast(Any, kind))
            whole = np.issubdtype(found.dtype, np.integer) or not found.size
            if not whole or (found.size and not limits.min <= found.min() <= found.max() <= limits.max):
                raise ValueError(
                    f"{name}: got {found.dtype}; wanted {kind}: whole numbers of {limits.min} to {limits.max}"
                    + (", pixels that are not divided by 255" if kind == np.uint8 else "")
                )
        elif not np.issubdtype(found.dtype, np.number) and found.dtype != np.bool_:
            raise ValueError(f"{name}: got {found.dtype}; wanted {kind}")
        with np.errstate(over="ignore"):  # a number that is too large becomes infinite
            cast_to = found.astype(kind)
        if not np.isfinite(cast_to).all():
            raise ValueError(f"{name}: got NaN or infinite numbers, or too large ones for {kind}")
        return cast_to


def texts_in(values: Any) -> list[str | bytes] | None:
    """Return the texts or bytes of an input in their order; None if it has none, or other values."""
    if isinstance(values, str | bytes):
        return [values]
    if not isinstance(values, list | tuple):  # a list would become an array as wide as its longest text
        array = np.asarray(values)
        if array.ndim == 0 or array.dtype.kind not in "USO":
            return None
        values = array.ravel().tolist()
    found: list[str | bytes] = []
    for value in values:
        part = texts_in(value)
        if part is None:
            return None
        found += part
    return found or None


def _has_text(values: Any) -> bool:
    if not isinstance(values, list | tuple):
        return False
    kinds = set(map(type, values))
    return not kinds.isdisjoint((str, bytes)) or not kinds.isdisjoint((list, tuple)) and any(map(_has_text, values))


def as_text(values: Sequence[str | bytes]) -> list[str]:
    """Return texts, those that are bytes decoded as UTF-8; what is not UTF-8 becomes U+FFFD."""
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values]


def _described(inputs: Any) -> str:
    return f"the inputs {', '.join(map(str, inputs))[:80]}" if isinstance(inputs, Mapping) else type(inputs).__name__
