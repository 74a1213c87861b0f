"""Using what was trained: the figures of a data set, and predictions for one as Parquet files.

The data goes through the same Ray Data pipeline as in training; the model runs in the calling process, on its GPU if
there is one.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from cluster import local
from cluster.inputs import check_inputs
from cluster.predictions import parquet, predicted
from cluster.recipe import Recipe, build_recipe
from cluster.recipe_file import apply_override
from perceiver.config import UserError
from perceiver.tasks import build_task
from perceiver.train.engine import Batch, evaluate
from perceiver.train.ranks import Ranks
from perceiver.weights import Saved, class_count, open_weights
from pipelines.ingest import EvalShare, batch_shapes, eval_batches, load_data
from pipelines.quarantine import Quarantine
from pipelines.shards import Manifest
from pipelines.storage import Folder, open_folder
from pipelines.stored import stored_files

FACTS = "_predictions.json"
"""Like `_quarantine`, not taken for data by what reads a folder of Parquet files."""
ROWS_A_PART = 4096
"""Samples of one file of predictions, about: the unit that a restart does not repeat."""

Progress = Callable[[int, int], None]
"""Called with the samples done and those of the split."""


@dataclass(frozen=True)
class Scoring:
    """A trained model and the data it is to see.

    Attributes:
        saved: the weights and where they came from.
        recipe: that of the run, turned to the data in question.
        manifest: of the data.
        model: on its device, in evaluation mode.
        batch: samples of a forward pass.
    """

    saved: Saved
    recipe: Recipe
    manifest: Manifest
    model: nn.Module
    batch: int

    @property
    def split(self) -> str:
        """The split in question."""
        return self.recipe.data.eval_split

    @property
    def samples(self) -> int:
        """Samples of the split."""
        return self.manifest.split(self.split).samples

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def task(self) -> Any:
        """The run's task."""
        classes = class_count(self.recipe.model, self.saved.shapes)
        return build_task(self.recipe.task, classes=classes or len(self.manifest.classes))

    def batches(self, first: int = 0, quarantine: Quarantine | None = None) -> Iterator[Batch]:
        """The split's batches in order, from the `first` one."""
        share = EvalShare(self.split, self.batch, first=first)
        return eval_batches(self.recipe.data, self.manifest, share, self.device, quarantine)

    def metrics(self) -> dict[str, float]:
        """The task's figures on the split, each sample counted once."""
        return evaluate(self.model, self.task(), self.batches(), Ranks(self.device))


def open_scoring(place: str, url: str | None = None, *, split: str | None = None, batch: int | None = None,
                 overrides: Sequence[str] = ()) -> Scoring:
    """Read a run's weights and turn its recipe to a data set.

    Args:
        place: a run's folder, one of its checkpoints, or an exported safetensors file with its recipe.yaml.
        url: prepared data; the run's own if None.
        split: of the data; the run's evaluation split if None, or the only one there is.
        batch: samples of a forward pass; as in training if None.
        overrides: dotted keys of the recipe, such as data.video.eval_clips=16.

    Raises:
        UserError: no weights, no recipe with them, or data that the model does not fit.
    """
    saved = open_weights(place)
    if not saved.recipe:
        raise UserError(f"{place}: got weights without a recipe; wanted a run's folder, or recipe.yaml beside the file")
    tree = json.loads(json.dumps(saved.recipe))
    for override in overrides:
        apply_override(tree, override)
    tree["data"] = {**tree["data"], **({"url": url, "mixture": []} if url else {})}
    recipe = build_recipe(tree, source=f"the recipe of {place}")
    manifest = load_data(recipe.data)
    wanted = split or _split(recipe, manifest)
    data = recipe.data.model_copy(update={"eval_split": wanted, "train_split": wanted})
    recipe = recipe.model_copy(update={"data": data})
    manifest.split(wanted)
    check_inputs(recipe.model, batch_shapes(data, manifest), data, manifest)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = batch or max(1, recipe.train.global_batch // recipe.cluster.workers)
    return Scoring(saved, recipe, manifest, saved.build().to(device), size)


def _split(recipe: Recipe, manifest: Manifest) -> str:
    """The run's evaluation split, or the only one of other data."""
    return next(iter(manifest.splits)) if len(manifest.splits) == 1 else recipe.data.eval_split


def check_labels(scoring: Scoring) -> None:
    """Refuse data whose labels are not the model's classes.

    Raises:
        UserError: the number of classes differs.
    """
    classes = class_count(scoring.recipe.model, scoring.saved.shapes)
    if classes and len(scoring.manifest.classes) != classes:
        raise UserError(f"{scoring.recipe.data.url} has {len(scoring.manifest.classes)} classes, the model "
                        f"{classes}: give data with the classes that it was trained on")


def predict(scoring: Scoring, target: str, progress: Progress | None = None) -> int:
    """Write predictions as Parquet files; go on where a call before this one was broken off.

    A row a sample: `sample_id`, `key` (where the sample came from), `label` if the data has one, what the task says
    (`prediction`, `probability`, ...), and `class` for a classifier whose classes the data names. Bad samples are left
    out; they are listed below `_quarantine/`.

    Returns:
        Samples predicted by this call.

    Raises:
        UserError: the folder holds predictions of another model or other data.
    """
    folder = open_folder(target)
    _claim(folder, _fingerprint(scoring))
    each = max(1, ROWS_A_PART // scoring.batch)
    count = -(-scoring.samples // scoring.batch)
    done = _parts_done(folder, each, count)
    task, quarantine, written = scoring.task(), Quarantine(scoring.recipe.data.max_bad_fraction), 0
    keys = Keys(scoring)
    batches = scoring.batches(done * each, quarantine)
    with torch.no_grad():
        for part in range(done, -(-count // each)):
            tables = [_rows(scoring, task, next(batches)) for _ in range(min(each, count - part * each))]
            rows = pa.concat_tables(tables)
            rows = rows.append_column("key", pa.array(keys.of(rows["sample_id"].to_pylist()), pa.string()))
            folder.write_bytes(_name(part), parquet(rows))
            written += rows.num_rows
            if progress:
                progress(min(scoring.samples, (part + 1) * each * scoring.batch), scoring.samples)
    if quarantine.problems:
        quarantine.write(folder.file("_quarantine/part-00000"))
    return written


def _rows(scoring: Scoring, task: Any, batch: Batch) -> pa.Table:
    """One batch's rows, with the names of the classes if the prediction is one."""
    rows = predicted(task, scoring.model, batch)
    names = scoring.manifest.classes
    if names and "prediction" in rows.column_names and pa.types.is_integer(rows.schema.field("prediction").type):
        found = [names[number] if number < len(names) else "" for number in rows["prediction"].to_pylist()]
        rows = rows.append_column("class", pa.array(found, pa.string()))
    return rows


def _name(part: int) -> str:
    return f"part-{part:06d}.parquet"


def _parts_done(folder: Folder, each: int, count: int) -> int:
    """Files that are there from the first one on without a gap."""
    parts = -(-count // each)
    return next((part for part in range(parts) if not folder.exists(_name(part))), parts)


def _fingerprint(scoring: Scoring) -> dict[str, Any]:
    """What the predictions depend on."""
    digest = hashlib.sha256()
    for name in sorted(scoring.saved.tensors):
        digest.update(name.encode())
        digest.update(scoring.saved.tensors[name].contiguous().view(torch.uint8).numpy().data)
    view = scoring.recipe.data.model_dump(mode="json", exclude={"storage_options"})
    return {"weights": digest.hexdigest()[:16], "data": scoring.recipe.data.url, "split": scoring.split,
            "samples": scoring.samples, "batch": scoring.batch,
            "view": hashlib.sha256(json.dumps(view, sort_keys=True).encode()).hexdigest()[:16]}  # fmt: skip


def _claim(folder: Folder, facts: Mapping[str, Any]) -> None:
    """Note in the folder what its files are predictions of, or see that it says the same."""
    if not folder.exists(FACTS):
        if strange := [name for name in folder.names() if name.endswith(".parquet")]:
            name = f"{folder.url} holds {strange[0]}"
            raise UserError(f"{name}, which perceiver predict did not write: choose another --to")
        folder.write_text(FACTS, json.dumps(facts, indent=1))
        return
    before = json.loads(folder.read_text(FACTS))
    changed = [name for name, value in facts.items() if before.get(name) != value]
    if changed:
        raise UserError(f"{folder.url} holds predictions with {changed[0]} {before.get(changed[0])}, these would be"
                        f" with {facts[changed[0]]}: choose another --to")


class Keys:
    """Where samples came from: the keys of one file in memory at a time."""

    def __init__(self, scoring: Scoring) -> None:
        data, manifest = scoring.recipe.data, scoring.manifest
        self._files = stored_files(data.url, manifest, manifest.split(scoring.split), data.storage_options)
        self._keys: list[str] = []
        self._first = 0

    def of(self, ids: Sequence[int]) -> list[str]:
        """The keys of these samples, which come in order."""
        return [self._key(number) for number in ids]

    def _key(self, number: int) -> str:
        while number >= self._first + len(self._keys):
            self._first += len(self._keys)
            self._keys = next(self._files).row_keys()
        return self._keys[number - self._first]


@contextmanager
def ray_for(scoring: Scoring) -> Iterator[None]:
    """A connected Ray while it is needed; none where the data is read in this process."""
    if scoring.recipe.data.executor == "inline":
        yield
        return
    import ray

    local.set_quiet_environment()
    local.start_ray(scoring.recipe.cluster)
    try:
        yield
    finally:
        ray.shutdown()
