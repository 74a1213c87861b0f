"""The search space: a dimension for each key of the recipe."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, field_validator, model_validator

from perceiver.config import Config, Count, Real, UserError

Values = dict[str, Any]
"""Values of one trial by dotted recipe key."""


class Draw(Protocol):
    """A source of values: a random generator, or an Optuna study."""

    def pick(self, key: str, values: Sequence[Any]) -> Any:
        """Return one of the values."""
        ...

    def real(self, key: str, low: float, high: float, *, log: bool = False, step: float | None = None) -> float:
        """Return a number of [low, high]; uniform in its logarithm with ``log``, a multiple of ``step`` above low."""
        ...

    def whole(self, key: str, low: int, high: int, *, log: bool = False, step: int = 1) -> int:
        """Return an integer of [low, high]."""
        ...


Bound = Annotated[Real, Field(ge=-1e12, le=1e12)]
WholeBound = Annotated[int, Field(ge=-(1 << 53), le=1 << 53)]


class _Dimension(Config):
    when: dict[str, Any] = Field(
        default={}, description="values (or lists of values) of other keys that this key requires"
    )

    @field_validator("when")
    @classmethod
    def _wanted(cls, when: dict[str, Any]) -> dict[str, list[Any]]:
        return {key: [as_number(v) for v in (w if isinstance(w, list) else [w])] for key, w in when.items()}


class Choice(_Dimension):
    """One of several values, which may be sections (`kind: choice`)."""

    kind: Literal["choice"]
    values: list[Any] = Field(min_length=1, description="the values")

    @field_validator("values")
    @classmethod
    def _numbers(cls, values: list[Any]) -> list[Any]:
        return [as_number(value) for value in values]

    def sample(self, key: str, draw: Draw) -> Any:
        """Return a value."""
        return draw.pick(key, self.values)

    def extremes(self) -> list[Any]:
        """Return all values, which represent the dimension in checks."""
        return self.values


class GridChoice(Choice):
    """Each of several values, combined with all other grids (`kind: grid`)."""

    kind: Literal["grid"]  # pyright: ignore[reportIncompatibleVariableOverride]


class Uniform(_Dimension):
    """A number in [low, high] (`kind: uniform`)."""

    kind: Literal["uniform"]
    low: Bound = Field(description="least value")
    high: Bound = Field(description="greatest value")

    @model_validator(mode="after")
    def _ordered(self) -> "Uniform":
        if self.low >= self.high:
            raise ValueError(f"low = {self.low:g} and high = {self.high:g}: wanted low < high")
        return self

    def sample(self, key: str, draw: Draw) -> Any:
        """Return a value."""
        return draw.real(key, self.low, self.high)

    def extremes(self) -> list[Any]:
        """Return the ends, which represent the range in checks."""
        return [self.low, self.high]

    def gives(self, value: Any) -> bool:
        """Return whether the value is in the range."""
        return isinstance(value, int | float) and self.low <= value <= self.high


class LogUniform(Uniform):
    """A positive number in [low, high], uniform in its logarithm (`kind: loguniform`)."""

    kind: Literal["loguniform"]  # pyright: ignore[reportIncompatibleVariableOverride]
    low: Real = Field(gt=0, le=1e12, description="least value")  # pyright: ignore[reportIncompatibleVariableOverride]

    def sample(self, key: str, draw: Draw) -> Any:
        """Return a value."""
        return draw.real(key, self.low, self.high, log=True)


class QUniform(Uniform):
    """A number in [low, high] in steps (`kind: quniform`)."""

    kind: Literal["quniform"]  # pyright: ignore[reportIncompatibleVariableOverride]
    step: Real = Field(ge=1e-9, le=1e12, description="step between values, from low")

    def sample(self, key: str, draw: Draw) -> Any:
        """Return a value."""
        return draw.real(key, self.low, self.high, step=self.step)


class Int(_Dimension):
    """A whole number in [low, high] (`kind: int`)."""

    kind: Literal["int"]
    low: WholeBound = Field(description="least value")
    high: WholeBound = Field(description="greatest value")
    step: Count = Field(default=1, description="step between values, from low")
    log: bool = Field(default=False, description="uniform in the logarithm")

    @model_validator(mode="after")
    def _ordered(self) -> "Int":
        if self.low >= self.high:
            raise ValueError(f"low = {self.low} and high = {self.high}: wanted low < high")
        if self.log and (self.low < 1 or self.step != 1):
            raise ValueError(f"log: true with low = {self.low} and step = {self.step}: wanted low >= 1 and no step")
        return self

    def sample(self, key: str, draw: Draw) -> Any:
        """Return a value."""
        return draw.whole(key, self.low, self.high, log=self.log, step=self.step)

    def extremes(self) -> list[Any]:
        """Return the ends, which represent the range in checks."""
        return [self.low, self.high - (self.high - self.low) % self.step]

    def gives(self, value: Any) -> bool:
        """Return whether the value can be drawn."""
        return value in range(self.low, self.high + 1, self.step)


Dimension = Annotated[Choice | GridChoice | Uniform | LogUniform | QUniform | Int, Field(discriminator="kind")]
Space = dict[str, Dimension]


def as_number(value: Any) -> Any:
    """Convert text such as '1e-3', a string in YAML, to a number, also in lists; return other values unchanged."""
    if isinstance(value, list):
        return [as_number(part) for part in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def flatten_space(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys of a space that may be written nested: a mapping with ``kind`` is a dimension."""
    for key, node in tree.items():
        if isinstance(node, Mapping) and "kind" not in node:
            yield from flatten_space(node, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", node


def ordered(space: Space) -> list[str]:
    """Return the keys so that each comes after those in its `when`; refuse a cycle."""
    graph = {
        key: [other for wanted in dimension.when for other in space if _within(wanted, other)]
        for key, dimension in space.items()
    }
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise UserError(
            f"space: the conditions of {' and '.join(dict.fromkeys(error.args[1]))} wait for each other"
        ) from None


def holds(when: Mapping[str, Any], values: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Return whether a condition is true for the values drawn so far, on top of the resolved base recipe."""
    return all(_value(key, values, base) in wanted for key, wanted in when.items())


def _value(key: str, values: Mapping[str, Any], base: Mapping[str, Any]) -> Any:
    """Return the value of a key: drawn, part of a drawn section, or the base recipe's."""
    for section in sorted((other for other in values if _within(key, other)), key=len, reverse=True):
        return part_of(values[section], section, key)
    return look_up(base, key)


def part_of(value: Any, section: str, key: str) -> Any:
    """Return the value of a dotted key, given that of a section: the key itself or one above it."""
    return value if key == section else look_up(value, key.removeprefix(f"{section}."))


def _within(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def impossible(space: Space, base: Mapping[str, Any]) -> str | None:
    """Return an error about the first condition that is never true on the resolved base recipe, or None."""
    for key, dimension in space.items():
        for other, wanted in dimension.when.items():
            if not possible(space, base, other, wanted):
                has = look_up(base, other)
                there = "has no such key" if has is None else f"has {has}"
                return (
                    f"space.{key}.when: {other} = {' or '.join(map(str, wanted))} is never true: the base recipe "
                    f"{there}, and the space has no such value; correct the value, or remove {key}"
                )
    return None


def possible(space: Space, base: Mapping[str, Any], key: str, wanted: Sequence[Any]) -> Values:
    """Return values with which a key has one of the wanted values, or {} if there are none.

    The base recipe's value takes precedence over values of the key, or of a section above it, in the space.
    """
    if look_up(base, key) in wanted:
        return {key: look_up(base, key)}
    for section in (other for other in space if _within(key, other)):
        dimension = space[section]
        if isinstance(dimension, Choice):
            fitting = [v for v in dimension.values if part_of(v, section, key) in wanted]
        else:
            fitting = [v for v in wanted if dimension.gives(v)]
        if fitting:
            return {section: fitting[0]}
    return {}


def fulfilling(space: Space, base: Mapping[str, Any], key: str) -> Values:
    """Return values that fulfil the condition of a key, and the conditions of these values."""
    found: Values = {}
    for other, wanted in space[key].when.items():
        for place, value in possible(space, base, other, wanted).items():
            if place in space:
                found |= fulfilling(space, base, place)
            found[place] = value
    return found


def sample(space: Space, base: Mapping[str, Any], draw: Draw) -> Values:
    """Draw one point of the space: a value for each key whose condition is true."""
    values: Values = {}
    for key in ordered(space):
        if holds(space[key].when, values, base):
            values[key] = space[key].sample(key, draw)
    return {key: values[key] for key in space if key in values}


def base_values(space: Space, base: Mapping[str, Any]) -> Values:
    """Return the base recipe's values of the keys of the space that it has."""
    found = {key: look_up(base, key) for key in space}
    return {key: value for key, value in found.items() if value is not None and holds(space[key].when, found, base)}


def look_up(tree: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key of a tree, None if there is none."""
    node: Any = tree
    for name in key.split("."):
        if not isinstance(node, Mapping) or name not in node:
            return None
        node = node[name]
    return node


def with_values(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a recipe's tree with the values of dotted keys set; refuse a key below a plain value."""
    changed = copy.deepcopy(dict(tree))
    for key, value in values.items():
        node: Any = changed
        *parents, leaf = key.split(".")
        for depth, name in enumerate(parents):
            if node.get(name) is None:
                node[name] = {}
            node = node[name]
            if not isinstance(node, dict):
                raise UserError(f"{key}: {'.'.join(parents[: depth + 1])} is a value of the recipe, not a section")
        node[leaf] = copy.deepcopy(value)
    return changed
