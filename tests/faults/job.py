"""A real `perceiver train` in a separate process, and its state during and after faults."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from perceiver.tracking.record import HISTORY, read_rows
from pipelines.feed.ingest import DataConfig, sample_plan
from pipelines.shards.manifest import load_manifest
from tests.cluster.recipes import write_recipe
from tests.faults.audit import Audit, audit
from tests.homes import share_kernels

PERCEIVER = str(Path(sys.executable).with_name("perceiver"))
PATIENCE_S = 400.0
RUN = "small-001"
SHOWN = 2000
"""Most characters of a failure that are shown; it may include the command's output."""
INJECT = Path(__file__).with_name("inject")
PACE = {"PYTHONPATH": str(INJECT), "FAULT_STEP_S": "0.1"}


@dataclass
class Outcome:
    """One row of the table. None: does not apply."""

    fault: str
    detected_s: float | None = None
    first_step_s: float | None = None
    steps_lost: int | None = None
    samples_wrong: int | None = None
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether all expectations were met."""
        return not self.failures

    def expect(self, condition: Any, promise: str) -> None:
        """Record a failure unless the condition is true."""
        if not condition:
            self.failures.append(promise if len(promise) < SHOWN else f"{promise[:200]} ... {promise[-SHOWN:]}")


class Job:
    """A run of the small recipe below a folder; times are seconds since the epoch.

    Args:
        folder: used by this run alone; also its home.
        tree: the recipe; see `fault_tree`.
        environment: variables to set.
    """

    def __init__(self, folder: Path, tree: dict[str, Any], environment: dict[str, str] | None = None) -> None:
        self.folder, self.tree, self.environment = folder, tree, environment or {}
        self.run = folder / "runs" / RUN
        self.record = self.run / HISTORY
        self.recorded: list[tuple[float, int]] = []
        self.words = ["train"]
        self.poll_s = 0.02
        self.lines: list[tuple[float, str]] = []
        self.process: subprocess.Popen[str] | None = None
        self._shared = shared_memory()
        self._reader: threading.Thread | None = None

    # -- running -------------------------------------------------------------------------------------------------------

    def start(self, *arguments: str) -> "Job":
        """Start the command; a thread reads its output."""
        self.lines = []
        self.process = subprocess.Popen(
            [PERCEIVER, self.words[0], str(write_recipe(self.folder, self.tree)), *self.words[1:], *arguments],
            cwd=self.folder,
            env=home(self.folder) | self.environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._reader.start()
        threading.Thread(target=self._follow_record, args=(self.process,), daemon=True).start()
        return self

    def inject(self, kind: str, step: int, rank: int = 0) -> "Job":
        """Plan a fault in one step of one rank (see `inject/sitecustomize.py`); call it before the run is started."""
        plan = self.folder / "inject.json"
        plan.write_text(json.dumps({"kind": kind, "step": step, "rank": rank}))
        self.environment |= {"PYTHONPATH": str(INJECT), "FAULT_INJECT": str(plan)}
        return self

    def paced(self) -> "Job":
        """Make each step a tenth of a second longer, so that the run is still active when the fault is injected."""
        self.environment |= PACE
        return self

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.lines.append((time.time(), line.rstrip()))

    def _follow_record(self, process: subprocess.Popen[str]) -> None:
        """Record when each step was done: a resume drops the rows of steps that run again."""
        offset = 0
        while process.poll() is None:
            size = self.record.stat().st_size if self.record.exists() else 0
            rows, offset = read_rows(self.record, offset if size >= offset else 0)
            self.recorded += [(row["time"], int(row["step"])) for row in rows if "train/loss" in row]
            time.sleep(0.1)

    @property
    def output(self) -> str:
        """The output so far."""
        return "\n".join(line for _, line in self.lines)

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait until a condition is true and return its value; the command must not end before."""
        assert self.process is not None
        until = time.monotonic() + PATIENCE_S
        while not (found := condition()):
            assert self.process.poll() is None, f"ended before {what}:\n{self.output}"
            assert time.monotonic() < until, f"no {what}:\n{self.output}"
            time.sleep(self.poll_s)
        return found

    def wait_line(self, text: str) -> float:
        """Wait for a line with this text; return when it was printed."""
        return self.wait(lambda: self.said(text), f"line {text!r}")

    def said(self, text: str) -> float | None:
        """Return when the first line with this text was printed, None if it was not."""
        return next((when for when, line in self.lines if text in line), None)

    def end(self) -> int:
        """Wait for the command's end; return its exit code."""
        assert self.process is not None and self._reader is not None
        code = self.process.wait(PATIENCE_S)
        self._reader.join()
        return code

    def kill(self) -> None:
        """Kill all processes of the run."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        left = self.leftovers()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, 30)

    def leftovers(self) -> list[psutil.Process]:
        """Return the processes of the run's Ray instance that are still alive."""
        session = Path(str(self.facts().get("ray_session", ""))).name
        found = []
        for process in psutil.process_iter():
            try:
                if session and any(session in part for part in process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def shared_left(self) -> set[str]:
        """Return the unused files of shared memory that did not exist before the run; other tests use theirs."""
        left = shared_memory() - self._shared
        return left - mapped_memory() if left else left

    # -- looking -------------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """Return the content of run.json."""
        path = self.run / "run.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def worker(self, rank: int) -> psutil.Process:
        """Return the process of a worker."""
        return psutil.Process(self.facts()["workers"][str(rank)]["pid"])

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints."""
        manifests = self.run.glob("checkpoints/step-*/manifest.json")
        return sorted(int(path.parent.name.removeprefix("step-")) for path in manifests)

    def wait_checkpoint(self, after: int = 0) -> int:
        """Wait for a checkpoint later than a step; return the step of the newest."""
        return self.wait(lambda: max((step for step in self.steps() if step > after), default=0), "checkpoint")

    def history(self) -> list[dict[str, float]]:
        """Return the rows that the newest checkpoint records."""
        newest = self.run / "checkpoints" / f"step-{self.steps()[-1]:08d}" / "history.jsonl"
        return [json.loads(line) for line in newest.read_text().splitlines()]

    def losses(self) -> dict[int, float]:
        """Return the loss of each step."""
        return {int(row["step"]): row["train/loss"] for row in self.history() if "train/loss" in row}

    def data_tasks(self) -> list[psutil.Process]:
        """Return the processes of the running data tasks."""
        session = Path(str(self.facts()["ray_session"])).name
        raylets = [
            p
            for p in psutil.process_iter(["name", "cmdline"])
            if p.info["name"] == "raylet" and any(session in part for part in p.info["cmdline"] or [])
        ]
        children = [child for raylet in raylets for child in raylet.children(recursive=True)]
        return [child for child in children if "MapBatches" in title(child)]

    # -- judging -------------------------------------------------------------------------------------------------------

    def judge(
        self,
        outcome: Outcome,
        fault: float,
        detected: float | None,
        last_step: int,
        graceful: bool = False,
        unrecorded: Collection[int] = (),
        resume: int = -1,
    ) -> Outcome:
        """Fill a row from the finished run's records: times of detection and of the next new step, and losses.

        Lost are the steps between the one that the run was resumed from and the last one done before the fault, or,
        with ``graceful``, before the first step after the resume. ``unrecorded`` are the steps without a recorded
        loss, ``resume`` is the index of the resume after the fault.
        """
        outcome.detected_s = None if detected is None else detected - fault
        rows = [row for row in self.history() if "train/loss" in row]
        resumed = [int(line.split()[3]) for _, line in self.lines if line.startswith("resumed at step")]
        if resumed:
            first = next((row["time"] for row in rows if row["step"] == resumed[resume] + 1), None)
            outcome.expect(first is not None, "a step after the resume")
            outcome.first_step_s = first - (detected or fault) if first else None
            moment = first if graceful and first else fault
            outcome.steps_lost = max(0, self._last_step_before(moment) - resumed[resume])
        found = self.audit(last_step)
        outcome.samples_wrong = len(found.lost) + len(found.doubled)
        outcome.expect(found.exact, f"samples: {found.lost[:3]} lost, {found.doubled[:3]} doubled")
        wanted = [step for step in range(1, last_step + 1) if step not in unrecorded]
        outcome.expect([int(row["step"]) for row in rows] == wanted, "each step recorded once")
        outcome.expect("Traceback" not in self.output, "no traceback in the output")
        return outcome

    def audit(self, last_step: int) -> Audit:
        """Compare the ledger with the plan."""
        data = DataConfig(**self.tree["data"])
        batch = self.tree["train"]["global_batch"]
        plan = sample_plan(data, load_manifest(data.url), seed=self.tree.get("seed", 0), global_batch=batch)
        return audit(str(self.run / "ledger"), last_step, lambda step: plan.share(step - 1, step).ids.ravel().tolist())

    def _last_step_before(self, fault: float) -> int:
        """Return the last step that was recorded before a time."""
        return max((step for when, step in self.recorded if when < fault), default=0)


def shared_memory() -> set[str]:
    """Return the names of the files in /dev/shm; killed MLflow servers leave folders there."""
    place = Path("/dev/shm")
    return {path.name for path in place.iterdir() if not path.is_dir()} if place.is_dir() else set()


def mapped_memory() -> set[str]:
    """Return the names of the files in /dev/shm that a process has mapped."""
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            found.update(Path(line.split()[-1]).name for line in maps.read_text().splitlines() if "/dev/shm/" in line)
    return found


def home(folder: Path) -> dict[str, str]:
    """Return the environment of a command with this home, without variables that name servers or other folders."""
    named = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "XDG_CACHE_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in named}
    return {**kept, "HOME": str(share_kernels(folder)), "COLUMNS": "200"}


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def fault_tree(tree: dict[str, Any], steps: int, **train: Any) -> dict[str, Any]:
    """Return the small recipe for faults: many short steps, a checkpoint every second step, each step recorded."""
    settings = {"steps": steps, "global_batch": 16, "log_every": 1, "eval_every": 1000, "checkpoint_every": 0.4}
    cluster = {"workers": 2, "hang_s": 10, "object_store_mb": 100}
    return {**tree, "train": {**settings, "ledger": True, **train}, "cluster": cluster}


def send(process: psutil.Process, number: signal.Signals) -> float:
    """Send a signal; return the time."""
    now = time.time()
    process.send_signal(number)
    return now
