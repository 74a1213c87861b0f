"""The task of a drafted recipe, by the targets that the data have."""

from dataclasses import dataclass, field
from typing import Any

from cluster.recipe.config import kind_of
from perceiver.config import UserError
from perceiver.tasks import label_key
from pipelines.shards.manifest import Manifest


@dataclass(frozen=True)
class Goal:
    """What the model predicts.

    Attributes:
        facts: the task in words.
        task: the section `task`.
        decoder: the section `model.decoder` of a Perceiver IO; empty: a Perceiver classifies.
        notes: comments for the recipe.
    """

    facts: str
    task: dict[str, Any]
    decoder: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def draft_goal(manifest: Manifest) -> Goal:
    """Return the task of the data: of their targets, or masked language modelling of texts without one.

    Raises:
        UserError: there is no target, and no text.
    """
    kinds = {name: kind_of(feature) for name, feature in manifest.features.items()}
    count = f"{len(manifest.classes)} classes"
    if "segmentation" in kinds.values():
        queries = {"kind": "segmentation", "queries": 256}
        return Goal(f"segmentation into {count}", queries, {"kind": "pixels"})
    if kinds.get("label") == "labels":
        return Goal(f"tagging with {count}", {"kind": "tagging"})
    sizes = _several(manifest)
    if sizes.keys() == {"label"}:
        return Goal(f"classification into {count}", {"kind": "classification"}, notes=_balance(manifest))
    if sizes and set(sizes.values()) == {0}:
        return Goal(f"regression of {', '.join(sizes)}", {"kind": "regression", "loss": "huber"})
    if sizes:
        facts = ", ".join(f"{name} ({size} classes)" if size else name for name, size in sizes.items())
        weights = {"kind": "multitask", "tasks": dict.fromkeys(sizes, 1.0), "loss": "huber"}
        outputs = {name: size or 1 for name, size in sizes.items()}
        notes = ("tasks: the weight of each loss", "decoder.tasks: the number of classes, or 1 for a number")
        return Goal(f"multitask of {facts}", weights, {"kind": "multitask", "tasks": outputs}, notes)
    if kinds.get("text") == "text":
        return Goal("masked language modelling of bytes", {"kind": "masked_language"}, {"kind": "tokens"})
    has = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    raise UserError(
        f"init: no task fits the features of {manifest.name}: {has}; wanted a label, several labels, a target or masks:"
        " prepare the data with labels, or with --option label=COLUMN or target=COLUMN"
    )


def _several(manifest: Manifest) -> dict[str, int]:
    """Return the number of classes of each task, 0 for a number."""
    found: dict[str, int] = {}
    for key, feature in manifest.features.items():
        name = key.removeprefix("label_")
        if kind_of(feature) == "label" and label_key(name) == key:
            found[name] = len(getattr(feature, "classes", ()) or manifest.classes)
    numbers: Any = manifest.features.get("target")
    return found | (dict.fromkeys(numbers.names, 0) if kind_of(numbers) == "target" else {})


def _balance(manifest: Manifest) -> tuple[str, ...]:
    counts = [count for count in manifest.class_counts.get("label", ()) if count]
    if not counts or max(counts) < 5 * min(counts):
        return ()
    return (
        f"the largest class has {max(counts):,} samples, the smallest {min(counts):,}: with class_weights: balanced all"
        " classes count alike",
    )
