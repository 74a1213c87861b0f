"""Requests to a served model: texts, encoded images and arrays, as clients have them, become the model's raw arrays."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from perceiver.modalities.text import byte_ids

Arrays = dict[str, NDArray[Any]]


class Requests:
    """Turns requests into arrays by name, samples along the first axis.

    `text` takes texts, for models of bytes; `image` takes encoded images (JPEG, PNG, ...) as base64 text, with or
    without `data:image/png;base64,` before it, or as bytes. They are shown as in training's evaluations. Arrays are
    checked: names, shapes, and numbers of the input's type.

    Args:
        model: the model.
        view: `eval_crop` and `max_pixels` of the recipe's `data` section.
    """

    def __init__(self, model: nn.Module, view: Mapping[str, Any]) -> None:
        self.like: Arrays = {name: like.numpy() for name, like in cast(Any, model).example(1, "cpu").items()}
        self.optional: Sequence[str] = tuple(getattr(model, "optional_keys", ()))
        self.view = view

    def __call__(self, inputs: Any) -> Arrays:
        """Return the arrays of a request.

        Raises:
            ValueError: an input is missing or unknown, of another shape or type, or cannot be decoded.
        """
        if not isinstance(inputs, Mapping) or not self.like.keys() & inputs.keys():
            raise ValueError(f"got {_described(inputs)}; wanted samples by name: {', '.join(self.like)}")
        found: Arrays = {}
        for name, values in inputs.items():
            if name == "text" and is_text(values):
                found["text"], found["text_mask"] = self._ids(np.ravel(values).tolist())
            elif name == "image" and is_text(values):
                found["image"] = np.stack(
                    [self._pixels(number, value) for number, value in enumerate(np.ravel(values))]
                )
            else:
                found[name] = self._array(name, values)
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
        return evaluation_view(picture, (height, width), self.view.get("eval_crop", 1.0))

    def _array(self, name: str, values: Any) -> NDArray[Any]:
        found = np.asarray(values)
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
        elif kind != np.bool_ and not np.isfinite(found).all():
            raise ValueError(f"{name}: got NaN or infinite numbers")
        return found.astype(kind)


def is_text(values: Any) -> bool:
    """Return whether the values of an input are texts or bytes."""
    array = np.asarray(values)
    if array.dtype == object:
        return array.size > 0 and all(isinstance(value, str | bytes) for value in array.ravel())
    return array.dtype.kind in "US"


def _described(inputs: Any) -> str:
    return f"the inputs {', '.join(map(str, inputs))[:80]}" if isinstance(inputs, Mapping) else type(inputs).__name__
