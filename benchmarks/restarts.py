"""Time from the death of a worker to the next step, and the steps lost, with and without checkpoints in memory.

    python benchmarks/restarts.py                                    # 20 kills in each of four runs
    python benchmarks/restarts.py --repeats 5 --runs slow --json

Each run is a real `perceiver train` of 2 workers, whose steps wait a tenth of a second. Worker 1 is killed (SIGKILL)
some seconds after the last restart, again and again. `fast` runs store checkpoints on the local disk, `slow` ones on
an S3 server (moto) whose requests wait `--delay` seconds each. With `memory` the recipe has
`train.checkpoint_memory_every`.

`first s`: from the kill to the first step afterwards. `lost`: steps that run again. `recovered s`: from the kill until
the run was as far as before. Stages are those of rank 0 in run.json, medians. Goodput is computed, not measured: the
share of the time between two faults that the median recovery leaves.
"""

import argparse
import json
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.cluster.recipes import prepare_images, small_tree  # noqa: E402
from tests.faults.faulty_s3 import FaultyS3, S3Job  # noqa: E402
from tests.faults.job import Job, fault_tree, send  # noqa: E402

PERCENTILES = (50, 90, 99)
BETWEEN_S = (30, 60, 300)
"""Seconds between two faults for which the goodput is computed."""
UNDISTURBED_S = (4.0, 8.0)
"""A worker is killed so many seconds after the first step of the last restart, drawn evenly."""
ENDLESS = 100_000


@dataclass
class Restarts:
    """What the kills of one run cost, an entry for each."""

    first_s: list[float] = field(default_factory=list)
    recovered_s: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    stages: list[dict[str, float]] = field(default_factory=list)

    def add(self, job: Job, killed: float, starts: int) -> None:
        """Wait until the run is as far as it was when a worker was killed; note what that has cost."""
        resumed = job.wait(lambda: resumes(job)[starts:], "restart")[0]

        def after(step: int) -> float:
            return job.wait(lambda: next((t for t, at in job.recorded if t > resumed[0] and at >= step), 0.0), "step")

        done = max(step for when, step in job.recorded if when < resumed[0])
        self.first_s.append(after(resumed[1] + 1) - killed)
        self.recovered_s.append(after(done + 1) - killed)
        self.lost.append(done - resumed[1])
        start = job.facts()["starts"][-1]
        self.origins.append(start["origin"])
        self.stages.append(start["stages"])


def resumes(job: Job) -> list[tuple[float, int]]:
    """Return time and step of each restart from a checkpoint."""
    return [(when, int(line.split()[3])) for when, line in job.lines if line.startswith("resumed at step")]


@contextmanager
def started(store: str, memory_every: int | None, delay_s: float) -> Iterator[Job]:
    """Start a run with such a store; the delay begins with its first checkpoint."""
    with tempfile.TemporaryDirectory(prefix="restarts-", ignore_cleanup_errors=True) as scratch, FaultyS3() as server:
        folder = Path(scratch)
        tree = fault_tree(small_tree(folder, prepare_images(folder)), ENDLESS, checkpoint_every=4.0, ledger=False)
        tree["train"]["checkpoint_memory_every"] = memory_every
        tree["cluster"] |= {"max_failures": 10_000, "hang_s": 60}
        job = S3Job(folder, tree, server) if store == "slow" else Job(folder, tree)
        try:
            job.paced().start().wait_checkpoint()
            server.delay_s = delay_s
            yield job
        finally:
            server.delay_s = 0.0
            job.kill()


def measure(store: str, memory_every: int | None, delay_s: float, repeats: int) -> Restarts:
    """Kill a worker so often in one run."""
    found, draw = Restarts(), random.Random(0)
    with started(store, memory_every, delay_s) as job:
        for number in range(repeats):
            until = time.time() + draw.uniform(*UNDISTURBED_S)
            job.wait(lambda until=until: time.time() > until, "next kill")
            starts = len(resumes(job))
            found.add(job, send(job.worker(1), signal.SIGKILL), starts)
            print(f"  {number + 1}: {found.first_s[-1]:.1f} s, {found.lost[-1]:.0f} steps", file=sys.stderr, flush=True)
    return found


def cells(values: Sequence[float], digits: int = 1) -> str:
    """Return the percentiles as text."""
    return " / ".join(f"{np.percentile(values, p):.{digits}f}" for p in PERCENTILES)


def line(name: str, found: Restarts) -> str:
    """Return the row of a run."""
    goodput = (f"{max(0.0, 1 - statistics.median(found.recovered_s) / s):.0%}" for s in BETWEEN_S)
    memory = f"{found.origins.count('memory')} of {len(found.origins)}"
    figures = cells(found.first_s), cells(found.lost, 0), cells(found.recovered_s), memory, *goodput
    return f"| {name} | {' | '.join(figures)} |"


def stage_line(name: str, found: Restarts) -> str:
    """Return the median seconds of each stage of a run's restarts."""
    each = {stage: statistics.median(s[stage] for s in found.stages) for stage in found.stages[0]}
    return f"{name}: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in each.items())


def main(words: Sequence[str] | None = None) -> None:
    """Measure the runs and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="kills in each run")
    parser.add_argument("--every", type=int, default=5, help="steps between two checkpoints in memory")
    parser.add_argument("--delay", type=float, default=0.2, help="seconds that each request of the slow store takes")
    parser.add_argument("--runs", choices=("fast", "slow"), nargs="+", default=["fast", "slow"], help="which stores")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    given = parser.parse_args(words)
    if given.repeats < 1 or given.every < 1 or given.delay < 0:
        parser.error("wanted --repeats and --every of at least 1, --delay of at least 0")
    machine = f"{platform.machine()}, {psutil.cpu_count()} CPUs, load {psutil.getloadavg()[1]:.0f} before"
    print(f"{time.strftime('%Y-%m-%d')}, {machine}", flush=True)
    found: dict[str, Restarts] = {}
    for store in given.runs:
        for memory in (None, given.every):
            name = f"{store} store" + (f", memory every {memory} steps" if memory else "")
            print(name, file=sys.stderr, flush=True)
            found[name] = measure(store, memory, given.delay, given.repeats)
            if given.json:
                print(json.dumps({"run": name, **asdict(found[name])}), flush=True)
    if not given.json:
        between = " | ".join(f"goodput {s} s" for s in BETWEEN_S)
        print(f"\n| run | first s p50 / p90 / p99 | lost steps | recovered s | from memory | {between} |")
        print("|---" * (5 + len(BETWEEN_S)) + "|")
        print("\n".join(line(name, each) for name, each in found.items()) + "\n")
        print("\n".join(stage_line(name, each) for name, each in found.items()))


if __name__ == "__main__":
    main()
