"""The check that the runs from which a late fusion starts read what its branches read."""

from collections.abc import Mapping
from typing import Any

from perceiver.config import Config, UserError
from perceiver.export.weights import open_weights
from perceiver.tracking.redaction import flatten

PART = "branches."


def check_branches(model: Any, places: Mapping[str, str]) -> None:
    """Refuse weights of a model with other inputs than the branch that starts from them.

    The shapes of weights do not show how the inputs were made, such as the hop of a spectrogram.

    Args:
        model: the recipe's model section.
        places: places of weights by the part of the model, see `train.init_from`.

    Raises:
        UserError: the message names the part, the place and the first key that differs.
    """
    for part, place in places.items():
        branch = branch_of(model, part)
        trained = None if branch is None else open_weights(place).model
        if branch is None or trained is None:  # weights without a config: their shapes are compared
            continue
        trained = branch_of(trained, part) or trained
        if found := other_inputs(branch, trained):
            key, ours, theirs = found
            raise UserError(
                f"train.init_from.{part}: {place} was trained with {key} = {theirs}, model.{part} has {ours}: use a "
                f"run with the inputs of the branch, or set model.{part}.inputs to those of the run"
            )


def branch_of(model: Any, part: str) -> Config | None:
    """Return the config of a branch by the dotted name of its module; None for other parts and models."""
    branches: Mapping[str, Config] = getattr(model, "branches", {})
    return branches.get(part.removeprefix(PART)) if part.startswith(PART) else None


def other_inputs(ours: Config, theirs: Config) -> tuple[str, Any, Any] | None:
    """Return the first key of the inputs of two models that differs, with both values; None if none does."""
    first, second = (flatten({"inputs": one.model_dump(mode="json").get("inputs", {})}) for one in (ours, theirs))
    for key in sorted(first.keys() | second.keys()):
        if first.get(key) != second.get(key):
            return key, first.get(key), second.get(key)
    return None
