"""`mean: data` and `std: data` of a recipe: the numbers that `perceiver prepare` has measured."""

from typing import Any

from cluster.recipe.config import Recipe, build_recipe
from cluster.recipe.inputs import input_sections
from perceiver.config import UserError
from perceiver.modalities.mel import FRONT_END, MelConfig
from pipelines.shards.manifest import Manifest
from pipelines.shards.statistics import Spectrogram, Statistics

FIELDS = ("mean", "std")
SCALARS = ("mel", "audio")
"""Kinds of inputs with one mean for all values."""


def with_statistics(recipe: Recipe, manifest: Manifest | None) -> Recipe:
    """Return a recipe with numbers in place of `data`, so that what is recorded of a run does not need the data.

    Args:
        recipe: the recipe.
        manifest: of its data; None stands for zeros and ones, where only sizes matter.

    Raises:
        UserError: the data have no such statistics; the message names the command that measures them.
    """
    sections = [(key, inputs) for key, inputs in input_sections(recipe.model) if _fields(inputs)]
    if not sections:
        return recipe
    tree: Any = recipe.model_dump(mode="json")
    for key, inputs in sections:
        node = tree
        for part in key.split("."):
            node = node[part]
        found = None if manifest is None else _statistics(key, inputs, recipe.data.url, manifest)
        for field in _fields(inputs):
            channels = 1 if inputs.kind in SCALARS else inputs.channels
            values: list[float] = list(getattr(found, field, ()))
            if len(values) != channels:  # no data, or other channels, which `check_inputs` refuses
                values = [float(field == "std")] * channels
            node[field] = values[0] if inputs.kind in SCALARS else values
    return build_recipe(tree, source=f"statistics of {recipe.data.url}")


def _fields(inputs: Any) -> list[str]:
    return [field for field in FIELDS if getattr(inputs, field, None) == "data"]


def _statistics(key: str, inputs: Any, url: str, manifest: Manifest) -> Statistics:
    """Return the statistics of the inputs of a section."""
    field = _fields(inputs)[0]
    again = f"give the command `perceiver prepare ... {url}` that wrote it again, it adds them"
    if inputs.kind != "mel":
        if inputs.kind not in manifest.statistics:
            raise UserError(
                f"{key}.{field} = data, but {url} has no statistics of '{inputs.kind}': {again}, or set numbers"
            )
        return manifest.statistics[inputs.kind]
    other = [name for name in FRONT_END if getattr(inputs, name) != getattr(MelConfig(), name)]
    if other:
        raise UserError(
            f"{key}.{field} = data with {key}.{other[0]} = {getattr(inputs, other[0])}, but spectrograms are"
            f" measured with {getattr(MelConfig(), other[0])}: set {key}.mean and {key}.std to numbers"
        )
    wanted = Spectrogram(**{name: getattr(inputs, name) for name in Spectrogram.model_fields})
    for one in manifest.spectrograms:
        if one.spectrogram == wanted:
            return one
    raise UserError(
        f"{key}.{field} = data, but {url} has no statistics of this spectrogram: {again} with "
        f"--spectrogram {wanted.option()}"
    )
