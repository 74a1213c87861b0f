"""Predictions for a data set as Parquet files, in parts that a restart does not repeat."""

import hashlib
import json
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cluster.predict.outputs import parquet, predicted
from cluster.predict.scoring import Scoring
from perceiver.config import UserError
from perceiver.storage import Folder, open_folder
from pipelines.shards.quarantine import Quarantine, write_problems
from pipelines.shards.reader import Reader

FACTS = "_predictions.json"
"""Like `_quarantine`, not taken for data by what reads a folder of Parquet files."""
BAD = "_quarantine"
ROWS_A_PART = 4096
"""Samples of one file of predictions, about: the unit that a restart does not repeat."""

Progress = Callable[[int, int], None]
"""Called with the samples done and those of the split."""


@dataclass(frozen=True)
class Parts:
    """How a split is cut into files.

    Attributes:
        samples: of the split.
        batch: samples of a forward pass.
        each: batches of a file; the last one may have less.
    """

    samples: int
    batch: int
    each: int

    @property
    def batches(self) -> int:
        """Batches of the split."""
        return -(-self.samples // self.batch)

    @property
    def count(self) -> int:
        """Number of files."""
        return -(-self.batches // self.each)

    def batches_of(self, part: int) -> int:
        """Batches of one file."""
        return min(self.each, self.batches - part * self.each)

    def ids(self, part: int) -> range:
        """The samples of one file."""
        size = self.each * self.batch
        return range(part * size, min(self.samples, (part + 1) * size))

    def done(self, folder: Folder) -> int:
        """Files that are there from the first one on without a gap."""
        return next((part for part in range(self.count) if not folder.exists(self.name(part))), self.count)

    def name(self, part: int) -> str:
        """Name of a file."""
        return f"part-{part:06d}.parquet"


def predict(scoring: Scoring, target: str, progress: Progress | None = None, workers: int | None = None) -> int:
    """Write predictions as Parquet files; go on where a call before this one was broken off.

    A row a sample: `sample_id`, `key` (where the sample came from), `label` if the data has one, what the task says
    (`prediction`, `probability`, ...), and `class` for a classifier whose classes have names. Bad samples are left out;
    those of each file are listed in a file of the same name below `_quarantine/`, which is written before it.

    Args:
        scoring: the model and the data.
        target: folder or URL.
        progress: told after each file.
        workers: Ray Data actors that hold the model, 0 for this process; by the connected Ray if None, see
            `cluster.predict.actors.default_workers`. The files are the same.

    Returns:
        Samples predicted by this call.

    Raises:
        UserError: the folder holds predictions of another model or other data.
    """
    folder = open_folder(target)
    _claim(folder, _fingerprint(scoring))
    parts = Parts(scoring.samples, scoring.batch, max(1, ROWS_A_PART // scoring.batch))
    done, written = parts.done(folder), 0
    if done == parts.count:
        return 0
    quarantine, reader = _quarantine(scoring, folder, parts, done), _reader(scoring)
    with closing(_outcomes(scoring, workers, done * parts.each, quarantine)) as outcomes:
        for part in range(done, parts.count):
            rows = _named(scoring, pa.concat_tables(islice(outcomes, parts.batches_of(part))))
            rows = rows.append_column("key", pa.array(reader.keys(rows["sample_id"].to_numpy()), pa.string()))
            ids, name = parts.ids(part), parts.name(part)
            if bad := sorted(problem for problem in quarantine.problems.values() if problem.sample_id in ids):
                write_problems(folder, bad, f"{BAD}/{name}")
            folder.write(name, parquet(rows))
            written += rows.num_rows
            if progress:
                progress(ids.stop, scoring.samples)
    return written


def _quarantine(scoring: Scoring, folder: Folder, parts: Parts, done: int) -> Quarantine:
    """A quarantine that has counted what the files that are done left out."""
    found = Quarantine(scoring.recipe.data.max_bad_fraction)
    found.seen = done * parts.each * parts.batch
    bad = Folder(folder.fs, folder.file(BAD), f"{folder.url}/{BAD}")
    for name in {parts.name(part) for part in range(done)}.intersection(bad.names()):
        with bad.fs.open(bad.file(name), "rb") as stream:
            found.met += pq.read_metadata(stream).num_rows
    return found


def _outcomes(
    scoring: Scoring, workers: int | None, first: int, quarantine: Quarantine
) -> Generator[pa.Table, None, None]:
    """The predictions of each batch from the `first` one on."""
    if scoring.recipe.data.executor == "inline":
        if workers:
            raise UserError(f"--workers {workers} wants Ray, the run has data.executor = inline: add data.executor=ray")
        return _here(scoring, first, quarantine)
    from cluster.predict.actors import connected_workers, predict_in_actors

    count = connected_workers(scoring) if workers is None else workers
    return predict_in_actors(scoring, count, first, quarantine) if count else _here(scoring, first, quarantine)


def _here(scoring: Scoring, first: int, quarantine: Quarantine) -> Generator[pa.Table, None, None]:
    task = scoring.task()
    with closing(scoring.batches(first, quarantine)) as batches:
        for batch in batches:
            with torch.no_grad():
                rows = predicted(task, scoring.model, batch)
            yield rows


def _named(scoring: Scoring, rows: pa.Table) -> pa.Table:
    """Add the names of the predicted classes, as the model was taught them, if the prediction is a class."""
    names = scoring.names
    if names and "prediction" in rows.column_names and pa.types.is_integer(rows.schema.field("prediction").type):
        found = [names[number] for number in rows["prediction"].to_pylist()]
        rows = rows.append_column("class", pa.array(found, pa.string()))
    return rows


def _fingerprint(scoring: Scoring) -> dict[str, Any]:
    """What the predictions depend on."""
    digest = hashlib.sha256()
    for name in sorted(scoring.saved.tensors):
        digest.update(name.encode())
        digest.update(scoring.saved.tensors[name].contiguous().view(torch.uint8).numpy().data)
    view = scoring.recipe.data.model_dump(mode="json", exclude={"storage_options"})
    return {
        "weights": digest.hexdigest()[:16],
        "data": scoring.recipe.data.url,
        "split": scoring.split,
        "samples": scoring.samples,
        "batch": scoring.batch,
        "view": _short(view),
        "classes": _short(scoring.names),
    }


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _claim(folder: Folder, facts: Mapping[str, Any]) -> None:
    """Note in the folder what its files are predictions of, or see that it says the same."""
    if not folder.exists(FACTS):
        if strange := [name for name in folder.names() if name.endswith(".parquet")]:
            name = f"{folder.url} holds {strange[0]}"
            raise UserError(f"{name}, which perceiver predict did not write: choose another --to")
        folder.write(FACTS, json.dumps(facts, indent=1))
        return
    before = json.loads(folder.read_text(FACTS))
    changed = [name for name, value in facts.items() if before.get(name) != value]
    if changed:
        raise UserError(
            f"{folder.url} holds predictions with {changed[0]} {before.get(changed[0])}, these would be"
            f" with {facts[changed[0]]}: choose another --to"
        )


def _reader(scoring: Scoring) -> Reader:
    """Return what reads the keys of the split's samples."""
    data, manifest = scoring.recipe.data, scoring.manifest
    return Reader.of(data.url, manifest, manifest.split(scoring.split), data.storage_options)
