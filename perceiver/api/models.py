"""Trained models: `perceiver.load_model`, `evaluate`, `predict`."""

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from perceiver.api.recipes import set_up, words
from perceiver.config import UserError
from perceiver.tracking.redaction import redact_text

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import nn

    from cluster.predict.scoring import Scoring
    from perceiver.api.recipes import Place
    from perceiver.export.weights import Saved
    from perceiver.train.checkpoint.shards import Weights

    Several = Place | Sequence[Place]
    """One place, or several files, folders, globs and tables."""

    class LoadedModel(nn.Module):
        """The type of a model that `load_model` returns: its own class, with one more method."""

        def predict(
            self,
            places: Several = (),
            *,
            texts: Sequence[str] = (),
            split: str | None = None,
            batch: int | None = None,
            options: Mapping[str, str] | None = None,
            **overrides: Any,
        ) -> "Predictions":
            """Return predictions, see `perceiver.predict`; the model runs in this process, where it is."""
            ...


@dataclass(frozen=True)
class Predictions:
    """The predictions of a model, in the order of the samples; iterating yields a dict per sample.

    Attributes:
        table: a row for each sample that could be used: `sample_id`, `key` (its file, or its row in a table), `label`
            if there is one, and the task's outputs, such as `prediction`, `class` and `probability`.
        rejected: `key` and `reason` of each that could not.
    """

    table: "pa.Table"
    rejected: tuple[dict[str, str], ...] = ()

    def __len__(self) -> int:
        return self.table.num_rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.table.to_pylist())

    def __repr__(self) -> str:
        return f"Predictions({len(self):,} samples, {len(self.rejected):,} rejected)"


@dataclass(frozen=True)
class Request:
    """What is predicted, and how.

    Attributes:
        places: prepared data, or files, folders, globs and tables.
        texts: texts.
        split: of prepared data.
        batch: samples per forward pass.
        workers: Ray Data actors; see `perceiver predict --help`.
        options: of the sources that read unprepared data.
        overrides: `KEY=VALUE` of the recipe.
    """

    places: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    split: str | None = None
    batch: int | None = None
    workers: int | None = None
    options: Mapping[str, str] | None = None
    overrides: tuple[str, ...] = ()


def load_model(place: "Place", **changes: Any) -> "LoadedModel":
    """Build the model with the weights at a place, in evaluation mode.

    The model also has the method `predict`, which takes what `perceiver.predict` takes after the run, and runs in the
    model's place: `load_model(run).predict(["a.jpg", "b.jpg"])`.

    Args:
        place: a `Run` or its folder, a checkpoint, a safetensors file, or a folder that transformers wrote; a path or
            an fsspec URL, for example `runs/quickstart-001`.
        changes: keys of the model's config to replace, for example `attention="plain"`.

    Raises:
        UserError: none of these is there, it is damaged, or the weights are of another model.
    """
    from perceiver.export.weights import open_weights

    saved = open_weights(os.fspath(place))
    model: Any = saved.build(**changes)
    saved = replace(saved, tensors=dict(model.state_dict()))  # the same memory
    model.predict = _Predict(saved, model)
    return model


def predict(
    run: "Place",
    places: "Several" = (),
    *,
    texts: Sequence[str] = (),
    to: "Place | None" = None,
    split: str | None = None,
    batch: int | None = None,
    workers: int | None = None,
    options: Mapping[str, str] | None = None,
    progress: bool = False,
    weights: "Weights | None" = None,
    **overrides: Any,
) -> Predictions:
    """Return a trained model's predictions, as `perceiver predict` writes them.

    Args:
        run: a `Run` or its folder, a checkpoint, or a safetensors export.
        places: prepared data; or a file, a folder, a glob such as `photos/*.jpg`, a table (.csv, .tsv, .jsonl,
            .parquet), a .txt file with a text in each line, or a list of these.
        texts: texts, for a model of texts.
        to: folder for Parquet files, as the command writes them; the same call continues an interrupted one. Default:
            none are kept.
        split: of prepared data; default: the run's evaluation split, or the only one.
        batch: samples per forward pass; default: as in training's evaluations.
        workers: Ray Data actors that run the model; 0: this process.
        options: of the sources that read unprepared data, such as `{"image": "path"}` for a table's column.
        progress: print the number of samples to stdout.
        weights: of a run or checkpoint with `train.ema`: `ema`, the default, or `last`.
        overrides: keys of the recipe by dotted key.

    Raises:
        UserError: weights or data do not exist, or do not fit each other, or no sample could be read. Single samples
            that cannot be used are in `Predictions.rejected`.
    """
    from perceiver.export.weights import open_weights

    request = Request(_several(places), _several(texts), split, batch, workers, options, tuple(words(overrides)))
    return predictions(open_weights(os.fspath(run), weights), None, request, to, progress)


@dataclass(frozen=True, repr=False)
class _Predict:
    """The method `predict` of a loaded model, see `perceiver.predict`; the model runs in this process, where it is."""

    saved: "Saved"
    model: "nn.Module"

    def __call__(
        self,
        places: "Several" = (),
        *,
        texts: Sequence[str] = (),
        split: str | None = None,
        batch: int | None = None,
        options: Mapping[str, str] | None = None,
        **overrides: Any,
    ) -> Predictions:
        overrides = {"data.executor": "inline", **overrides}
        request = Request(_several(places), _several(texts), split, batch, None, options, tuple(words(overrides)))
        return predictions(self.saved, self.model, request, None, False)


def _several(places: "Several") -> tuple[str, ...]:
    return (
        (os.fspath(places),) if isinstance(places, str | os.PathLike) else tuple(os.fspath(place) for place in places)
    )


def predictions(
    saved: "Saved", model: "nn.Module | None", request: Request, to: "Place | None", progress: bool
) -> Predictions:
    """Predict, see `predict`.

    Args:
        saved: the weights and their recipe.
        model: the model with these weights, if it is built already.
        request: the data.
        to, progress: see `predict`.
    """
    set_up()
    from cluster.predict.inference import check_target
    from perceiver.tracking.printable import say

    def show(done: int, total: int) -> None:
        if progress:
            say(f"  {done:,} of {total:,}")

    if to is not None:
        check_target(os.fspath(to))
    with ExitStack() as stack:
        target = os.fspath(to) if to is not None else stack.enter_context(tempfile.TemporaryDirectory())
        write_predictions(saved, model, request, target, show, partial(warn, level=5))
        return read_predictions(target)


def write_predictions(
    saved: "Saved",
    model: "nn.Module | None",
    request: Request,
    target: str,
    show: Callable[[int, int], None],
    note: Callable[[str], None],
) -> tuple["Scoring", int, int]:
    """Write predictions to a folder; return the model with its data, and how many were written and could not be read.

    Args:
        saved, model, request: see `predictions`.
        target: the folder.
        show: called with the number of finished samples and that of all.
        note: called with a line about the classes, or about samples that are shown in part.
    """
    from cluster.predict.inference import predict as infer
    from cluster.predict.scoring import open_scoring, ray_for
    from cluster.predict.unprepared import Places, open_places
    from pipelines.unprepared import is_prepared

    if not request.places and not request.texts:
        raise UserError("no data were given: wanted a prepared folder, files, a table or texts")
    with ExitStack() as stack:
        if len(request.places) == 1 and not request.texts and is_prepared(request.places[0]):
            given: dict[str, Any] = {"batch": request.batch, "overrides": request.overrides, "model": model}
            scoring, unread = open_scoring(saved, request.places[0], split=request.split, **given), []
        else:
            given = {"batch": request.batch, "overrides": request.overrides, "workers": request.workers}
            data = Places(request.places, request.texts, request.options)
            scoring, unread = stack.enter_context(open_places(saved, data, model=model, **given))
        for line in scoring.notes():
            note(line)
        stack.enter_context(ray_for(scoring))
        return scoring, infer(scoring, target, show, request.workers, unread), len(unread)


def read_predictions(target: str) -> Predictions:
    """Return the predictions in a folder that `write_predictions` wrote, and what is in its quarantine."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from cluster.predict.inference import BAD
    from perceiver.storage import Folder, open_folder

    folder = open_folder(target)

    def tables(place: Folder) -> list["pa.Table"]:
        found = []
        for name in place.names():
            if name.endswith(".parquet"):
                with place.fs.open(place.existing(name), "rb") as stream:
                    found.append(pq.read_table(stream))
        return found

    bad = [row for table in tables(Folder(folder.fs, folder.file(BAD), f"{target}/{BAD}")) for row in table.to_pylist()]
    rejected = tuple({"key": row["key"], "reason": row["reason"]} for row in bad)
    return Predictions(pa.concat_tables(tables(folder), promote_options="default"), rejected)


def warn(line: str, level: int = 4) -> None:
    """Issue a warning of Python for the caller of the interface, `level` frames above; secrets are masked."""
    warnings.warn(redact_text(line), stacklevel=level)


def evaluate(
    run: "Place",
    data: "Place | None" = None,
    *,
    split: str | None = None,
    batch: int | None = None,
    weights: "Weights | None" = None,
    average: int | None = None,
    **overrides: Any,
) -> dict[str, float]:
    """Return the metrics of a trained model on a data set, as `perceiver evaluate` does.

    Args:
        run: a `Run` or its folder, a checkpoint, or a safetensors export.
        data: prepared data; default: the run's own.
        split: of the data; default: the run's evaluation split.
        batch: samples per forward pass; default: as in training's evaluations.
        weights: of a run or checkpoint with `train.ema`: `ema`, the default, or `last`.
        average: number of the run's last checkpoints whose predictions are averaged; default: one model.
        overrides: keys of the recipe by dotted key, such as `**{"data.clip.eval_clips": 16}`.

    Raises:
        UserError: the weights or their recipe are missing, or the data do not fit the model.
    """
    from cluster.predict.averaging import average_checkpoints
    from cluster.predict.scoring import open_scoring

    set_up()
    place, url = os.fspath(run), None if data is None else os.fspath(data)
    saved, model, _ = average_checkpoints(place, average, weights) if average else (place, None, [])
    given: dict[str, Any] = {"split": split, "batch": batch, "overrides": words(overrides), "model": model}
    return measured(open_scoring(saved, url, **given, weights=None if average else weights), warn)


def measured(scoring: "Scoring", note: Callable[[str], None]) -> dict[str, float]:
    """Return the metrics of a model on data with its classes.

    Args:
        scoring: the model and the data.
        note: called with a line about other names of classes, and one about samples that are shown in part.
    """
    from cluster.predict.scoring import check_labels, ray_for

    check_labels(scoring)
    for line in scoring.notes():
        note(line)
    with ray_for(scoring):
        return scoring.metrics()
