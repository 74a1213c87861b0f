"""The loaders of `benchmarks/ingest.py`, ours and the others: endless batches of one kind of data."""

import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import ingest_data
from benchmarks.ingest_data import KINDS, PROCESSES, Kind

BATCH = 64
S3_SAMPLES = 1500
ENDLESS = 10**8
"""Samples that ours is asked for, so that a measurement ends with as many on the way as it began with."""
BUCKET = "data"
SECRET = {"key": "testing", "secret": "testing"}

Batches = Iterator[Any]


def _generator() -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(os.urandom(8), "little"))


class View:
    """A kind's transform, for loaders that call it in worker processes; one generator a process."""

    def __init__(self, kind: str, field: str | None = None) -> None:
        self.kind, self.field = kind, field
        self._rng: np.random.Generator | None = None

    def __call__(self, encoded: Any) -> np.ndarray:
        self._rng = self._rng or _generator()
        return KINDS[self.kind].sample(encoded[self.field] if self.field else encoded, self._rng)

    def __getstate__(self) -> dict[str, Any]:
        return {"kind": self.kind, "field": self.field, "_rng": None}


def ours(kind: Kind, folder: Path, url: str | None = None, **options: Any) -> Batches:
    """Read with `train_batches` on Ray Data."""
    from pipelines.feed.ingest import TrainShare, load_data, train_batches

    data = kind.view.model_copy(update={"url": url or str(ingest_data.arrow_shards(kind, folder)), **options})
    share = TrainShare(0, BATCH, BATCH, 0, ENDLESS // BATCH)
    return (batch[kind.key] for batch in train_batches(data, load_data(data), share, "cpu"))


def ours_balanced(kind: Kind, folder: Path) -> Batches:
    """Read in the balanced order, whose samples are each in another row group."""
    return ours(kind, folder, order="balanced")


def ours_part(kind: Kind, folder: Path) -> Batches:
    """Read the first shards alone, from the disk."""
    return ours(kind, folder, url=str(part_of(kind, folder)))


def ours_s3(kind: Kind, folder: Path) -> Batches:
    """Read the same shards from the S3 server of the parent process."""
    options = {**SECRET, "endpoint_url": os.environ["BENCHMARK_S3"]}
    return ours(kind, folder, url=f"s3://{BUCKET}/{kind.name}", storage_options=options)


def part_of(kind: Kind, folder: Path) -> Path:
    """Return a folder with the first shards only."""
    from perceiver.storage import open_folder
    from pipelines.shards.manifest import load_manifest, save_manifest

    whole, part = ingest_data.arrow_shards(kind, folder), folder / kind.name / "arrow_part"
    manifest = load_manifest(str(whole))
    split = manifest.splits["train"]
    shards = split.shards[: max(1, S3_SAMPLES // split.shards[0].rows)]
    part.mkdir(exist_ok=True)
    for shard in shards:
        if not (part / shard.name).exists():
            (part / shard.name).hardlink_to(whole / shard.name)
    fewer = split.model_copy(update={"shards": shards})
    save_manifest(manifest.model_copy(update={"splits": {"train": fewer}}), open_folder(str(part)))
    return part


def torch_files(kind: Kind, folder: Path) -> Batches:
    """Read with torch's DataLoader over the files."""
    import torch.utils.data

    files, view = ingest_data.raw_files(kind, folder), View(kind.name)

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> np.ndarray:
            return view(files[index].read_bytes())

    loader = torch.utils.data.DataLoader(
        Files(), BATCH, shuffle=True, num_workers=PROCESSES, persistent_workers=True, drop_last=True, prefetch_factor=4
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def webdataset(kind: Kind, folder: Path) -> Batches:
    """Read with webdataset over tars."""
    wds = ingest_data.peer("webdataset")
    urls = sorted(map(str, ingest_data.tars(kind, folder).glob("*.tar")))
    data = (
        wds.WebDataset(urls, shardshuffle=len(urls), nodesplitter=wds.split_by_node)
        .repeat()
        .shuffle(512)
        .map(View(kind.name, kind.suffix))
        .batched(BATCH, collation_fn=np.stack, partial=False)
    )
    return iter(wds.WebLoader(data, batch_size=None, num_workers=PROCESSES, prefetch_factor=4))


def streaming(kind: Kind, folder: Path) -> Batches:
    """Read with MosaicML Streaming over MDS."""
    from torch.utils.data import DataLoader

    view = View(kind.name, "data")

    class Mapped(ingest_data.peer("streaming").StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return view(super().__getitem__(at))

    data = Mapped(local=str(ingest_data.mds(kind, folder)), shuffle=True, batch_size=BATCH)
    loader = DataLoader(data, BATCH, num_workers=PROCESSES, drop_last=True, persistent_workers=True, prefetch_factor=4)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def litdata(kind: Kind, folder: Path) -> Batches:
    """Read with litdata over its chunks."""
    lit = ingest_data.peer("litdata")
    data = lit.StreamingDataset(
        str(ingest_data.chunks(kind, folder)), shuffle=True, drop_last=True, transform=View(kind.name, "data")
    )
    loader = lit.StreamingDataLoader(
        data, batch_size=BATCH, num_workers=PROCESSES, drop_last=True, persistent_workers=True, prefetch_factor=4
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def spdl_threads(kind: Kind, folder: Path) -> Batches:
    """Read with SPDL's pipeline over the files, one sample at a time in threads, as in its guide."""
    local = threading.local()

    def load(path: str) -> np.ndarray:
        if not hasattr(local, "view"):
            local.view = View(kind.name)
        return local.view(Path(path).read_bytes())

    builder = ingest_data.peer("spdl.pipeline").PipelineBuilder().add_source(_endless_files(kind, folder))
    builder = builder.pipe(load, concurrency=PROCESSES).aggregate(BATCH).pipe(_stacked)
    return _sunk(builder)


def spdl_processes(kind: Kind, folder: Path) -> Batches:
    """Read with SPDL's pipeline over the files, one batch at a time in processes, since Python has a global lock."""
    pool = ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("forkserver"))
    builder = ingest_data.peer("spdl.pipeline").PipelineBuilder().add_source(_endless_files(kind, folder))
    load = LoadBatch(View(kind.name))
    builder = builder.aggregate(BATCH).pipe(load, concurrency=PROCESSES, executor=pool).pipe(_tensor)
    return _sunk(builder)


class LoadBatch:
    """Reads, decodes and stacks the files of a batch, in a process of a pool."""

    def __init__(self, view: View) -> None:
        self.view = view

    def __call__(self, paths: list[str]) -> np.ndarray:
        return np.stack([self.view(Path(path).read_bytes()) for path in paths])


def _endless_files(kind: Kind, folder: Path) -> Iterator[str]:
    files = ingest_data.raw_files(kind, folder)
    return (str(files[number]) for _ in itertools.count() for number in _generator().permutation(len(files)))


def _stacked(samples: list[np.ndarray]) -> Any:
    return _tensor(np.stack(samples))


def _tensor(batch: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(batch)


def _sunk(builder: Any) -> Batches:
    pipeline = builder.add_sink(4).build(num_threads=PROCESSES)
    with pipeline.auto_stop():
        yield from pipeline.get_iterator()


def plain_ray(kind: Kind, folder: Path) -> Batches:
    """Read with Ray Data as in its guide: `read_images` (or `read_binary_files`) and a map; one epoch per pass."""
    import ray.data

    from pipelines.transforms.image import training_view

    root = str(ingest_data.raw_files(kind, folder)[0].parent.parent)
    view = View(kind.name, "bytes")

    def transform(row: dict[str, Any]) -> dict[str, Any]:
        if kind.name != "image":
            return {"data": view(row)}
        return {"data": training_view(row["image"], (224, 224), kind.view.augment, _generator)}

    ray.data.DataContext.get_current().enable_progress_bars = False
    read = ray.data.read_images(root, mode="RGB") if kind.name == "image" else ray.data.read_binary_files(root)
    data = read.map(transform)
    return itertools.chain.from_iterable(
        data.iter_torch_batches(batch_size=BATCH, drop_last=True) for _ in itertools.count()
    )


LOADERS: dict[str, Callable[[Kind, Path], Batches]] = {
    "ours": ours,
    "torch": torch_files,
    "webdataset": webdataset,
    "streaming": streaming,
    "litdata": litdata,
    "spdl": spdl_threads,
    "spdl_processes": spdl_processes,
    "ray": plain_ray,
    "ours-balanced": ours_balanced,
    "ours-part": ours_part,
    "ours-s3": ours_s3,
}
