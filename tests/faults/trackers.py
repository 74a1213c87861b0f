"""Faults of the MLflow server, alone and together with those of store, disk and workers."""

import resource
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

from tests.faults.faulty_s3 import FaultyS3, S3Job
from tests.faults.job import Job, Outcome, fault_tree, send, title
from tests.faults.stores import limit_files
from tests.faults.table import STEPS, expect_finished, scenario
from tests.perceiver.tracking.mlflow_server import Server, free_port


def logged(server: Server) -> dict[int, int]:
    """How often the server has a loss of each step, counting equal points at different times apart."""
    query = "select step, count(*) from metrics where key = 'train/loss' group by step"
    with sqlite3.connect(server.store) as store:
        return dict(store.execute(query).fetchall())


def status(server: Server) -> list[str]:
    """The states of the runs that the server knows."""
    with sqlite3.connect(server.store) as store:
        return [row[0] for row in store.execute("select status from runs").fetchall()]


@scenario("MLflow down for the whole run")
def down_throughout(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """Nothing listens: the run finishes; once there is a server, `--resume` brings it all figures."""
    server = Server(folder / "server", free_port())
    job = Job(folder, {**fault_tree(tree, STEPS), "tracking": {"uri": server.uri}}).start()
    try:
        expect_finished(job, outcome)
        outcome.expect(job.said("mlflow does not answer"), "said so")
        server.start()
        expect_finished(job.start("--resume"), outcome)
        outcome.expect(job.said("mlflow has all metrics now"), f"all figures are sent\n{job.output}")
        outcome.expect(logged(server) == dict.fromkeys(range(1, STEPS + 1), 1), "each step is there once")
        outcome.expect(status(server) == ["FINISHED"], f"one run, finished: {status(server)}")
        job.judge(outcome, time.time(), None, STEPS)
    finally:
        job.kill()
        server.stop()


@scenario("MLflow down for a part of the run")
def down_for_a_part(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """The server is killed and started again while the run trains: it has all figures in the end."""
    steps = 300
    server = Server(folder / "server", free_port())
    server.start()
    job = Job(folder, {**fault_tree(tree, steps), "tracking": {"uri": server.uri}}).paced()
    try:
        job.start().wait_checkpoint()
        job.wait(lambda: logged(server), "figures at the server")
        server.stop()
        fault = time.time()
        job.wait_checkpoint(after=job.steps()[-1] + 50)
        outcome.expect(max(logged(server)) < steps, "the server missed steps")
        server.start()
        expect_finished(job, outcome)
        # A server that was not back in time gets the rest by the same command again.
        expect_finished(job.start("--resume"), outcome)
        outcome.expect(logged(server) == dict.fromkeys(range(1, steps + 1), 1), "each step is there once")
        outcome.expect(status(server) == ["FINISHED"], f"one run, finished: {status(server)}")
        share = [row for row in job.history() if "train/recording_share" in row][-1]["train/recording_share"]
        outcome.expect(share < 0.01, f"recording takes less than 1 % of the steps' time: {share:.2%}")
        job.judge(outcome, fault, None, steps)
    finally:
        job.kill()
        server.stop()


@scenario("MLflow process SIGKILL")
def process_killed(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """The process that sends to MLflow is killed while the run trains: the rest is sent by another one."""
    steps = 100
    server = Server(folder / "server", free_port())
    server.start()
    job = Job(folder, {**fault_tree(tree, steps), "tracking": {"uri": server.uri}}).paced()
    try:
        job.start()
        job.wait(lambda: logged(server), "figures at the server")
        (sender,) = [child for child in job.worker(0).children() if "mlflow_writer" in title(child)]
        fault = send(sender, signal.SIGKILL)
        expect_finished(job, outcome)
        outcome.expect(logged(server) == dict.fromkeys(range(1, steps + 1), 1), "each step is there once")
        outcome.expect(status(server) == ["FINISHED"], f"one run, finished: {status(server)}")
        job.judge(outcome, fault, None, steps)
    finally:
        job.kill()
        server.stop()


@scenario("tracker, store and disk at once, then a worker SIGKILL")
def all_at_once(folder: Path, tree: dict[str, Any], outcome: Outcome) -> None:
    """MLflow is gone, a fifth of the store's requests fail, the disk takes nothing for a while, a worker is killed."""
    steps = 150
    server = Server(folder / "server", free_port())
    server.start()
    with FaultyS3() as store:
        tree = {**fault_tree(tree, steps, checkpoint_misses=1000), "tracking": {"uri": server.uri}}
        job = S3Job(folder, tree, store).paced().start()
        try:
            job.wait_checkpoint()
            job.wait(lambda: logged(server), "figures at the server")
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
        finally:
            job.kill()
            server.stop()
