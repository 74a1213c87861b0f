"""Which samples went into which step: kept in memory since the last checkpoint, on disk if the run keeps a ledger.

A ledger is a folder of Parquet files, one a rank for each stretch of steps, columns `step` and `sample_id` (-1: a row
without a usable sample)::

    ledger/steps-00000001-00000012/rank-00000.parquet
    ledger/void-00000009-00000015.json      steps that were rolled back: their samples have left no trace in the weights

A rank writes its part before its receipt for the checkpoint that ends the stretch, so what a resumed run builds on is
always recorded; what lies behind the checkpoint that it resumes from is removed then, since those steps come again.
"""

import json
import re
from io import BytesIO
from typing import Any

import fsspec
import torch
from torch import Tensor

from perceiver.train.loop import StepInfo

PART = re.compile(r"(?:steps|void)-(\d+)-(\d+)(?:\.json)?")


class SampleLog:
    """A hook that remembers the sample ids of this rank's last steps; they stay on the device until they are asked for.

    Put it before the hooks that may end a step early.
    """

    def __init__(self) -> None:
        self.steps: dict[int, tuple[Tensor, ...]] = {}

    def __call__(self, info: StepInfo) -> None:
        # Copies: a batch's tensors may be views into the block of data that they came in, which would be kept alive.
        self.steps[info.step] = tuple(ids.clone() for ids in info.sample_ids)

    def forget(self, last: int) -> None:
        """Drop the steps up to the last one."""
        self.steps = {step: ids for step, ids in self.steps.items() if step > last}

    def table(self, first: int, last: int) -> bytes:
        """The steps (first, last] as a Parquet file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, list[int]] = {"step": [], "sample_id": []}
        for step, tensors in list(self.steps.items()):
            if first < step <= last and tensors:
                ids = torch.cat([ids.reshape(-1) for ids in tensors]).tolist()
                columns["step"] += [step] * len(ids)
                columns["sample_id"] += ids
        sink = BytesIO()
        schema = pa.schema([("step", pa.int64()), ("sample_id", pa.int64())])
        pq.write_table(pa.table(columns, schema=schema), sink)
        return sink.getvalue()


class Ledger:
    """The ledger of a run below a URL; each rank holds one."""

    def __init__(self, url: str, rank: int, samples: SampleLog, start_step: int) -> None:
        self.fs, self.root = fsspec.core.url_to_fs(url.rstrip("/"))
        self.rank, self.samples, self.written = rank, samples, start_step

    def record(self, step: int) -> None:
        """Write what was not written yet, up to a step; called in the background, again if it fails."""
        if step > self.written:
            name = f"steps-{self.written + 1:08d}-{step:08d}/rank-{self.rank:05d}.parquet"
            self._write(name, self.samples.table(self.written, step))
            self.written = step

    def void(self, target: int, step: int) -> None:
        """Note that the steps (target, step] were rolled back (rank 0)."""
        if self.rank == 0:
            steps = {"first": target + 1, "last": step}
            self._write(f"void-{target + 1:08d}-{step:08d}.json", json.dumps(steps).encode())

    def rewind(self, step: int) -> None:
        """Remove what lies behind the step that the run resumes from (rank 0)."""
        for name in _names(self.fs, self.root):
            found = PART.fullmatch(name)
            if found and int(found[2]) > step:
                self.fs.rm(f"{self.root}/{name}", recursive=True)

    def _write(self, name: str, blob: bytes) -> None:
        path = f"{self.root}/{name}"
        self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        self.fs.pipe_file(path, blob)


def _names(fs: Any, root: str) -> list[str]:
    fs.invalidate_cache()
    if not fs.exists(root):
        return []
    return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(root, detail=False))
