"""Predictions for data that are not prepared: what a trained model takes, and a prepared copy of the data for it."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn

from cluster.predict.scoring import Scoring, open_scoring, trained_on
from perceiver.config import UserError
from perceiver.export.weights import Saved, class_count
from pipelines.features import (
    AudioFeature,
    Feature,
    ImageFeature,
    MediaFeature,
    PointsFeature,
    TextFeature,
    VideoFeature,
)
from pipelines.shards.quarantine import Problem
from pipelines.unprepared import SPLIT, Inputs, write_unprepared

RAY_SAMPLES = 2000
"""From this number of samples on a local Ray instance decodes them; fewer are decoded sooner in this process."""


@dataclass(frozen=True)
class Places:
    """Unprepared data.

    Attributes:
        places: files, folders, globs and tables, see `pipelines.unprepared.write_unprepared`.
        texts: texts.
        options: of the sources, such as `image=path` for a table whose column `path` has the images.
    """

    places: Sequence[str] = ()
    texts: Sequence[str] = ()
    options: Mapping[str, str] | None = None

    def __str__(self) -> str:
        shown = [*self.places[:3], *(f"{text[:40]!r}" for text in self.texts[: 3 - len(self.places[:3])])]
        more = len(self.places) + len(self.texts) - len(shown)
        return ", ".join(shown) + (f", ... ({more:,} more)" if more else "")


def inputs_of(saved: Saved, model: nn.Module, options: Mapping[str, str] | None = None) -> Inputs:
    """Return what a trained model takes.

    Raises:
        UserError: it takes something of which a sample is more than one file, such as pairs of frames.
    """
    shapes = {name: tuple(like.shape[1:]) for name, like in cast(Any, model).example(1, "cpu").items()}
    keys = frozenset(cast(Any, model).input_keys)
    found = _feature(keys, shapes)
    if found is None:
        raise UserError(
            f"{saved.place} takes {', '.join(sorted(keys))}: files cannot be given for these; prepare the data with"
            " perceiver prepare"
        )
    known = trained_on(saved)
    count = class_count(cast(Any, saved.model), saved.shapes) or 0
    names = known.classes if known and len(known.classes) == count else tuple(map(str, range(count)))
    given = dict(options or {})
    if isinstance(found[1], PointsFeature) and found[1].features:
        given.setdefault("features", str(found[1].features))
    return Inputs(*found, classes=names, options=given)


def _feature(keys: frozenset[str], shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, Feature] | None:
    """Return name and kind of the feature that gives the keys of a model."""
    if keys == {"image"}:
        return "image", ImageFeature(channels=shapes["image"][0])
    if keys == {"text"}:
        return "text", TextFeature()
    if keys == {"audio"}:
        return "audio", AudioFeature()
    if keys == {"points"}:
        return "points", PointsFeature(features=shapes["points"][-1] - 3)
    if keys == {"video"}:
        return "video", VideoFeature(channels=shapes["video"][1], size=cast(Any, shapes["video"][2:]))
    if keys == {"video", "audio"}:
        return "media", MediaFeature(channels=shapes["video"][1], size=cast(Any, shapes["video"][2:]))
    return None


@contextmanager
def open_places(
    saved: Saved,
    places: Places,
    *,
    model: nn.Module | None = None,
    batch: int | None = None,
    overrides: Sequence[str] = (),
    workers: int | None = None,
) -> Iterator[tuple[Scoring, list[Problem]]]:
    """Yield a trained model with unprepared data, and the samples that could not be read.

    The data are copied to a temporary folder for the time of the `with` block. They are decoded in this process; from
    `RAY_SAMPLES` samples on, or with `workers`, by the recipe's executor, on a local Ray instance: other nodes cannot
    read the temporary folder. Bad samples do not stop a prediction.

    Args:
        saved: the weights and their recipe.
        places: the data.
        model: the model with these weights, if it is built already.
        batch, overrides: see `open_scoring`.
        workers: as for `cluster.predict.inference.predict`.

    Raises:
        UserError: the data do not exist, or do not fit the model.
    """
    net = model or saved.build()
    with tempfile.TemporaryDirectory(prefix="perceiver-predict-") as folder:
        manifest, problems = write_unprepared(
            places.places, places.texts, inputs_of(saved, net, places.options), folder
        )
        given = ["data.max_bad_fraction=1", "data.task_labels={}", "cluster.address=null"]
        if not workers and (workers == 0 or manifest.split(SPLIT).samples < RAY_SAMPLES):
            given.append("data.executor=inline")
        if (saved.recipe.get("data") or {}).get("image_size") is None and "image" in manifest.features:
            height, width = cast(Any, net).example(1, "cpu")["image"].shape[-2:]
            given.append(f"data.image_size=[{height}, {width}]")
        scoring = open_scoring(saved, folder, split=SPLIT, batch=batch, overrides=[*given, *overrides], model=model)
        yield replace(scoring, origin=str(places)), problems
