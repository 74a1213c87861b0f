"""Several columns of tables: the options `target` (numbers), `label` (classes) and `text` name them, with commas."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from perceiver.config import UserError
from perceiver.text_ids import joined
from pipelines.features import TargetFeature

LABEL = "label_"
"""Begins the name of a feature that is one of several labels."""


def label_columns(options: Mapping[str, str], there: Sequence[str], where: str) -> dict[str, str]:
    """Return the columns that the option `label` names with commas, by feature: `label_NAME`.

    Raises:
        UserError: a column does not exist, two get the same name, or one is named `label`.
    """
    columns = _columns("label", options, there, where)
    if "label" in (names := _plain_names("label", columns)):
        raise UserError(
            f"option label={options['label']}: the column {columns[names.index('label')]} cannot be"
            " one of several labels, since the feature label is a single one: rename it"
        )
    return {f"{LABEL}{name}": column for name, column in zip(names, columns, strict=True)}


def target_columns(options: Mapping[str, str], there: Sequence[str], where: str) -> list[str]:
    """Return the columns that the option `target` names; none without it.

    Raises:
        UserError: a column does not exist or is named twice.
    """
    return _columns("target", options, there, where)


def text_columns(options: Mapping[str, str], there: Sequence[str], where: str) -> list[str]:
    """Return the columns that the option `text` names with commas, such as those of pairs of sentences.

    Raises:
        UserError: a column does not exist or is named twice.
    """
    return _columns("text", options, there, where)


def texts_of(values: Iterable[Any]) -> str:
    """Return the texts of a row as one; raise `ValueError` with a reason for the quarantine if one is missing."""
    texts = [value.strip() if isinstance(value, str) else "" for value in values]
    if not all(texts):
        raise ValueError("no text")
    return joined(*texts)


def _columns(option: str, options: Mapping[str, str], there: Sequence[str], where: str) -> list[str]:
    wanted = [name for name in options.get(option, "").split(",") if name]
    for name in wanted:
        if name not in there:
            has = f"it has {', '.join(there)}"
            raise UserError(f"option {option}={options[option]}: {where} has no column {name}; {has}")
        if wanted.count(name) > 1:
            raise UserError(f"option {option}={options[option]}: column {name} is named twice")
    return wanted


def target_feature(columns: Sequence[str]) -> TargetFeature:
    """Return the feature of some columns; names of figures allow letters, digits and `_`, other characters become `_`.

    Raises:
        UserError: two columns get the same name.
    """
    return TargetFeature(names=tuple(_plain_names("target", columns)))


def _plain_names(option: str, columns: Sequence[str]) -> list[str]:
    names = [re.sub(r"\W+", "_", column).strip("_") or option for column in columns]
    if len(set(names)) < len(names):
        raise UserError(f"option {option}={','.join(columns)}: two columns are named {max(names, key=names.count)}")
    return names


def target_values(cells: Mapping[str, Any], columns: Sequence[str]) -> list[float]:
    """Return the numbers of a row; raise `ValueError` with a reason for the quarantine."""
    return [_number(cells.get(column), column) for column in columns]


def _number(value: Any, column: str) -> float:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"no target {column}")
    if isinstance(value, list | dict | bytes):
        raise ValueError(f"target {column} is a {type(value).__name__}, wanted a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"target {column} is not a number") from None
    if not math.isfinite(number) or abs(number) > 1e15:
        raise ValueError(f"target {column} is NaN, infinite or above 1e15")
    return number
