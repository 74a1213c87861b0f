"""Execution on Ray Data: runs of steps become batches of tensors, in order, without a stall at any boundary.

Imported only where batches are consumed: data tasks need neither this module nor, unless they resize, torch.
"""

import contextlib
import itertools
import logging
import math
import queue
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray.data
import torch
from ray.data.collate_fn import ArrowBatchCollateFn
from ray.data.util.torch_utils import arrow_batch_to_tensors
from ray.exceptions import RayTaskError

from perceiver.config import UserError
from perceiver.storage import escaped
from pipelines.feed.samples import PROBLEM, RankWork, produce

RUNS_PER_DATASET = 64
"""Runs of one Ray Dataset. The next Dataset starts before the last one ends."""

Run = tuple[int, int]
"""Steps [start, stop)."""
Tensors = dict[str, torch.Tensor]
Lines = queue.SimpleQueue[str]


@dataclass(frozen=True)
class RayOptions:
    """Limits of the data tasks of one worker.

    Attributes:
        cpus_per_task: CPUs that a data task reserves.
        tasks: data tasks at a time.
        prefetch_batches: batches ahead of the consumer, in whole blocks.
        bytes_in_flight: limit of decoded bytes that wait in the object store.
        block_bytes: size of the blocks that a task returns.
        task_memory: bytes of memory that a data task reserves; 0 for none.
        labels: of the nodes that data tasks may run on; empty for any.
    """

    cpus_per_task: float
    tasks: int
    prefetch_batches: int
    bytes_in_flight: int
    block_bytes: int
    task_memory: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)


class Collate(ArrowBatchCollateFn):
    """Convert Arrow rows to contiguous tensors. Problem lines go to a queue, since tensors have no strings."""

    def __init__(self, problems: Lines) -> None:
        self.problems = problems

    def __call__(self, batch: pa.Table) -> Tensors:
        for line in batch.column(PROBLEM).to_pylist():
            if line:
                self.problems.put(line)
        tensors = arrow_batch_to_tensors(batch.drop_columns([PROBLEM]), combine_chunks=True)
        return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


class _RunningDataset:
    """The batches of a Dataset that has started: the constructor waits for the first one.

    Args:
        batches: Ray's iterator; its `close` ends the Dataset's execution.
        count: number of batches.
    """

    def __init__(self, batches: Generator[Tensors, None, None], count: int) -> None:
        self.batches, self.count = batches, count
        self._first = next(batches)

    def __iter__(self) -> Iterator[Tensors]:
        yield self._first
        yield from self.batches

    def close(self) -> None:
        """End the execution."""
        self.batches.close()


def cut(
    blocks: Generator[Tensors, None, None], rows: int, device: torch.device | str = "cpu"
) -> Generator[Tensors, None, None]:
    """Yield batches of `rows` rows on a device from blocks of any size; whole batches in a block are views, not copies.

    If Ray cut the blocks, each batch would pass on its own through all stages that a block passes through. In a Ray
    Train worker Ray has already moved a block to the worker's device, in a background thread. It is not asked for
    `device`, which older versions (2.57 does) refuse together with `collate_fn`.
    """
    with contextlib.closing(blocks):
        rest: Tensors = {}
        for block in blocks:
            block = {name: tensor.to(device, non_blocking=True) for name, tensor in block.items()}
            if rest:
                block = {name: torch.cat([rest[name], tensor]) for name, tensor in block.items()}
            count = len(next(iter(block.values())))
            for first in range(0, count - rows + 1, rows):
                yield {name: tensor[first : first + rows] for name, tensor in block.items()}
            over = count % rows
            rest = {name: tensor[-over:] for name, tensor in block.items()} if over else {}
        assert not rest, "the rows of a step are a multiple of a batch's"


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Raise a `UserError` that a task raised as one line, without its traceback and Ray's advice."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(cause := error.cause, UserError):
            raise UserError(escaped(str(cause).partition("\n")[0])) from None
        raise


class RayBatches:
    """One worker's batches: an iterator over (tensors, problem lines).

    Args:
        work: what to produce; the rows of a step must be a multiple of `batch_size`.
        runs: consecutive steps, taken as needed.
        batch_size: rows of a batch.
        device: of the tensors.
        options: limits.
    """

    def __init__(
        self, work: RankWork, runs: Iterator[Run], batch_size: int, device: torch.device | str, options: RayOptions
    ) -> None:
        self.work, self.runs, self.batch_size, self.device, self.options = work, runs, batch_size, device, options
        self.problems: Lines = queue.SimpleQueue()

    def __iter__(self) -> Generator[tuple[Tensors, list[str]], None, None]:
        segment = None
        with plain_errors(), ThreadPoolExecutor(1, thread_name_prefix="next-segment") as starter:
            ahead = starter.submit(self._begin)
            try:
                while (segment := ahead.result()) is not None:
                    for number, batch in enumerate(segment):
                        # Half a Dataset is enough time to start the next one, however long a run takes.
                        if number == segment.count // 2:
                            ahead = starter.submit(self._begin)
                        yield batch, self._met()
            finally:
                for begun in (segment, None if ahead.exception() else ahead.result()):
                    if begun is not None:
                        begun.close()

    def _met(self) -> list[str]:
        lines = []
        while not self.problems.empty():
            lines.append(self.problems.get())
        return lines

    def _begin(self) -> _RunningDataset | None:
        """Start the Dataset of the next runs and wait for its first batch; None if no runs are left."""
        runs = list(itertools.islice(self.runs, RUNS_PER_DATASET))
        if not runs:
            return None
        dataset = make_dataset(self.work, runs, self.options)
        ahead = math.ceil(self.options.prefetch_batches * self.batch_size / self.work.chunk)
        blocks: Any = iter(
            dataset.iter_torch_batches(batch_size=None, prefetch_batches=ahead, collate_fn=Collate(self.problems))
        )
        rows = sum(stop - start for start, stop in runs) * self.work.rows_per_step
        return _RunningDataset(cut(blocks, self.batch_size, self.device), rows // self.batch_size)


def steps_of(streams: Sequence[RayBatches], micro_batch: int) -> Generator[tuple[Tensors, list[str]], None, None]:
    """Yield micro-batches of steps. The streams' batches are the parts of a step, in order.

    Problem lines come with a step's first micro-batch.
    """
    opened = [iter(stream) for stream in streams]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(opened), thread_name_prefix="first-batch") as pool:
        for stream in opened:
            stack.callback(stream.close)
        first = [[part] if part else [] for part in pool.map(lambda stream: next(stream, None), opened)]
        for parts in zip(*map(itertools.chain, first, opened), strict=True):
            rows = {name: torch.cat([tensors[name] for tensors, _ in parts]) for name in parts[0][0]}
            lines = [line for _, found in parts for line in found]
            for at in range(0, len(rows[next(iter(rows))]), micro_batch):
                yield {name: tensor[at : at + micro_batch] for name, tensor in rows.items()}, lines
                lines = []


def make_dataset(work: RankWork, runs: list[Run], options: RayOptions) -> ray.data.Dataset:
    """Return the lazy Ray Dataset of some runs: one small input block and one task per run, outputs in order."""
    _quiet()
    dataset = ray.data.from_items(
        [{"start": start, "stop": stop} for start, stop in runs], override_num_blocks=len(runs)
    )
    function: Any = produce
    dataset = dataset.map_batches(
        function,
        fn_kwargs={"work": work},
        batch_size=None,
        num_cpus=options.cpus_per_task,
        memory=options.task_memory or None,
        compute=ray.data.TaskPoolStrategy(size=min(options.tasks, len(runs))),
    )
    context = dataset.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1
    context.target_max_block_size = options.block_bytes
    context.execution_options.preserve_order = True
    context.execution_options.label_selector = dict(options.labels) or None
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        cpu=options.tasks * options.cpus_per_task, object_store_memory=options.bytes_in_flight
    )
    return dataset


def _quiet() -> None:
    """Keep Ray Data's messages on each Dataset off the terminal; its warnings stay."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
