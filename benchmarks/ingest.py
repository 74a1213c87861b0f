"""Reading speed, ours beside other loaders, in one run: the same encoded samples, transforms and two processes.

    pip install --target peers webdataset mosaicml-streaming litdata                  # the extra peers
    PYTHONPATH=peers python benchmarks/ingest.py --data /tmp/ingest                    # all rows, as a table
    PYTHONPATH=peers python benchmarks/ingest.py --data /tmp/ingest --kind image --json    # one line a measurement

The first call makes the data (5,000 JPEGs of 500 x 375 and about 90 KB from photographs and film frames that packages
carry, 4 s of sound as FLAC and as WAV, point clouds) and each loader's own layout of them below `--data`; that time is
not measured. Every loader runs the same decoding and transforms (`Kind.sample`: Inception crop, flip and resize to
224 x 224 uint8; a random second; a random 2,048 points, normalised) and gives torch batches of 64. Each measurement is
a process of its own, with the allocator's settings of our training workers; the loaders take turns, `--repeats` times,
so that other work on the machine meets all alike.

`per_second` is samples a second once fifty batches have passed (processes, memory and page cache are warm then), the
median; `cpu_ms` the CPU milliseconds of a sample over all processes, which other work disturbs less; `memory_mb` the
process tree's proportional set size when the measurement ends, since adding it up takes the more time from a loader
the more processes it has; `first_s` the seconds from the loader's construction to its first batch, imports and
`ray.init` apart. `ceiling` is the bare loop: two processes that decode and transform samples from memory and hand
nothing over. `of_ceiling` relates the rates, `of_ceiling_cpu` the CPU of the ceiling to that of the loader. `ours-s3`
reads from an S3 server on this machine that answers each request 20 ms late, to be held against `ours-part`, the same
samples from the disk.
"""

import argparse
import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import ingest_data  # noqa: E402
from benchmarks.ingest_data import KINDS, PROCESSES, Kind  # noqa: E402
from cluster.local import QUIET_ENVIRONMENT, STORE_MB, ClusterConfig, set_quiet_environment, start_ray  # noqa: E402

BATCH = 64
WARM = 50
S3_SAMPLES = 1500
DELAY_S = 0.02
BEYOND = 8192
"""Samples that ours is asked for beyond a measurement, so that it ends with as many on the way as it began with."""
BUCKET = "data"
SECRET = {"key": "testing", "secret": "testing"}
PEERS = {"webdataset": "webdataset", "streaming": "mosaicml-streaming", "litdata": "litdata"}

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


def ours(kind: Kind, folder: Path, samples: int, url: str | None = None, **options: Any) -> Batches:
    """`train_batches` on Ray Data."""
    from pipelines.ingest import TrainShare, load_data, train_batches

    data = kind.view.model_copy(update={"url": url or str(ingest_data.shards(kind, folder)), **options})
    share = TrainShare(0, BATCH, BATCH, 0, samples // BATCH)
    return (batch[kind.key] for batch in train_batches(data, load_data(data), share, "cpu"))


def ours_part(kind: Kind, folder: Path, samples: int) -> Batches:
    """The first shards alone, from the disk."""
    return ours(kind, folder, samples, url=str(_part(kind, folder)))


def ours_s3(kind: Kind, folder: Path, samples: int) -> Batches:
    """The same shards from the S3 server of the parent process."""
    options = {**SECRET, "endpoint_url": os.environ["BENCHMARK_S3"]}
    return ours(kind, folder, samples, url=f"s3://{BUCKET}/{kind.name}", storage_options=options)


def _part(kind: Kind, folder: Path) -> Path:
    """A folder with the first shards only."""
    from pipelines.shards import load_manifest, save_manifest
    from pipelines.storage import open_folder

    whole, part = ingest_data.shards(kind, folder), folder / kind.name / "part"
    manifest = load_manifest(str(whole))
    split = manifest.splits["train"]
    shards = split.shards[:max(1, S3_SAMPLES // split.shards[0].rows)]
    part.mkdir(exist_ok=True)
    for shard in shards:
        if not (part / shard.name).exists():
            (part / shard.name).hardlink_to(whole / shard.name)
    part_of = split.model_copy(update={"shards": shards})
    save_manifest(manifest.model_copy(update={"splits": {"train": part_of}}), open_folder(str(part)))
    return part


def torch_files(kind: Kind, folder: Path, samples: int) -> Batches:
    """torch's DataLoader over the files."""
    import torch.utils.data

    files, view = ingest_data.raw_files(kind, folder), View(kind.name)

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> np.ndarray:
            return view(files[index].read_bytes())

    loader = torch.utils.data.DataLoader(Files(), BATCH, shuffle=True, num_workers=PROCESSES, persistent_workers=True,
                                         drop_last=True, prefetch_factor=4)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def webdataset(kind: Kind, folder: Path, samples: int) -> Batches:
    """webdataset over tars."""
    wds = ingest_data.peer("webdataset")
    urls = sorted(map(str, ingest_data.tars(kind, folder).glob("*.tar")))
    data = (wds.WebDataset(urls, shardshuffle=len(urls), nodesplitter=wds.split_by_node).repeat().shuffle(512)
            .map(View(kind.name, kind.suffix)).batched(BATCH, collation_fn=np.stack, partial=False))
    return iter(wds.WebLoader(data, batch_size=None, num_workers=PROCESSES, prefetch_factor=4))


def streaming(kind: Kind, folder: Path, samples: int) -> Batches:
    """MosaicML Streaming over MDS."""
    from torch.utils.data import DataLoader

    view = View(kind.name, "data")

    class Mapped(ingest_data.peer("streaming").StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return view(super().__getitem__(at))

    data = Mapped(local=str(ingest_data.mds(kind, folder)), shuffle=True, batch_size=BATCH)
    loader = DataLoader(data, BATCH, num_workers=PROCESSES, drop_last=True, persistent_workers=True, prefetch_factor=4)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def litdata(kind: Kind, folder: Path, samples: int) -> Batches:
    """litdata over its chunks."""
    lit = ingest_data.peer("litdata")
    data = lit.StreamingDataset(str(ingest_data.chunks(kind, folder)), shuffle=True, drop_last=True,
                            transform=View(kind.name, "data"))
    loader = lit.StreamingDataLoader(data, batch_size=BATCH, num_workers=PROCESSES, drop_last=True,
                                     persistent_workers=True, prefetch_factor=4)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def plain_ray(kind: Kind, folder: Path, samples: int) -> Batches:
    """Ray Data as its guide shows it: `read_images` and a map (other kinds: `read_binary_files`); one epoch a pass."""
    import ray.data
    from PIL import Image

    from pipelines.transforms.image import training_view

    root = str(ingest_data.raw_files(kind, folder)[0].parent.parent)
    view = View(kind.name, "bytes")

    def transform(row: dict[str, Any]) -> dict[str, Any]:
        if kind.name != "image":
            return {"data": view(row)}
        picture = Image.fromarray(row["image"])
        return {"data": training_view(picture, (224, 224), kind.view.augment, _generator)}

    ray.data.DataContext.get_current().enable_progress_bars = False
    read = ray.data.read_images(root, mode="RGB") if kind.name == "image" else ray.data.read_binary_files(root)
    data = read.map(transform)
    return itertools.chain.from_iterable(data.iter_torch_batches(batch_size=BATCH, drop_last=True)
                                         for _ in itertools.count())


LOADERS: dict[str, Callable[[Kind, Path, int], Batches]] = {
    "ours": ours, "torch": torch_files, "webdataset": webdataset, "streaming": streaming, "litdata": litdata,
    "ray": plain_ray, "ours-part": ours_part, "ours-s3": ours_s3}


def bare_loop(kind: str, folder: str, samples: int, ready: Any, start: Any) -> None:
    """One process of the ceiling."""
    files = ingest_data.raw_files(KINDS[kind], Path(folder))
    encoded = [path.read_bytes() for path in files[:1000]]
    view = View(kind)
    view(encoded[0])
    ready.release()
    start.wait()
    for number in range(samples // PROCESSES):
        np.ascontiguousarray(view(encoded[number % len(encoded)]))


def ceiling(kind: Kind, folder: Path, samples: int) -> dict[str, float]:
    """Samples a second of two bare loops."""
    context = multiprocessing.get_context("spawn")
    ready, start = context.Semaphore(0), context.Event()
    loops = [context.Process(target=bare_loop, args=(kind.name, str(folder), samples, ready, start))
             for _ in range(PROCESSES)]
    for loop in loops:
        loop.start()
    for _ in loops:
        ready.acquire()
    memory = tree_memory()
    before, began = tree_cpu(), time.perf_counter()
    start.set()
    peak = 0.0
    while any(loop.is_alive() for loop in loops):
        peak = max(peak, tree_cpu())
        for loop in loops:
            loop.join(0.05)
    seconds = time.perf_counter() - began
    return {"per_second": samples / seconds, "cpu_ms": (peak - before) / samples * 1e3, "first_s": 0.0,
            "memory_mb": memory}


def tree_cpu() -> float:
    """CPU seconds of this process and all below it that live."""
    return sum(sum(_cpu(process)) for process in _tree())


def _cpu(process: psutil.Process) -> tuple[float, float]:
    try:
        times = process.cpu_times()
        return times.user, times.system
    except psutil.Error:
        return 0.0, 0.0


def _tree() -> list[psutil.Process]:
    root = psutil.Process()
    return [root, *root.children(recursive=True)]


def measure(name: str, kind: Kind, folder: Path, samples: int) -> dict[str, float]:
    """Rate, CPU, time to the first batch and memory at the end of one loader; runs in a process of its own."""
    if name == "ceiling":
        return ceiling(kind, folder, samples)
    if name.startswith("ours"):
        set_quiet_environment()
        start_ray(ClusterConfig())
    elif name == "ray":
        import ray

        ray.init(address="local", num_cpus=PROCESSES, include_dashboard=False, object_store_memory=STORE_MB * 1_000_000,
                 log_to_driver=False, logging_level=logging.ERROR)
    began = time.perf_counter()
    batches = LOADERS[name](kind, folder, samples + (WARM + 1) * BATCH + BEYOND)
    shape = tuple(next(batches).shape)
    first = time.perf_counter()
    for _ in range(WARM):
        next(batches)
    start, before, done = time.perf_counter(), tree_cpu(), 0
    while done < samples:
        assert tuple(next(batches).shape) == shape
        done += BATCH
    rate = done / (time.perf_counter() - start)
    cpu_ms = (tree_cpu() - before) / done * 1e3
    return {"per_second": rate, "cpu_ms": cpu_ms, "first_s": first - began, "memory_mb": tree_memory()}


def leave() -> NoReturn:
    """End at once, with all processes below: loaders stopped in the middle keep an interpreter from ending.

    The last one first: a process whose raylet is gone ends with an error of its own.
    """
    for process in reversed(_tree()[1:]):
        with contextlib.suppress(psutil.Error):
            process.kill()
    os._exit(0)


def tree_memory() -> float:
    """Megabytes of this process and all below it, what they share counted once."""
    return sum(map(_pss, _tree())) / 1e6


def _pss(process: psutil.Process) -> float:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0.0


def serve(kind: Kind, folder: Path) -> None:
    """An S3 server that holds the part and answers late; prints its address, and runs until its input ends."""
    import boto3

    from tests.pipelines.faulty_s3 import FaultyS3

    server = FaultyS3()
    client = boto3.client("s3", endpoint_url=server.url, aws_access_key_id=SECRET["key"],
                          aws_secret_access_key=SECRET["secret"], region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    for path in _part(kind, folder).iterdir():
        client.upload_file(str(path), BUCKET, f"{kind.name}/{path.name}")
    server.delay = DELAY_S
    print(server.url, flush=True)
    sys.stdin.read()
    server.close()


def table(results: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Medians over the repeats, beside the ceiling of the same kind."""
    key = lambda row: (row["kind"], row["loader"])
    groups = {place: list(rows) for place, rows in itertools.groupby(sorted(results, key=key), key)}
    figures = ("per_second", "cpu_ms", "first_s", "memory_mb")
    for (kind, loader), rows in groups.items():
        row = {"kind": kind, "loader": loader} | {
            figure: round(statistics.median(r[figure] for r in rows), 3) for figure in figures}
        limit = groups.get((kind, "ceiling"))
        if limit:
            rate = statistics.median(r["per_second"] for r in limit)
            row["of_ceiling"] = round(row["per_second"] / rate, 3)
            row["of_ceiling_cpu"] = round(statistics.median(r["cpu_ms"] for r in limit) / row["cpu_ms"], 3)
        yield row


def main() -> None:
    """Parse, make what is missing, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", required=True, type=Path, help="folder of the data; about 4 GB")
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--loader", choices=["ceiling", *LOADERS], action="append", help="default: all")
    parser.add_argument("--samples", type=int, default=5120, help="of a measurement of images; others: twice as many")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print lines of JSON")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(KINDS[options.kind[0]], options.data)
    if options.one:
        print(json.dumps(measure(options.loader[0], KINDS[options.kind[0]], options.data, options.samples)), flush=True)
        leave()
    results = [row for kind in options.kind or KINDS for row in compare(KINDS[kind], options)]
    for row in table(results):
        print(json.dumps(row) if options.json else "| " + " | ".join(map(str, row.values())) + " |")
    return None


def compare(kind: Kind, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure all loaders on one kind, in turns; those that are not installed are named."""
    print(ingest_data.facts(kind, options.data), file=sys.stderr)
    names = options.loader or ["ceiling", *(name for name in LOADERS if kind.name == "image" or "-" not in name)]
    loaders = []
    for name in names:
        if name in PEERS and (reason := _cannot(name)):
            print(f"{PEERS[name]} is left out, since it cannot be imported: {reason}", file=sys.stderr)
        else:
            loaders.append(name)
            if name in PEERS:
                {"webdataset": ingest_data.tars, "streaming": ingest_data.mds, "litdata": ingest_data.chunks}[name](
                    kind, options.data)
    ingest_data.shards(kind, options.data)
    allocator = {name: value for name, value in QUIET_ENVIRONMENT.items() if name.startswith("MALLOC_")}
    env = {**os.environ, **allocator, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "DO_NOT_TRACK": "true"}
    this = [sys.executable, __file__, f"--data={options.data}", f"--kind={kind.name}"]
    server = None
    if "ours-s3" in loaders:
        server = subprocess.Popen([*this, "--serve"], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, env=env)
        assert server.stdout is not None
        env["BENCHMARK_S3"] = server.stdout.readline().strip()
    samples = options.samples * (1 if kind.name == "image" else 2)
    for _, name in itertools.product(range(options.repeats), loaders):
        done = subprocess.run([*this, "--one", f"--loader={name}", f"--samples={samples}"], env=env, text=True,
                              capture_output=True)
        if done.returncode:
            raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")
        row = {"kind": kind.name, "loader": name, **json.loads(done.stdout.splitlines()[-1])}
        print(json.dumps(row), file=sys.stderr)
        yield row
    if server:
        server.communicate()


def _cannot(name: str) -> str:
    """Why a peer cannot be imported; empty if it can. Asked in a process of its own, since imports leave traces."""
    code = f"from benchmarks.ingest_data import peer; peer('{name}')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


if __name__ == "__main__":
    main()
