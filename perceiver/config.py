"""The base class of all configurations, the ranges of their numbers, and the error for invalid user input.

Every number of a configuration has a lower and an upper bound in its type, so that help and schema show them. The
bounds exclude what cannot work; they are generous otherwise. What exceeds this machine is refused by
`cluster.recipe.preflight`, which knows the whole recipe.
"""

import os
import typing
from collections.abc import Callable
from typing import Annotated, Any, ClassVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def shown(text: str, longest: int = 80) -> str:
    """Return text for a message: on one line, of printable characters, and the middle cut out if it is long."""
    if len(text) > longest:
        text = f"{text[: longest * 2 // 3]}...{text[-longest // 4 :]}"
    return "".join(character if character.isprintable() else " " for character in text)


PLAIN_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""Pattern of names of which folders are named, such as a run's."""


class UserError(Exception):
    """A mistake in the user's input.

    The message is one line: what was got, what was wanted, the key or file, and the fix. The command line prints it
    without a traceback and exits with status 2.

    Attributes:
        mask: masks the secrets in a message. `perceiver.tracking.redaction` sets it, which every function of
            `perceiver.api` imports; models alone meet no secrets.
    """

    mask: ClassVar[Callable[[str], str]] = staticmethod(str)

    def __init__(self, message: str) -> None:
        super().__init__(shown(type(self).mask(message), 1500))


def _scalars(annotation: Any) -> set[Any]:
    """Return the types in a type that are not containers; a literal is of the type of its values."""
    parts = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _scalars(parts[0])
    if origin is typing.Literal:
        return set(map(type, parts))
    if origin is dict:
        parts = parts[1:]
    return set().union(*map(_scalars, parts)) if parts else {annotation}


def _takes_numbers(annotation: Any, value: Any) -> bool:
    """Return whether a value of a type is a number or consists of numbers, and true and false are no values of it."""
    found = _scalars(annotation)
    sections = isinstance(value, dict | list | tuple) and any(
        isinstance(scalar, type) and issubclass(scalar, BaseModel) for scalar in found
    )
    return bool(found & {int, float}) and not found & {bool, Any} and not sections


def _boolean(value: Any) -> bool | None:
    """Return true or false if it is the value, or in a list or section of it; otherwise None."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return next((found for part in value if (found := _boolean(part)) is not None), None)
    return value if isinstance(value, bool) else None


class Config(BaseModel):
    """Base of all configuration classes: unknown keys are errors, instances do not change, defaults are checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    retired: ClassVar[tuple[str, ...]] = ()
    """Keys without a meaning in this version that recipes of earlier runs and exports contain; they are ignored."""

    @model_validator(mode="before")
    @classmethod
    def _check_given(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for key, value in given.items():
            numeric = key in cls.model_fields and _takes_numbers(cls.model_fields[key].annotation, value)
            if numeric and (found := _boolean(value)) is not None:
                raise ValueError(f"{key} {'=' if found is value else 'has'} {str(found).lower()}, wanted a number")
        return {key: value for key, value in given.items() if key not in cls.retired} if cls.retired else given


def _ordered(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError(f"{list(limits)}: wanted [low, high] with low <= high")
    return limits


Real = Annotated[float, Field(allow_inf_nan=False)]
"""A finite number; the bounds are in the field."""

Name = Annotated[str, Field(pattern=rf"^{PLAIN_NAME}$", max_length=100)]
"""The first part of a folder's name."""


NO_CHAINS = "chained URLs such as zip://a::s3://b are not supported, unpack or copy the files first"


def _parseable(url: str) -> str:
    if "::" in url and "[" not in url:
        raise ValueError(NO_CHAINS)
    try:
        if "://" in url:
            _ = urlsplit(url).port
    except ValueError:  # its message would quote a part of the URL, which may be a password
        raise ValueError("the host or the port of the URL cannot be parsed") from None
    return url


def expand_home(place: str) -> str:
    """Return a path with a leading `~` replaced by the home folder, as a shell does; a URL unchanged.

    A shell leaves `output=~/x` as it is. fsspec would expand it and pathlib would not, so that a run had two folders.
    """
    return os.path.expanduser(place) if place.startswith("~") else place  # noqa: PTH111  pathlib raises without a home


Location = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_parseable), AfterValidator(expand_home)]
"""A local path, in which a leading `~` is expanded, or a URL that fsspec knows."""

Seed = Annotated[int, Field(ge=0, le=(1 << 63) - 1)]
"""The seed of a random generator."""
Size = Annotated[int, Field(gt=0, le=1 << 24)]
"""Elements along an axis of a tensor: channels, latents, tokens, pixels, samples."""
Layers = Annotated[int, Field(gt=0, le=1000)]
"""Layers of a network, each of which is built."""
Bands = Annotated[int, Field(gt=0, le=4096)]
"""Frequencies of Fourier positions, per axis."""
Count = Annotated[int, Field(gt=0, le=1_000_000_000)]
"""A number of things of which there is at least one: steps, samples, rows."""
CountOrZero = Annotated[int, Field(ge=0, le=1_000_000_000)]
"""A number of things of which there may be none."""
Bytes = Annotated[int, Field(gt=0, le=1 << 50)]
"""An amount of memory or storage."""

Positive = Annotated[Real, Field(gt=0, le=1e9)]
"""A positive amount: seconds, pixels."""
Epochs = Annotated[Real, Field(ge=1e-6, le=1e9)]
"""Passes over the training data."""
Resource = Annotated[Real, Field(ge=0.001, le=1e15)]
"""An amount of a resource that Ray counts: CPUs, bytes of memory, custom ones."""
NonNegative = Annotated[Real, Field(ge=0, le=1e9)]
"""An amount that may be zero."""
Probability = Annotated[Real, Field(ge=0, le=1)]
"""A probability or share."""
Seconds = Annotated[Real, Field(ge=0, le=86_400)]
"""A pause of up to a day."""
Widening = Annotated[Real, Field(gt=0, le=1000)]
"""Inner width of an MLP over its width."""
Scale = Annotated[Real, Field(ge=1e-6, le=1e6)]
"""A factor or standard deviation; its reciprocal is finite in float32."""
Shift = Annotated[Real, Field(ge=-1e6, le=1e6)]
"""A mean or offset."""

Range = Annotated[tuple[NonNegative, NonNegative], AfterValidator(_ordered)]
"""[low, high] of a random number, which may be zero."""
_Factor = Annotated[Real, Field(ge=1e-3, le=1e3)]
Factors = Annotated[tuple[_Factor, _Factor], AfterValidator(_ordered)]
"""[low, high] of a random factor."""
_Share = Annotated[Real, Field(gt=0, le=1)]
Shares = Annotated[tuple[_Share, _Share], AfterValidator(_ordered)]
"""[low, high] of a random share."""
