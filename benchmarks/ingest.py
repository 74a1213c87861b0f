"""Reading speed, ours and other loaders in one run: the same encoded samples, transforms and two processes.

    pip install --target peers webdataset mosaicml-streaming litdata spdl             # the extra peers
    PYTHONPATH=peers python benchmarks/ingest.py --data /tmp/ingest                    # all rows, as a table
    PYTHONPATH=peers python benchmarks/ingest.py --data /tmp/ingest --kind image --json    # one line a measurement

The first call makes the data (5,000 JPEGs of 500 x 375 and about 90 KB from photographs and film frames that packages
carry, 4 s of sound as FLAC and as WAV, point clouds) and each loader's own layout of them below `--data`; that time is
not measured. Every loader runs the same decoding and transforms (`Kind.sample`: Inception crop, flip and resize to
224 x 224 uint8; a random second; a random 2,048 points, normalised) and gives torch batches of 64. Each measurement is
a separate process, with the allocator's settings of our training workers; the loaders take turns, `--repeats` times,
so that other work on the machine meets all alike.

`per_second` is samples per second over `--seconds`, after as many of `--warm` (each loader's processes, the memory they
share and the page cache are as in the middle of a run then), the median; `cpu_ms` the CPU milliseconds per sample over
all processes, which other work disturbs less; `memory_mb` the process tree's proportional set size when the measurement
ends, since adding it up takes the more time from a loader the more processes it has; `first_s` the seconds from the
loader's construction to its first batch, imports and `ray.init` apart. `ceiling` is the bare loop: two processes that
decode and transform samples from memory and hand nothing over. `of_ceiling` relates the rates, `of_ceiling_cpu` the CPU
of the ceiling to that of the loader. `ours-s3` reads from an S3 server on this machine that answers each request 20 ms
late, to be compared with `ours-part`, the same samples from the disk. `ours-balanced` is ours with
`data.order: balanced`.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import ingest_data  # noqa: E402
from benchmarks.ingest_data import KINDS, PROCESSES, Kind  # noqa: E402
from benchmarks.ingest_loaders import BATCH, BUCKET, LOADERS, SECRET, View, part_of  # noqa: E402
from cluster.recipe.resources import STORE_MB, ClusterConfig  # noqa: E402
from cluster.runtime.local import QUIET_ENVIRONMENT, set_quiet_environment, start_ray  # noqa: E402

DELAY_S = 0.02
BEGIN_S = 120
"""Seconds that a loader may take beyond those that it is measured for."""
PEERS = {"webdataset": ingest_data.tars, "streaming": ingest_data.mds, "litdata": ingest_data.chunks}
PEERS |= {"spdl": ingest_data.raw_files, "spdl_processes": ingest_data.raw_files}
"""Loaders whose packages may be missing, and what makes their data."""


def bare_loop(kind: str, folder: str, ready: Any, done: Any) -> None:
    """Run one process of the ceiling; count the samples."""
    files = ingest_data.raw_files(KINDS[kind], Path(folder))
    encoded = [path.read_bytes() for path in files[:1000]]
    view = View(kind)
    view(encoded[0])
    ready.release()
    while True:
        for one in encoded:
            np.ascontiguousarray(view(one))
            done.value += 1


def ceiling(kind: Kind, folder: Path, warm: float, seconds: float) -> dict[str, float]:
    """Return the samples per second of two bare loops."""
    context = multiprocessing.get_context("spawn")
    ready, counts = context.Semaphore(0), [context.Value("q", 0, lock=False) for _ in range(PROCESSES)]
    for done in counts:
        context.Process(target=bare_loop, args=(kind.name, str(folder), ready, done), daemon=True).start()
    for _ in counts:
        ready.acquire()
    time.sleep(warm)
    began, cpu, before = time.perf_counter(), tree_cpu(), sum(done.value for done in counts)
    time.sleep(seconds)
    samples = sum(done.value for done in counts) - before
    return {
        "per_second": samples / (time.perf_counter() - began),
        "cpu_ms": (tree_cpu() - cpu) / samples * 1e3,
        "first_s": 0.0,
        "memory_mb": tree_memory(),
    }


def tree_cpu() -> float:
    """Return the CPU seconds of this process and its living descendants."""
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


def measure(name: str, kind: Kind, folder: Path, warm: float, seconds: float) -> dict[str, float]:
    """Measure rate, CPU, time to the first batch and final memory of one loader; runs in a separate process."""
    if name == "ceiling":
        return ceiling(kind, folder, warm, seconds)
    if name.startswith("ours"):
        set_quiet_environment()
        start_ray(ClusterConfig())
    elif name == "ray":
        import ray

        ray.init(
            address="local",
            num_cpus=PROCESSES,
            include_dashboard=False,
            object_store_memory=STORE_MB * 1_000_000,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    began = time.perf_counter()
    batches = LOADERS[name](kind, folder)
    shape = tuple(next(batches).shape)
    first = time.perf_counter()
    while time.perf_counter() - first < warm:
        next(batches)
    start, before, done = time.perf_counter(), tree_cpu(), 0
    while time.perf_counter() - start < seconds:
        assert tuple(next(batches).shape) == shape
        done += BATCH
    rate = done / (time.perf_counter() - start)
    cpu_ms = (tree_cpu() - before) / done * 1e3
    return {"per_second": rate, "cpu_ms": cpu_ms, "first_s": first - began, "memory_mb": tree_memory()}


def leave() -> NoReturn:
    """End at once, with all processes below: loaders stopped in the middle keep an interpreter from ending."""
    end_below(psutil.Process())
    os._exit(0)


def end_below(process: psutil.Process) -> None:
    """End all processes below one, the last first: one whose raylet is gone exits with an error."""
    for child in reversed(process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            child.kill()


def tree_memory() -> float:
    """Return the megabytes of this process and its descendants, shared memory counted once."""
    return sum(map(_pss, _tree())) / 1e6


def _pss(process: psutil.Process) -> float:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0.0


def serve(kind: Kind, folder: Path) -> None:
    """Run an S3 server with the data that answers with a delay; print its address, and run until its input ends."""
    import boto3

    from tests.pipelines.faulty_s3 import FaultyS3

    server = FaultyS3()
    client = boto3.client(
        "s3",
        endpoint_url=server.url,
        aws_access_key_id=SECRET["key"],
        aws_secret_access_key=SECRET["secret"],
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=BUCKET)
    for path in part_of(kind, folder).iterdir():
        client.upload_file(str(path), BUCKET, f"{kind.name}/{path.name}")
    server.delay = DELAY_S
    print(server.url, flush=True)
    sys.stdin.read()
    server.close()


def table(results: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Return medians over the repeats, with the ceiling of the same kind."""
    key = lambda row: (row["kind"], row["loader"])
    groups = {place: list(rows) for place, rows in itertools.groupby(sorted(results, key=key), key)}
    figures = ("per_second", "cpu_ms", "first_s", "memory_mb")
    for (kind, loader), rows in groups.items():
        row = {"kind": kind, "loader": loader} | {
            figure: round(statistics.median(r[figure] for r in rows), 3) for figure in figures
        }
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
    parser.add_argument("--seconds", type=float, default=12, help="of a measurement")
    parser.add_argument("--warm", type=float, default=8, help="seconds from the first batch to the measurement")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print lines of JSON")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(KINDS[options.kind[0]], options.data)
    if options.one:
        found = measure(options.loader[0], KINDS[options.kind[0]], options.data, options.warm, options.seconds)
        print(json.dumps(found), flush=True)
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
            print(f"{name} is left out, since it cannot be imported: {reason}", file=sys.stderr)
        else:
            loaders.append(name)
            if name in PEERS:
                PEERS[name](kind, options.data)
    ingest_data.arrow_shards(kind, options.data)
    allocator = {name: value for name, value in QUIET_ENVIRONMENT.items() if name.startswith("MALLOC_")}
    env = {**os.environ, **allocator, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "DO_NOT_TRACK": "true"}
    this = [
        sys.executable,
        __file__,
        f"--data={options.data}",
        f"--kind={kind.name}",
        f"--warm={options.warm}",
        f"--seconds={options.seconds}",
    ]
    server = None
    if "ours-s3" in loaders:
        server = subprocess.Popen([*this, "--serve"], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, env=env)
        assert server.stdout is not None
        env["BENCHMARK_S3"] = server.stdout.readline().strip()
    for _, name in itertools.product(range(options.repeats), loaders):
        found = run_one([*this, "--one", f"--loader={name}"], env, options.warm + options.seconds + BEGIN_S)
        if found is None:
            print(f"{name} has no result: it did not come to an end", file=sys.stderr)
            continue
        row = {"kind": kind.name, "loader": name, **found}
        print(json.dumps(row), file=sys.stderr)
        yield row
    if server:
        server.communicate()


def run_one(command: list[str], env: dict[str, str], limit_s: float) -> dict[str, float] | None:
    """Return a measurement from a separate process; None if it takes longer than `limit_s`."""
    with subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            printed, errors = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            end_below(psutil.Process(process.pid))
            process.kill()
            return None
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}: {errors[-2000:]}")
    return json.loads(printed.splitlines()[-1])


def _cannot(name: str) -> str:
    """Return why a peer cannot be imported, in a separate process; empty if it can."""
    code = f"from benchmarks.ingest_data import peer; peer('{name.split('_')[0]}')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


if __name__ == "__main__":
    main()
