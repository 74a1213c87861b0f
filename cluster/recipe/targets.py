"""The checks that the data have the targets of the task, and that the model has the outputs that it reads."""

from collections.abc import Mapping
from typing import Any

from cluster.recipe.config import Recipe, kind_of
from perceiver.config import UserError
from pipelines.shards.manifest import Manifest

TARGETS = {"classification": "label", "tagging": "labels"}
"""Kind of the feature ``label`` that a task needs."""
DECODERS = {
    "masked_language": "tokens",
    "autoencoding": "multimodal",
    "flow": "flow",
    "multitask": "multitask",
}
"""The decoder whose outputs a task reads; the other tasks read those of a classifier."""
CLASSIFIER = "class"
"""The decoder of a classifier; models without a decoder are classifiers."""


def check_targets(recipe: Recipe, manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a task whose targets are not in the data, or whose outputs the model does not have.

    Args:
        recipe: the recipe.
        manifest: of the data.
        shapes: shape of one sample by batch key.
    """
    _check_label(recipe, manifest)
    for needed, shape in _needed_keys(recipe.task).items():
        if needed not in shapes or shape not in (None, shapes[needed]):
            raise UserError(
                f"task.kind = {kind_of(recipe.task)!r} needs {needed!r}"
                + (" with one class per sample" if shape is not None else "")
                + f", but {recipe.data.url} has the features {', '.join(manifest.features)}: set data.url to data with "
                f"{needed!r}, or task to a task that the data have the targets of"
            )
    _check_decoder(recipe)


def _needed_keys(task: Any) -> dict[str, tuple[int, ...] | None]:
    """Return the batch keys of a task's targets with the shape of one sample's; None: any shape."""
    match kind_of(task):
        case "flow":
            return {"flow": None}
        case "masked_language":
            return {"text": None}
        case "multitask":
            return {f"label_{name}": () for name in task.tasks}
        case "autoencoding":
            return {name: () if name == "label" else None for name, weight in task.weights.items() if weight}
        case _:
            return {}  # see `_check_label`


def _check_decoder(recipe: Recipe) -> None:
    """Refuse a model whose outputs are not those that the task reads."""
    section: Any = recipe.task
    task, decoder = kind_of(section), getattr(recipe.model, "decoder", None)
    wanted, found = DECODERS.get(task, CLASSIFIER), kind_of(decoder) or CLASSIFIER
    if found != wanted:
        has = (
            f"model.decoder.kind = {found!r}" if decoder else f"model.kind = {kind_of(recipe.model)!r} is a classifier"
        )
        fits = next((name for name, kind in DECODERS.items() if kind == found), "classification")
        fix = f"set model.kind to perceiver_io and model.decoder.kind to {wanted}" if wanted != CLASSIFIER else ""
        raise UserError(
            f"task.kind = {task!r} reads the outputs of a decoder of kind {wanted!r}, but {has}: "
            + " or ".join(filter(None, (fix, f"set task.kind to {fits}")))
        )
    missing = set(section.tasks) - set(decoder.tasks) if task == "multitask" and decoder else ()
    if missing:
        raise UserError(
            f"task.tasks has {', '.join(sorted(missing))}, which model.decoder.tasks has not: give it the number of "
            "classes there"
        )


def _check_label(recipe: Recipe, manifest: Manifest) -> None:
    """Refuse a task whose targets are not in the data."""
    wanted = TARGETS.get(kind_of(recipe.task))
    feature = manifest.features.get("label")
    if wanted and kind_of(feature) != wanted:
        has = f"the kind {kind_of(feature)!r}" if feature else "no feature 'label'"
        fits = next((task for task, kind in TARGETS.items() if feature and kind == kind_of(feature)), None)
        raise UserError(
            f"task.kind = {kind_of(recipe.task)!r} needs a feature 'label' of the kind {wanted!r}, "
            f"{recipe.data.url} has {has}: " + (f"set task.kind={fits}" if fits else "prepare the data with labels")
        )
