"""A trained model and a data set, the input of `perceiver evaluate` and `perceiver predict`.

The data goes through the same pipeline as in training. The model runs in the calling process, on its GPU if there is
one, or for predictions in actors (`cluster.predict.actors`).
"""

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cluster.recipe.config import Recipe, build_recipe, eval_rows, kind_of
from cluster.recipe.file import apply_override
from cluster.recipe.inputs import check_inputs
from cluster.recipe.targets import check_feature, with_targets
from cluster.runtime.local import set_quiet_environment
from cluster.runtime.ray_internals import quiet_data_progress
from cluster.runtime.session import connected
from perceiver.config import UserError
from perceiver.export.weights import DataFacts, Saved, class_count, open_weights
from perceiver.tasks import Batch, build_task
from perceiver.train.checkpoint.shards import Weights
from perceiver.train.engine.protocol import evaluate
from perceiver.train.engine.ranks import Ranks
from pipelines.feed.excess import describe_excess
from pipelines.feed.ingest import EvalShare, batch_shapes, eval_batches, load_data
from pipelines.shards.manifest import Manifest, load_manifest
from pipelines.shards.quarantine import Quarantine


@dataclass(frozen=True)
class Scoring:
    """A trained model and a data set.

    Attributes:
        saved: the weights and their origin.
        recipe: the run's recipe with the data set.
        manifest: of the data.
        model: on its device, in evaluation mode.
        batch: samples per forward pass.
        names: names of the model's classes; empty if unknown.
        origin: identifies data that are not prepared, of which the recipe's are a copy; else empty.
    """

    saved: Saved
    recipe: Recipe
    manifest: Manifest
    model: nn.Module
    batch: int
    names: tuple[str, ...] = ()
    origin: str = ""

    @property
    def split(self) -> str:
        """Name of the split."""
        return self.recipe.data.eval_split

    @property
    def samples(self) -> int:
        """Number of samples in the split."""
        return self.manifest.split(self.split).samples

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    @property
    def classes(self) -> int:
        """Number of classes of the model; of the data if the model has none."""
        return class_count(self.recipe.model, self.saved.shapes) or len(self.manifest.classes)

    def task(self) -> Any:
        """Return the run's task."""
        return build_task(self.recipe.task, classes=self.classes)

    def notes(self) -> list[str]:
        """Return notes for the user: about the names of the classes, and about samples that are shown in part."""
        about_classes = self.note()
        return [
            *([about_classes] if about_classes else []),
            *describe_excess(self.recipe.data, self.manifest, self.split),
        ]

    def note(self) -> str:
        """Return a note for the user about the names of the classes; usually empty."""
        theirs, url = self.manifest.classes, self.recipe.data.url
        if not self.names:
            if kind_of(self.recipe.task) == "regression":
                return ""
            unknown = class_count(self.recipe.model, self.saved.shapes) is not None
            return (
                f"{self.saved.place} has no names of classes, and its data cannot be read: classes are only given by "
                "number"
                if unknown
                else ""
            )
        if not theirs or theirs == self.names or "label" not in self.manifest.features:
            return ""
        return (
            f"{url} has the classes {_some(theirs)}, the model has {_some(self.names)}: labels are numbers of the "
            "former, predictions of the latter"
        )

    def batches(self, first: int = 0, quarantine: Quarantine | None = None) -> Generator[Batch, None, None]:
        """Return the split's batches in order, starting with batch `first`."""
        share = EvalShare(self.split, self.batch, first=first)
        return eval_batches(self.recipe.data, self.manifest, share, self.device, quarantine)

    def metrics(self, quarantine: Quarantine | None = None) -> dict[str, float]:
        """Return the task's metrics on the split; each sample counts once."""
        return evaluate(self.model, self.task(), self.batches(quarantine=quarantine), Ranks(self.device))


def open_scoring(
    place: str | Saved,
    url: str | None = None,
    *,
    split: str | None = None,
    batch: int | None = None,
    overrides: Sequence[str] = (),
    model: nn.Module | None = None,
    weights: Weights | None = None,
) -> Scoring:
    """Load a run's weights, and apply its recipe to a data set.

    Args:
        place: a run's folder, one of its checkpoints, or an exported safetensors file with its recipe.yaml; or what
            was read from it.
        url: prepared data; default: the run's own.
        split: of the data; default: the only split, otherwise the run's evaluation split.
        batch: samples per forward pass, at most those of the split; default: as in training.
        overrides: dotted keys of the recipe, such as data.clip.eval_clips=16.
        model: the model with these weights, used where it is; default: a new one, on the GPU if there is one.
        weights: which weights are read from a place, see `open_weights`.

    Raises:
        UserError: the weights or their recipe are missing, or the data do not fit the model.
    """
    saved = open_weights(place, weights) if isinstance(place, str) else place
    if not saved.recipe:
        raise UserError(
            f"{saved.place}: weights without a recipe; wanted a run's folder, or recipe.yaml next to the file"
        )
    tree = json.loads(json.dumps(saved.recipe))
    for override in overrides:
        apply_override(tree, override)
    tree["data"] = {**tree.get("data", {}), **({} if url is None else {"url": url, "mixture": []})}
    recipe = build_recipe(tree, source=f"the recipe of {saved.place}")
    manifest = load_data(recipe.data)
    wanted = split or _split(recipe, manifest)
    data = recipe.data.model_copy(update={"eval_split": wanted, "train_split": wanted})
    recipe = with_targets(recipe.model_copy(update={"data": data}), manifest)
    manifest.split(wanted)
    check_inputs(recipe.model, batch_shapes(data, manifest), data, manifest, trained=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = min(batch or eval_rows(recipe, recipe.cluster.workers), max(1, manifest.split(wanted).samples))
    net = saved.build().to(device) if model is None else model.eval()
    return Scoring(saved, recipe, manifest, net, size, _class_names(saved))


def _class_names(saved: Saved) -> tuple[str, ...]:
    """Return the names of the model's classes; empty if they are unknown or their number differs."""
    if (saved.recipe.get("task") or {}).get("kind") == "regression":
        return ()
    found = trained_on(saved)
    assert saved.model is not None
    return found.classes if found and len(found.classes) == class_count(saved.model, saved.shapes) else ()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")


def _split(recipe: Recipe, manifest: Manifest) -> str:
    """Return the only split of the data, otherwise the run's evaluation split."""
    return next(iter(manifest.splits)) if len(manifest.splits) == 1 else recipe.data.eval_split


def check_labels(scoring: Scoring) -> None:
    """Refuse data without the targets of the task, or with other classes than the model.

    Raises:
        UserError: the data lack the task's targets, the number of classes differs, or the same names are in another
            order.
    """
    check_feature(scoring.recipe, scoring.manifest)
    if kind_of(scoring.recipe.task) == "regression":
        return
    theirs, names, url = scoring.manifest.classes, scoring.names, scoring.recipe.data.url
    classes = class_count(scoring.recipe.model, scoring.saved.shapes)
    if classes and len(theirs) != classes:
        raise UserError(f"{url} has {len(theirs)} classes, the model {classes}: use data with the model's classes")
    if theirs != names and set(theirs) == set(names):
        first = next(number for number, name in enumerate(names) if theirs[number] != name)
        raise UserError(
            f"{url} has the model's classes in another order ({first} is {theirs[first]} in the data, {names[first]} "
            "in the model): prepare the data with the classes in the model's order"
        )


def trained_on(saved: Saved) -> DataFacts | None:
    """Return the recorded facts of the run's data, otherwise those of its manifest; None if neither exists.

    A manifest at a URL is not read: whoever wrote the weights would choose where requests and credentials go.
    """
    url = saved.recipe.get("data", {}).get("url")
    if saved.data or not isinstance(url, str) or "://" in url:
        return saved.data
    try:
        manifest = load_manifest(url)
    except UserError:
        return None
    return DataFacts(manifest.name, manifest.licence, manifest.source, manifest.classes)


@contextmanager
def ray_for(scoring: Scoring) -> Iterator[None]:
    """Connect to Ray in a `with` block, unless the data is read in this process."""
    if scoring.recipe.data.executor == "inline":
        yield
        return
    set_quiet_environment()
    with connected(scoring.recipe.cluster):
        quiet_data_progress()
        yield
