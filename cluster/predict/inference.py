"""Predictions for a data set as Parquet files; a restart does not repeat finished files."""

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cluster.predict.outputs import parquet, predicted
from cluster.predict.scoring import Scoring
from cluster.recipe.config import kind_of
from perceiver.config import UserError
from perceiver.environment import DISTRIBUTION, installed_version
from perceiver.hashing import short_hash
from perceiver.storage import Folder, open_folder, open_target, parse_json, refusing
from perceiver.tasks import known_classes
from perceiver.text_ids import byte_text
from pipelines.shards.manifest import content_digest, file_versions
from pipelines.shards.quarantine import Problem, Quarantine, write_problems
from pipelines.shards.reader import Reader

UNREAD = "unread.parquet"
"""The file in `_quarantine/` of what could not be read, so that it has no place among the samples."""
FACTS = "_predictions.json"
"""Readers of a folder of Parquet files ignore it, and `_quarantine`, because of the underscore."""
BAD = "_quarantine"
FIX = "choose another --to"
FILLED = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("text", pa.string()),
        ("words", pa.list_(pa.string())),
        ("probability", pa.list_(pa.float64())),
    ]
)
"""Columns of texts whose masks are filled."""
ROWS_PER_PART = 4096
"""Approximate number of samples per file of predictions."""

Progress = Callable[[int, int], None]
"""Called with the number of finished samples and the number of samples in the split."""


@dataclass(frozen=True)
class Parts:
    """The files of predictions of a split.

    Attributes:
        samples: samples of the split.
        batch: samples per forward pass.
        each: batches per file; the last file may have fewer.
    """

    samples: int
    batch: int
    each: int

    @property
    def batches(self) -> int:
        """Number of batches of the split."""
        return -(-self.samples // self.batch)

    @property
    def count(self) -> int:
        """Number of files."""
        return -(-self.batches // self.each)

    def batches_of(self, part: int) -> int:
        """Return the number of batches of a file."""
        return min(self.each, self.batches - part * self.each)

    def ids(self, part: int) -> range:
        """Return the sample ids of a file."""
        size = self.each * self.batch
        return range(part * size, min(self.samples, (part + 1) * size))

    def done(self, folder: Folder) -> int:
        """Return the number of finished files, counted from the first one without a gap.

        Raises:
            UserError: something else has the name of a file.
        """
        for part in range(self.count):
            with refusing(folder.url, FIX):
                folder.existing(self.name(part))  # refuses a FIFO or a link to elsewhere
                if not folder.exists(self.name(part)):
                    return part
        return self.count

    def name(self, part: int) -> str:
        """Return the name of a file."""
        return f"part-{part:06d}.parquet"


def predict(
    scoring: Scoring,
    target: str,
    progress: Progress | None = None,
    workers: int | None = None,
    unread: Sequence[Problem] = (),
) -> int:
    """Write predictions as Parquet files; continue an interrupted call.

    One row per sample: `sample_id`, `key` (the sample's origin), `label` if the data has one, the task's outputs
    (`prediction`, `probability`, ...), and `class` (of a tagging `classes`) for a classifier whose classes have
    names. Bad samples are left out; those of each file are listed in a file of the same name in `_quarantine/`,
    which is written first.

    Args:
        scoring: the model and the data.
        target: folder or URL.
        progress: called after each file.
        workers: Ray Data actors with the model, 0 for this process; default: see
            `cluster.predict.actors.default_workers`. The files do not depend on it.
        unread: what could not be read of data that are not prepared; listed in `_quarantine/`.

    Returns:
        Number of samples that this call predicted.

    Raises:
        UserError: the folder contains predictions of another model or other data, or cannot be used.
    """
    folder = open_target(target)
    with refusing(f"--to {target}", FIX):
        _claim(folder, _fingerprint(scoring))
        if unread:
            write_problems(folder, unread, f"{BAD}/{UNREAD}")
    parts = Parts(scoring.samples, scoring.batch, max(1, ROWS_PER_PART // scoring.batch))
    done, written = parts.done(folder), 0
    if done == parts.count:
        return 0
    data, manifest = scoring.recipe.data, scoring.manifest
    reader = Reader.of(data.url, manifest, manifest.split(scoring.split), data.storage_options)
    quarantine = _quarantine(scoring, folder, parts, done)
    with closing(_outcomes(scoring, workers, done * parts.each, quarantine)) as outcomes:
        for part in range(done, parts.count):
            rows = _named(scoring, pa.concat_tables(islice(outcomes, parts.batches_of(part))))
            rows = rows.append_column("key", pa.array(reader.keys(rows["sample_id"].to_numpy()), pa.string()))
            ids, name = parts.ids(part), parts.name(part)
            bad = sorted(problem for problem in quarantine.problems.values() if problem.sample_id in ids)
            with refusing(f"--to {target}", FIX):
                if bad:
                    write_problems(folder, bad, f"{BAD}/{name}")
                folder.write(name, parquet(rows))
            written += rows.num_rows
            if progress:
                progress(ids.stop, scoring.samples)
    return written


def _quarantine(scoring: Scoring, folder: Folder, parts: Parts, done: int) -> Quarantine:
    """Return a quarantine that counts the samples and bad samples of the finished files."""
    found = Quarantine(scoring.recipe.data.max_bad_fraction)
    found.seen = done * parts.each * parts.batch
    bad = Folder(folder.fs, folder.file(BAD), f"{folder.url}/{BAD}")
    for name in {parts.name(part) for part in range(done)}.intersection(bad.names()):
        with refusing(f"{bad.url}/{name}", FIX), bad.fs.open(bad.existing(name), "rb") as stream:
            found.met += pq.read_metadata(stream).num_rows
    return found


def _outcomes(
    scoring: Scoring, workers: int | None, first: int, quarantine: Quarantine
) -> Generator[pa.Table, None, None]:
    """Yield the predictions of each batch, starting with batch `first`."""
    if scoring.origin and hasattr(scoring.task(), "fill"):
        return _filled(scoring, first, quarantine)
    if scoring.recipe.data.executor == "inline":
        if workers:
            raise UserError(f"--workers {workers} needs Ray, the run has data.executor = inline: add data.executor=ray")
        return _in_process(scoring, first, quarantine)
    from cluster.predict.actors import connected_workers, predict_in_actors

    count = connected_workers(scoring) if workers is None else workers
    return predict_in_actors(scoring, count, first, quarantine) if count else _in_process(scoring, first, quarantine)


def _filled(scoring: Scoring, first: int, quarantine: Quarantine) -> Generator[pa.Table, None, None]:
    """Yield the texts of unprepared data with their masks filled, in place of each position's token."""
    task, texts = scoring.task(), _texts(scoring)
    for start in range(first * scoring.batch, scoring.samples, scoring.batch):
        rows = []
        for sample_id in range(start, min(start + scoring.batch, scoring.samples)):
            key, text = texts[sample_id]
            try:
                found = task.fill(scoring.model, [text])[0]
            except ValueError as error:
                bad = Problem(scoring.split, sample_id, key, str(error))
                quarantine.add([bad], met=1, seen=0, epoch_share=scoring.samples)
            else:
                rows.append({"sample_id": sample_id, **asdict(found)})
        yield pa.Table.from_pylist(rows, FILLED)


def _texts(scoring: Scoring) -> list[tuple[str, str]]:
    """Return key and text of each sample."""
    folder = open_folder(scoring.recipe.data.url)
    found = []
    for shard in scoring.manifest.split(scoring.split).shards:
        with folder.fs.open(folder.existing(shard.name), "rb") as stream:
            found += pa.ipc.open_file(stream).read_all().select(["key", "text"]).to_pylist()
    return [(row["key"], row["text"]) for row in found]


def _in_process(scoring: Scoring, first: int, quarantine: Quarantine) -> Generator[pa.Table, None, None]:
    task = scoring.task()
    with closing(scoring.batches(first, quarantine)) as batches:
        for batch in batches:
            with torch.no_grad():
                rows = predicted(task, scoring.model, batch)
            yield rows


def _named(scoring: Scoring, rows: pa.Table) -> pa.Table:
    """Add the names of the predicted classes, if the prediction is a class or several, and the names are known."""
    names = scoring.names
    for name in getattr(scoring.task(), "texts", ()):
        if name in rows.column_names:
            found = pa.array([byte_text(ids) for ids in rows[name].to_pylist()], pa.string())
            rows = rows.set_column(rows.column_names.index(name), name, found)
    for task, classes in known_classes(scoring.recipe.task).items():
        found = [classes[number] for number in rows[f"prediction_{task}"].to_pylist()]
        rows = rows.append_column(f"class_{task}", pa.array(found, pa.string()))
    if names and "prediction" in rows.column_names and pa.types.is_integer(rows.schema.field("prediction").type):
        found = [names[number] for number in rows["prediction"].to_pylist()]
        rows = rows.append_column("class", pa.array(found, pa.string()))
    if names and kind_of(scoring.recipe.task) == "tagging":
        several = [[names[number] for number in np.flatnonzero(row)] for row in rows["prediction"].to_pylist()]
        rows = rows.append_column("classes", pa.array(several, pa.list_(pa.string())))
    return rows


def _fingerprint(scoring: Scoring) -> dict[str, Any]:
    """Return everything that the predictions depend on."""
    moved = {"storage_options", *({"url"} if scoring.origin else ())}
    view = scoring.recipe.data.model_dump(mode="json", exclude=moved)
    models = [config and config.model_dump(mode="json") for config in (scoring.saved.model, scoring.recipe.model)]
    versions = file_versions(scoring.manifest, [scoring.split])
    return {
        "weights": scoring.saved.digest(),
        "model": short_hash(models),
        "task": short_hash(scoring.recipe.task.model_dump(mode="json")),
        "version": installed_version(DISTRIBUTION),
        "data": scoring.origin or scoring.recipe.data.url,
        "content": content_digest(scoring.manifest, [scoring.split])[:16] + (versions and f", {versions}"),
        "split": scoring.split,
        "samples": scoring.samples,
        "batch": scoring.batch,
        "view": short_hash(view),
        "classes": short_hash(scoring.names),
    }


def check_target(target: str) -> None:
    """Check the folder for predictions before the model is loaded.

    Raises:
        UserError: it cannot be written to, is a file, or contains files that `predict` did not write.
    """
    with refusing(f"--to {target}", FIX):
        _written(open_target(target))


def _written(folder: Folder) -> dict[str, Any] | None:
    """Return the fingerprint of the predictions in a folder; None if there are none."""
    if not folder.exists(FACTS):
        if strange := [name for name in folder.names() if name.endswith(".parquet")]:
            name = f"{folder.url} contains {strange[0]}"
            raise UserError(f"{name}, which perceiver predict did not write: {FIX}")
        return None
    found = parse_json(folder.fs.cat_file(folder.existing(FACTS)), f"{folder.url}/{FACTS}")
    if not isinstance(found, dict):
        raise UserError(f"{folder.url}/{FACTS} is not a JSON object: {FIX}")
    return found


def _claim(folder: Folder, facts: Mapping[str, Any]) -> None:
    """Write the fingerprint to the folder, or check that it is the same."""
    before = _written(folder)
    if before is None:
        folder.write(FACTS, json.dumps(facts, indent=1))
        return
    changed = [name for name, value in facts.items() if before.get(name) != value]
    if changed:
        raise UserError(
            f"{folder.url} was written with {changed[0]} = {before.get(changed[0], 'not recorded')}, this call uses "
            f"{facts[changed[0]]}: {FIX}"
        )
