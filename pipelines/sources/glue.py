"""One task of GLUE from its usual files: a sentence or a pair of sentences, with a class or, in STS-B, a number.

The files are those of the benchmark's own download (gluebenchmark.com): `SRC/MNLI/train.tsv`, `dev_matched.tsv`, ...
The labels of the test files are not public: `test` is `dev.tsv`, of MNLI the matched part; its other is `mismatched`.
Files are read in ranges of bytes, so that large ones are prepared in parallel.

Source: Wang et al. 2019 (arXiv 1804.07461); Perceiver IO (ICLR 2022), section 4.1, which leaves WNLI out.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from perceiver.config import UserError
from perceiver.storage import Folder, refusing
from perceiver.text_ids import joined
from pipelines.features import Feature, LabelFeature, TargetFeature, TextFeature
from pipelines.sources import Listing, Rejected, Sample, Unit, refuse_options
from pipelines.sources._common import choice, decode_utf8, shuffled_units, source_folder
from pipelines.sources._files import versions_of
from pipelines.sources._labels import label_number
from pipelines.sources._targets import target_values
from pipelines.sources.text import file_ranges, unit_documents

ROW_BYTES = 200
"""Bytes of a row, about, for the size of shards."""
HEADER_BYTES = 1 << 16
FILES = {"train": "train.tsv", "test": "dev.tsv"}
INFERENCE = ("entailment", "not_entailment")


class GlueTask(NamedTuple):
    """A task's folder and columns.

    Attributes:
        folder: below the source folder.
        texts: columns of the sentences.
        label: column of the label.
        names: classes in the order of the labels' numbers, or as the files write them; empty: a number.
        files: of each split.
        header: the columns of files without a line of names; empty: the first line has them.
    """

    folder: str
    texts: tuple[str, ...]
    label: str
    names: tuple[str, ...] = ()
    files: Mapping[str, str] = FILES
    header: tuple[str, ...] = ()


BOTH = ("sentence1", "sentence2")
TASKS = {
    "cola": GlueTask(
        "CoLA",
        ("sentence",),
        "label",
        ("unacceptable", "acceptable"),
        header=("source", "label", "original", "sentence"),
    ),
    "sst2": GlueTask("SST-2", ("sentence",), "label", ("negative", "positive")),
    "mrpc": GlueTask("MRPC", ("#1 String", "#2 String"), "Quality", ("not_equivalent", "equivalent")),
    "qqp": GlueTask("QQP", ("question1", "question2"), "is_duplicate", ("not_duplicate", "duplicate")),
    "stsb": GlueTask("STS-B", BOTH, "score", ()),
    "mnli": GlueTask(
        "MNLI",
        BOTH,
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        {"train": "train.tsv", "test": "dev_matched.tsv", "mismatched": "dev_mismatched.tsv"},
    ),
    "qnli": GlueTask("QNLI", ("question", "sentence"), "label", INFERENCE),
    "rte": GlueTask("RTE", BOTH, "label", INFERENCE),
}


class GlueSource:
    """The source.

    Option: `task` (`cola`, `sst2`, `mrpc`, `qqp`, `stsb`, `mnli`, `qnli` or `rte`).
    """

    title = "a task of GLUE from its usual files (SRC/MNLI/train.tsv, ...): sentences or pairs of sentences"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List ranges of the task's files."""
        refuse_options(options, ("task",))
        if "task" not in options:
            raise UserError(f"source glue needs --option task=TASK: wanted one of {', '.join(TASKS)}")
        name = choice(options, "task", TASKS, "")
        task = TASKS[name]
        folder = source_folder("glue", src, f"{task.folder}/{task.files['train']}")
        paths = {split: f"{task.folder}/{file}" for split, file in task.files.items()}
        columns = {path: _columns(folder, path, task) for path in paths.values()}
        size = shard_rows * ROW_BYTES
        parts = {split: list(file_ranges(folder, [path], size, whole=False)) for split, path in paths.items()}
        features: dict[str, Feature] = {"text": TextFeature()}
        features |= {"label": LabelFeature()} if task.names else {"target": TargetFeature(names=(task.label,))}
        return Listing(
            name=f"glue_{name}",
            features=features,
            classes=task.names,
            licence="not stated: see the tasks of gluebenchmark.com",
            origin=folder.url,
            units=shuffled_units(parts, random.Random(seed), 1, src=folder.url, task=name, columns=columns),
            notes=(f"test is {task.files['test']}, since the labels of the test file are not public",),
            versions=versions_of(folder, columns),
        )

    def samples(self, unit: Unit) -> Iterator[Sample | Rejected]:
        """Read the unit's rows."""
        task = TASKS[unit.content["task"]]
        numbers = {name: number for number, name in enumerate(task.names)}
        numbers |= {str(number): number for number in numbers.values()}
        for key, raw in unit_documents({**unit.content, "document": "line"}):
            columns = unit.content["columns"][key.rsplit("@", 1)[0]]
            try:
                if not task.header and key.endswith("@0"):
                    continue
                yield {"key": key, **_row(task, columns, numbers, raw)}
            except ValueError as error:
                yield Rejected(key, str(error))


def _columns(folder: Folder, path: str, task: GlueTask) -> tuple[str, ...]:
    """Return the columns of a file of a task, or raise `UserError` if it is another one."""
    with refusing(f"source folder {folder.url}", "check the place and the access to it"):
        if not folder.fs.isfile(folder.file(path)):
            raise UserError(f"{folder.file(path)} does not exist: wanted GLUE's files, as of gluebenchmark.com")
        head = folder.fs.cat_file(folder.file(path), start=0, end=HEADER_BYTES)
    try:
        line = decode_utf8(head.split(b"\n", 1)[0]).rstrip("\r")
    except ValueError as error:
        raise UserError(f"{folder.file(path)}: {error}: wanted GLUE's own file") from error
    columns = task.header or tuple(line.split("\t"))
    if missing := [name for name in (*task.texts, task.label) if name not in columns]:
        raise UserError(
            f"{folder.file(path)} has no column {', '.join(missing)}; it has {line[:200]!r}: wanted GLUE's own file"
        )
    return columns


def _row(task: GlueTask, columns: Sequence[str], numbers: Mapping[str, int], raw: bytes) -> dict[str, Any]:
    """Return the features of a row; raise `ValueError` with the reason if it cannot be used."""
    cells = decode_utf8(raw).rstrip("\r\n").split("\t")
    if len(cells) != len(columns):
        raise ValueError(f"{len(cells)} columns, wanted {len(columns)}")
    row = dict(zip(columns, cells, strict=True))
    texts = [row[name].strip() for name in task.texts]
    if not all(texts):
        raise ValueError("an empty sentence")
    text = joined(*texts)
    if not task.names:
        return {"text": text, "target": target_values(row, [task.label])}
    return {"text": text, "label": label_number(row[task.label].strip(), numbers, len(task.names))}


source = GlueSource()
