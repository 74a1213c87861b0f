"""The samples of each step: in memory since the last checkpoint, and on disk if the run has a ledger.

A ledger is a folder of Parquet files, one per rank and interval of steps, with columns `step` and `sample_id` (-1: a
row without a usable sample)::

    ledger/steps-00000001-00000012/rank-00000.parquet
    ledger/steps-00000013-00000024/rank-00000-00000002.parquet      written by the second driver of the run
    ledger/void-00000009-00000015.json      rolled-back steps: their samples had no effect on the weights

A rank writes its part before its receipt for the checkpoint that ends the interval, so all steps before a checkpoint
are recorded. When a run resumes, later entries are removed, because those steps run again. What a driver wrote of the
steps after the start of a later one does not count (`perceiver.train.checkpoint.fence`).
"""

import json
import re
from io import BytesIO

import torch
from torch import Tensor

from perceiver.storage import entry_names, open_url, write_whole
from perceiver.train.checkpoint.fence import Fence
from perceiver.train.loop import StepInfo

PART = re.compile(r"(?:steps|void)-(\d+)-(\d+)(?:\.json)?")


class SampleLog:
    """A hook that stores the sample ids of this rank's last steps; they stay on the device until they are written.

    It must come before hooks that may raise.
    """

    def __init__(self) -> None:
        self.steps: dict[int, tuple[Tensor, ...]] = {}

    def __call__(self, info: StepInfo) -> None:
        # Copies: a batch's tensors may be views that would keep a whole block of data alive.
        self.steps[info.step] = tuple(ids.clone() for ids in info.sample_ids)

    def forget(self, last: int) -> None:
        """Discard the steps up to `last`."""
        self.steps = {step: ids for step, ids in self.steps.items() if step > last}

    def table(self, first: int, last: int) -> bytes:
        """Return the steps (first, last] as a Parquet file."""
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

    def load(self, blob: bytes) -> None:
        """Add the steps of a file that `table` returned."""
        import pyarrow.parquet as pq

        ids: dict[int, list[int]] = {}
        table = pq.read_table(BytesIO(blob))
        for step, sample in zip(table["step"].to_pylist(), table["sample_id"].to_pylist(), strict=True):
            ids.setdefault(step, []).append(sample)
        for step, samples in ids.items():
            self.steps[step] = (*self.steps.get(step, ()), torch.tensor(samples))


class Ledger:
    """The ledger of a run at a URL; each rank has one, with the claim for which it writes, if there is one.

    `written` is the last step whose samples are written: that of the newest checkpoint in the store.
    """

    def __init__(self, url: str, rank: int, samples: SampleLog, written: int, fence: Fence | None = None) -> None:
        self.fs, self.root = open_url(url.rstrip("/"))
        self.fence = fence
        self.rank, self.samples, self.written = rank, samples, written

    def record(self, step: int) -> None:
        """Write the steps up to `step` that are not written yet; called in the background, repeated after a failure."""
        if step > self.written:
            driver = f"-{self.fence.number:08d}" if self.fence else ""
            name = f"steps-{self.written + 1:08d}-{step:08d}/rank-{self.rank:05d}{driver}.parquet"
            self._write(name, self.samples.table(self.written, step))
            self.written = step

    def discard(self, target: int, step: int) -> None:
        """Record that the steps (target, step] were rolled back (rank 0)."""
        if self.rank == 0:
            steps = {"first": target + 1, "last": step}
            self._write(f"void-{target + 1:08d}-{step:08d}.json", json.dumps(steps).encode())

    def rewind(self, step: int) -> None:
        """Remove entries after the step from which the run resumes, and samples that will be written again (rank 0)."""
        for name in entry_names(self.fs, self.root):
            found = PART.fullmatch(name)
            if found and int(found[2]) > (step if name.startswith("void") else self.written):
                self.fs.rm(f"{self.root}/{name}", recursive=True)

    def _write(self, name: str, blob: bytes) -> None:
        if self.fence is not None:
            self.fence.check()
        write_whole(f"{self.root}/{name}", blob, self.fs)
