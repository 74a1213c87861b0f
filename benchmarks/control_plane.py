"""What launch, reporting, checkpoint commits and tracking take by themselves, and how that grows with the workers.

    python benchmarks/control_plane.py --workers 8 --workers 16 --workers 32 --workers 64
    python benchmarks/control_plane.py --workers 8 --json

Each size is one run by our own launch on a local cluster of one node: the driver's checks, Ray Train's worker group,
the process group, the loop with its hooks, checkpoints with receipts and manifest, MLflow on SQLite, the report. Only
the engine is a stand-in: its step sleeps, and its checkpoint is a file of zeros for each rank. So the workers share a
few cores without a model's work between them, but start-up is bound by them: each imports torch.

`group_s`: from the launch until the last worker had its engine; `start_s`: until all ranks had taken a step.
`commit_s`: from the first rank's call to save until the manifest stood, the median. `step_ms`: of the loop with its
hooks above the sleep, the median; every step is an exchange over all ranks. `end_s`: from the last step to the
driver's return, report included. `worker_mb`: largest private memory of a worker.
A size whose workers might not fit into the memory that is free is refused before it starts.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from capacity import MemoryWatch

SAMPLES = 640
STEPS = 40
SAVE_EVERY = 10
SLEEP_S = 0.05
SAVE_BYTES = 1 << 20
WORKER_BYTES = 290 << 20
"""Approximate private memory of a worker; sizes that need too much are refused."""
BASE_BYTES = 2 << 30
NOTES = "CONTROL_PLANE_NOTES"
ENVIRONMENT = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1800",
    "RAY_worker_register_timeout_seconds": "1800",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
}


class FakeEngine:
    """Keeps the engine's protocol without computing anything; notes when it was asked for what."""

    def __init__(self, module: Any, place: Any, folder: Path) -> None:
        from perceiver.train.engine.ranks import Ranks

        self.device, self.module = place.device, module
        self.ranks = Ranks(place.device)
        self.rank, self.world = place.rank, place.world
        self.notes = (folder / f"rank-{place.rank:05d}.jsonl").open("w")
        self.note("group")

    def note(self, what: str, step: int = 0) -> None:
        """Write down that something happens now."""
        print(json.dumps([what, step, time.time()]), file=self.notes, flush=True)

    def step(self, micro_batches: Sequence[Any], step: int) -> Any:
        """Sleep instead of taking a step."""
        from perceiver.train.engine.protocol import StepResult

        self.note("step", step)
        time.sleep(SLEEP_S)
        return StepResult(step, 1 / (step + 1), {"accuracy": 0.5}, 1.0, 0.1, False)

    def averaged(self) -> AbstractContextManager[None]:
        """Change nothing: there is no average."""
        return nullcontext()

    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]:
        """Take all batches and make figures up."""
        return {"loss": float(self.sum([float(len(list(batches)))])[0]), "accuracy": 0.5}

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the values summed over the ranks."""
        return self.ranks.sum(values)

    def save(self, folder: Path) -> None:
        """Write this rank's file of zeros."""
        self.note("save")
        (folder / f"state-{self.rank:05d}.bin").write_bytes(bytes(SAVE_BYTES))

    def load(self, folder: Path) -> int:
        """Load nothing: nothing was saved."""
        return 0

    def weights(self) -> Any:
        """Return the weights that the model began with, on rank 0."""
        return {k: v.contiguous() for k, v in self.module.state_dict().items()} if self.rank == 0 else None


def worker(config: Mapping[str, Any]) -> dict[str, Any]:
    """Run our worker function with the fake engine in a Ray Train worker."""
    from cluster.run import worker as ours

    folder = Path(os.environ[NOTES])
    fake = lambda recipe, model, task, span, me: FakeEngine(model, me, folder)
    with mock.patch.object(ours, "build_engine", fake):
        return ours.train_worker(config)


def prepare_images(folder: Path) -> str:
    """Prepare small grey images of two classes; return their URL."""
    from PIL import Image

    from pipelines.prepare import prepare

    for split, count in (("train", SAMPLES), ("test", 128)):
        for index in range(count):
            place = folder / "raw" / split / str(index % 2)
            place.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 100 * (index % 2)).save(place / f"{index}.png")
    prepare("image_folder", str(folder / "raw"), str(folder / "data"))
    return str(folder / "data")


def recipe_tree(folder: Path, url: str, workers: int) -> dict[str, Any]:
    """Return the run's recipe: a tiny model, one sample per worker, a checkpoint every ten steps."""
    inputs = {"kind": "image", "channels": 1, "size": [8, 8], "mean": [0.5], "std": [0.3]}
    epoch = SAMPLES / workers
    return {
        "name": "control",
        "output": str(folder / "runs"),
        "data": {"url": url, "executor": "inline", "cpus_per_task": 0.01},
        "model": {
            "kind": "perceiver",
            "inputs": inputs,
            "latents": 4,
            "latent_channels": 16,
            "cross_attends": 1,
            "self_attends_per_block": 1,
            "heads": 2,
        },
        "task": {"kind": "classification"},
        "optim": {"lr": 0.01},
        "train": {
            "steps": STEPS,
            "global_batch": workers,
            "log_every": 1,
            "eval_every": 1e6,
            "checkpoint_every": SAVE_EVERY / epoch,
            "keep_checkpoints": STEPS,
        },
        "cluster": {"workers": workers, "cpus_per_worker": 0.05, "hang_s": 3600},
    }


def launch(folder: Path, workers: int, url: str) -> dict[str, Any]:
    """Start a local cluster and run on it, in this process; return when what began and ended."""
    from cluster.recipe.config import build_recipe
    from cluster.runtime.local import set_quiet_environment
    from cluster.runtime.local_cluster import NodeGroup, NodesConfig, down, up

    set_quiet_environment()
    notes = folder / "notes"
    notes.mkdir()
    os.environ.update({**ENVIRONMENT, NOTES: str(notes), "XDG_CACHE_HOME": str(folder / "cache")})
    os.environ["RAY_AUTH_MODE"] = "token"
    tree = recipe_tree(folder, url, workers)
    try:
        # Logical CPUs for the shares of the workers, and some for other processes of Ray.
        there = up(NodesConfig(nodes=(NodeGroup(cpus=workers // 8 + 4),)), lambda line: None)
        tree["cluster"]["address"] = there.address
        from cluster.run.launch import launch_training

        began = time.time()
        with mock.patch("cluster.run.trainer.train_worker", worker):
            code = launch_training(build_recipe(tree), command="control", run="control").code
        ended = time.time()
    finally:
        down()
    if code:
        raise SystemExit(f"the run of {workers} workers ended with code {code}: see {folder}/runs/control/logs")
    return {"began": began, "ended": ended}


def facts(folder: Path, workers: int, times: Mapping[str, float]) -> dict[str, Any]:
    """Return what the ranks' notes, the checkpoints and MLflow's store contain about a run."""
    ranks = [[json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("notes/*.jsonl")]
    assert len(ranks) == workers, f"{len(ranks)} of {workers} workers left notes"

    def at(what: str, pick: Callable[[Iterable[float]], float]) -> list[float]:
        """Return the n-th time that it happened, the first or the last of the ranks."""
        columns = zip(*([t for name, _, t in rank if name == what] for rank in ranks), strict=True)
        return [pick(column) for column in columns]

    steps, saves = at("step", max), at("save", min)
    made = [json.loads(path.read_text())["created"] for path in sorted(folder.glob("runs/control/checkpoints/*/man*"))]
    assert len(made) == len(saves) == STEPS // SAVE_EVERY and len(steps) == STEPS, (len(made), len(saves), len(steps))
    # A step after a save also pays for staging.
    plain = [b - a - SLEEP_S for n, (a, b) in enumerate(zip(steps, steps[1:], strict=False), 1) if n % SAVE_EVERY]
    return {
        "workers": workers,
        "group_s": at("group", max)[0] - times["began"],
        "start_s": steps[0] + SLEEP_S - times["began"],
        "commit_s": statistics.median(done - asked for asked, done in zip(saves, made, strict=True)),
        "step_ms": 1000 * statistics.median(plain),
        "end_s": times["ended"] - steps[-1] - SLEEP_S,
        "metrics_in_mlflow": tracked(folder),
    }


def tracked(folder: Path) -> int:
    """Return the number of loss values in MLflow; the run must have succeeded."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.status == "FINISHED", run.info.status
    return len(client.get_metric_history(run.info.run_id, "train/loss"))


def measure(workers: int) -> dict[str, Any]:
    """Run one size in a separate process, and read its results."""
    free, need = psutil.virtual_memory().available, BASE_BYTES + workers * WORKER_BYTES
    if need > free:
        return {"workers": workers, "refused": f"may need {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"}
    with tempfile.TemporaryDirectory(prefix="control-") as place:
        folder = Path(place)
        url = prepare_images(folder)
        watch = MemoryWatch(every_s=2.0)
        watch.start()
        command = [sys.executable, __file__, "--one", place, url, "--workers", str(workers)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        watch.stop.set()
        watch.join()
        if done.returncode:
            raise SystemExit(f"{workers} workers: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        times = json.loads(re.findall(r"^TIMES (.*)$", done.stdout, re.MULTILINE)[-1])
        return {**facts(folder, workers, times), "worker_mb": watch.peak / 1e6}


def main() -> None:
    """Run the command line described at the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, action="append", help="sizes; 8, 16, 32, 64 by default")
    parser.add_argument("--json", action="store_true", help="print one line a size")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print("TIMES", json.dumps(launch(Path(given.one[0]), given.workers[0], given.one[1])), flush=True)
        return
    if not given.json:
        print("| workers | group s | start s | commit s | step ms | end s | worker MB |")
        print("|---|---|---|---|---|---|---|")
    rows = []
    for workers in given.workers or [8, 16, 32, 64]:
        rows.append(measure(workers))
        print(json.dumps(rows[-1]) if given.json else as_line(rows[-1]), flush=True)
    done = [row for row in rows if "refused" not in row]
    if len(done) > 1 and not given.json:
        first, last = done[0], done[-1]
        growth = {name: last[name] / first[name] for name in ("start_s", "commit_s", "step_ms", "end_s")}
        print(
            f"\nfrom {first['workers']} to {last['workers']} workers: "
            + ", ".join(f"{name} x {value:.2f}" for name, value in growth.items())
        )


def as_line(row: Mapping[str, Any]) -> str:
    """Format a size as a row of the table."""
    if "refused" in row:
        return f"| {row['workers']} | {row['refused']} | | | | | |"
    return (
        f"| {row['workers']} | {row['group_s']:.1f} | {row['start_s']:.1f} | {row['commit_s']:.2f} | "
        f"{row['step_ms']:.1f} | {row['end_s']:.1f} | {row['worker_mb']:.0f} |"
    )


if __name__ == "__main__":
    main()
