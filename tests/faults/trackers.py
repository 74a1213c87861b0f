"""Faults of the MLflow server, alone and together with those of store, disk and workers."""

import resource
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.faulty_s3 import FaultyS3, S3Job
from tests.faults.job import Job, Outcome, fault_tree, send, title
from tests.faults.stores import limit_files
from tests.faults.table import STEPS, expect_finished, scenario
from tests.perceiver.tracking.mlflow_server import Server, free_port


def logged(server: Server) -> dict[int, int]:
    """Return how many losses the server has for each step; equal points at different times count separately."""
    query = "select step, count(*) from metrics where key = 'train/loss' group by step"
    with sqlite3.connect(server.store) as store:
        return dict(store.execute(query).fetchall())


def status(server: Server) -> list[str]:
    """Return the states of the runs at the server."""
    with sqlite3.connect(server.store) as store:
        return [row[0] for row in store.execute("select status from runs").fetchall()]


@contextmanager
def tracked(folder: Path, tree: dict[str, Any], make: Callable[..., Job] = Job) -> Iterator[tuple[Server, Job]]:
    """Yield an MLflow server and a run that is tracked there, neither of them started; kill both at the end."""
    server = Server(folder / "server", free_port())
    job = make(folder, {**tree, "tracking": {"uri": server.uri}})
    try:
        yield server, job
    finally:
        job.kill()
        server.stop()


def expect_all_sent(server: Server, outcome: Outcome, steps: int) -> None:
    """Expect one finished run with one loss per step."""
    outcome.expect(logged(server) == dict.fromkeys(range(1, steps + 1), 1), "each step is there once")
    outcome.expect(status(server) == ["FINISHED"], f"one run, finished: {status(server)}")


@scenario("MLflow down for the whole run")
def down_throughout(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """Nothing listens: the run finishes; once there is a server, `--resume` sends it all metrics."""
    with tracked(folder, fault_tree(tree, STEPS)) as (server, job):
        expect_finished(job.start(), outcome)
        outcome.expect(job.said("mlflow does not answer"), "the outage is reported")
        server.start()
        expect_finished(job.start("--resume"), outcome)
        outcome.expect(job.said("mlflow has all metrics now"), f"all metrics are sent\n{job.output}")
        expect_all_sent(server, outcome, STEPS)
        job.judge(outcome, time.time(), None, STEPS)


@scenario("MLflow down for a part of the run")
def down_for_a_part(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """The server is killed and started again while the run trains: it has all metrics in the end."""
    steps = 300
    with tracked(folder, fault_tree(tree, steps)) as (server, job):
        server.start()
        job.paced().start().wait_checkpoint()
        job.wait(lambda: logged(server), "metrics at the server")
        server.stop()
        fault = time.time()
        job.wait_checkpoint(after=job.steps()[-1] + 50)
        outcome.expect(max(logged(server)) < steps, "the server missed steps")
        server.start()
        expect_finished(job, outcome)
        # If the server was not back in time, the same command sends the rest.
        expect_finished(job.start("--resume"), outcome)
        expect_all_sent(server, outcome, steps)
        share = [row for row in job.history() if "train/recording_share" in row][-1]["train/recording_share"]
        outcome.expect(share < 0.01, f"recording takes less than 1 % of the steps' time: {share:.2%}")
        job.judge(outcome, fault, None, steps)


@scenario("MLflow process SIGKILL")
def process_killed(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """The process that sends to MLflow is killed while the run trains: another one sends the rest."""
    steps = 100
    with tracked(folder, fault_tree(tree, steps)) as (server, job):
        server.start()
        job.paced().start()
        job.wait(lambda: logged(server), "metrics at the server")
        (sender,) = [child for child in job.worker(0).children() if "mlflow_writer" in title(child)]
        fault = send(sender, signal.SIGKILL)
        expect_finished(job, outcome)
        expect_all_sent(server, outcome, steps)
        job.judge(outcome, fault, None, steps)


@scenario("tracker, store and disk at once, then a worker SIGKILL")
def all_at_once(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """MLflow is down, a fifth of the store's requests fail, the disk is full for a while, a worker is killed."""
    steps = 150
    tree = fault_tree(tree, steps, checkpoint_misses=1000)
    with FaultyS3() as store, tracked(folder, tree, partial(S3Job, server=store)) as (server, job):
        server.start()
        job.paced().start().wait_checkpoint()
        job.wait(lambda: logged(server), "metrics at the server")
        server.stop()
        store.failing = 0.2
        limit_files(job, 1024)
        job.wait_line("was not saved")
        limit_files(job, resource.RLIM_INFINITY)
        job.wait_checkpoint(after=job.steps()[-1])
        fault = send(job.worker(1), signal.SIGKILL)
        detected = job.wait_line("worker 1 failed")
        server.start()
        outcome.expect(job.end() == 0, f"exit code 0\n{job.output}")
        outcome.expect(logged(server) == dict.fromkeys(range(1, steps + 1), 1), "each step is there once")
        job.judge(outcome, fault, detected, steps)
