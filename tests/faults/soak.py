"""`python -m tests.faults.soak [--minutes 60] [--every 60]`: one run with a fault every N seconds.

The faults take turns. Goodput is the share of the time that the steps of the final history would have taken without
faults: their number times the median step, over the time from the first step to the end, including the restarts by the
harness.
"""

import argparse
import math
import os
import platform
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perceiver.tracking.runs import TrackingConfig, reconcile
from tests.cluster.recipes import prepare_images, small_tree
from tests.faults.job import Job, Outcome, send
from tests.faults.stores import limit_files
from tests.faults.trackers import logged
from tests.perceiver.tracking.mlflow_server import Server, free_port

GOODPUT = 0.8
DISK_FULL_S = 10.0
LOG_EVERY = 10


@dataclass
class Soak:
    """The run, its MLflow server, and the name and time of each injected fault."""

    job: Job
    server: Server
    met: list[tuple[str, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def worker_killed(self) -> None:
        """Send SIGKILL to worker 1."""
        send(self.job.worker(1), signal.SIGKILL)

    def tracker_killed(self) -> None:
        """Stop the MLflow server until the next fault."""
        self.server.stop()

    def tracker_stopped(self) -> None:
        """Let the MLflow server accept connections but answer none until the next fault."""
        assert self.server.process is not None
        os.killpg(self.server.process.pid, signal.SIGSTOP)

    def heal_tracker(self) -> None:
        """Start or continue the server."""
        if self.server.process is None:
            self.server.start()
        else:
            os.killpg(self.server.process.pid, signal.SIGCONT)

    def second_driver(self) -> None:
        """Run the same command again, which must be refused."""
        second = Job(self.job.folder, self.job.tree)
        if second.start("--resume").end() != 2 or not second.said("is in use by process"):
            self.failures.append(f"a second driver was not refused: {second.output[-500:]}")

    def data_task_killed(self) -> None:
        """Send SIGKILL to a data task, if one is running."""
        for task in self.job.data_tasks()[:1]:
            send(task, signal.SIGKILL)

    def worker_stopped(self) -> None:
        """Send SIGSTOP to worker 1."""
        send(self.job.worker(1), signal.SIGSTOP)

    def disk_full(self) -> None:
        """Let the workers write no files for a while."""
        limit_files(self.job, 1024)
        self.job.wait(lambda: time.time() - self.met[-1][1] > DISK_FULL_S, "end of the full disk")
        limit_files(self.job, resource.RLIM_INFINITY)

    def driver_killed(self) -> None:
        """Send SIGKILL to the driver, then run `--resume`."""
        assert self.job.process is not None
        self.job.process.kill()
        self.job.end()
        self.job.start("--resume")

    def terminated(self) -> None:
        """Send SIGTERM to the driver, then run `--resume`."""
        assert self.job.process is not None
        self.job.process.terminate()
        self.job.end()
        self.job.start("--resume")

    def kinds(self) -> dict[str, Callable[[], None]]:
        """Return the faults in the order in which they take turns."""
        return {
            "a second driver": self.second_driver,
            "MLflow server SIGSTOP": self.tracker_stopped,
            "worker SIGKILL": self.worker_killed,
            "data task SIGKILL": self.data_task_killed,
            "MLflow server killed": self.tracker_killed,
            "worker SIGSTOP": self.worker_stopped,
            "disk full for 10 s": self.disk_full,
            "driver SIGKILL, --resume": self.driver_killed,
            "SIGTERM, --resume": self.terminated,
        }

    def run(self, seconds: float, every: float) -> None:
        """Inject faults into the run at fixed times until the time is over, then stop it.

        A fault that is due waits until the run has saved since the previous one; the one after it keeps its time.
        """
        began, kinds = time.time(), list(self.kinds().items())
        for number in range(1, math.ceil(seconds / every)):
            due = began + number * every
            self.job.wait(lambda due=due: time.time() > due, "next fault")
            self.heal_tracker()
            name, harm = kinds[len(self.met) % len(kinds)]
            self.job.wait_checkpoint(after=self.newest())  # it may still be recovering from the previous fault
            self.met.append((name, time.time()))
            harm()
        self.job.wait(lambda: time.time() - began > seconds, "end of the soak")
        self.heal_tracker()
        self.job.wait_checkpoint(after=self.newest())
        assert self.job.process is not None
        self.job.process.terminate()

    def newest(self) -> int:
        """Return the step of the newest checkpoint, 0 if there is none."""
        return max(self.job.steps(), default=0)


def soak_tree(tree: dict[str, Any], every: float, uri: str) -> dict[str, Any]:
    """Return a recipe that trains without end, with a save interval that suits its failures."""
    train = {"steps": 1_000_000, "global_batch": 64, "log_every": LOG_EVERY, "eval_every": 1e6, "ledger": True}
    model = {**tree["model"], "latents": 64, "latent_channels": 128, "self_attends_per_block": 4}
    cluster = {"workers": 2, "hang_s": 10, "object_store_mb": 100, "max_failures": 10_000, "mtbf_hours": every / 3600}
    misses = {"checkpoint_misses": 1000}
    return {**tree, "model": model, "train": {**train, **misses}, "cluster": cluster, "tracking": {"uri": uri}}


def gaps(rows: Sequence[dict[str, float]], met: Sequence[tuple[str, float]]) -> dict[str, list[float]]:
    """Return the longest time without a new step of the final history after each fault, by the fault's name."""
    found: dict[str, list[float]] = {}
    for (name, fault), until in zip(met, [when for _, when in met[1:]] + [time.time()], strict=True):
        times = [row["time"] for row in rows]
        pairs = [b - a for a, b in zip(times, times[1:], strict=False) if b > fault and a < until]
        found.setdefault(name, []).append(max(pairs, default=0.0))
    return found


def judge(soak: Soak, outcome: Outcome) -> float:
    """Check the records of the run; return the goodput."""
    job, rows = soak.job, [row for row in soak.job.history() if "train/samples_per_s" in row]
    last = int(rows[-1]["step"])
    step_s = statistics.median(64 / row["train/samples_per_s"] for row in rows)
    first = rows[0]["time"] - rows[0]["step"] * step_s
    goodput = last * step_s / (rows[-1]["time"] - first)
    outcome.expect(goodput >= GOODPUT, f"goodput {goodput:.0%} of {GOODPUT:.0%}")
    found = job.audit(last)
    outcome.expect(found.exact, f"samples: {len(found.lost)} lost, {len(found.doubled)} doubled")
    steps = [int(row["step"]) for row in rows]
    outcome.expect(len(set(steps)) == len(steps), "each row recorded once")
    left = reconcile(TrackingConfig(uri=soak.server.uri), job.run)  # what the server missed while it was down
    outcome.expect(left == 0 and set(steps) <= set(logged(soak.server)), "all rows are at the MLflow server")
    outcome.expect(not (found_alive := job.leftovers()), f"processes left behind: {[p.pid for p in found_alive]}")
    print(f"\n{last} steps of {1000 * step_s:.0f} ms, {last * 64} samples, {len(found.lost)} lost, ", end="")
    print(f"{len(found.doubled)} doubled; {len(soak.met)} faults in {rows[-1]['time'] - first:.0f} s")
    return goodput


def main(words: Sequence[str]) -> int:
    """Run it and print the table; exit code 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="how long")
    parser.add_argument("--every", type=float, default=60, help="seconds from one fault to the next")
    given, outcome = parser.parse_args(words), Outcome("soak")
    if not 0 < given.every < 60 * given.minutes:
        parser.error(f"--every {given.every:g} s, --minutes {given.minutes:g}: wanted a fault within the time")
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, Python {platform.python_version()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        server = Server(folder / "server", free_port())
        server.start()
        tree = small_tree(folder, prepare_images(folder, per_class=1000))
        soak = Soak(Job(folder, soak_tree(tree, given.every, server.uri)), server)
        try:
            soak.job.start().wait_checkpoint()
            soak.run(60 * given.minutes, given.every)
            outcome.expect(soak.job.end() == 130, f"exit code 130\n{soak.job.output[-2000:]}")
            outcome.failures += soak.failures
            goodput = judge(soak, outcome)
            print("\n| fault | times | longest time without a step, median s | most s |\n|---|---|---|---|")
            for name, lengths in gaps(soak.job.history(), soak.met).items():
                print(f"| {name} | {len(lengths)} | {statistics.median(lengths):.1f} | {max(lengths):.1f} |")
            print(f"\ngoodput {goodput:.1%}; {'passed' if outcome.passed else 'NO: ' + '; '.join(outcome.failures)}")
        finally:
            soak.job.kill()
            server.stop()
    return 0 if outcome.passed else 1


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # so that started processes are terminated
    sys.exit(main(sys.argv[1:]))
