"""Weak and strong scaling from one worker to two, and what Ray adds to plain torchrun + DeepSpeed, in one run.

    perceiver prepare digits data/digits
    python benchmarks/scaling.py                                    # all settings, as tables
    python benchmarks/scaling.py --setting strong --rounds 1 --steps 20 --json

Settings: `one` is the recipe's global batch on one worker; `strong` the same on two; `weak` twice that on two. Each
worker has one thread. Three arms take each setting's steps in turn, a round after another, the order reversed in every
second round, each a fresh start whose first steps are left out:

- ray: `perceiver train`'s own launch, workers, hooks and Ray Data; no evaluation and no checkpoint within the steps.
- torchrun: the same engine, loop and sample order in processes that torchrun starts, read and decoded by each itself.
- memory: likewise, with all batches made before the first step: what no way of reading can beat.

`step_ms` is the time from the beginning of a step to that of the next one on rank 0, waiting for data and hooks
included: the mean of a start's steps, since torchrun's processes decode many steps' samples at once, and the median of
these over the rounds. `cpu_ms` is rank 0's own processor time in it, which other work on the machine disturbs less;
Ray's data tasks and their processes are not in it. The arms must find the same losses, else the benchmark ends.
`ray / torchrun` is Ray's overhead; `ray / memory` includes the cost of reading.

With `--one-core` all workers compute on one core, in every arm, and the other cores are free for other processes.
On a machine with as many cores as workers this tells apart what a launch costs the steps by itself and what it costs
because no core is left for it.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

ARMS = ("ray", "torchrun", "memory")
SETTINGS = {"one": (1, 1), "strong": (2, 1), "weak": (2, 2)}
"""Workers, and how many times the recipe's global batch."""
LEFT_OUT = 100
"""First steps of a start: by then all other processes of the run have started."""
AHEAD_BYTES = 12 << 20
"""`data.prefetch_bytes`: so little that the timed steps' samples are made while these steps run, not before; and enough
for a window of the quickstart's samples, as the default is."""
TOLERANCE = 1e-4
NOTES = "SCALING_NOTES"
ONE_CORE = "SCALING_ONE_CORE"


def timed_engine(build_engine: Any, *what: Any) -> Any:
    """Build the worker's engine for one thread; it notes when each of its steps begins, and the loss."""
    import torch

    torch.set_num_threads(1)
    if os.environ[ONE_CORE] == "1":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    engine: Any = build_engine(*what)
    take = engine.step
    if engine.rank == 0:
        notes = Path(os.environ[NOTES]).open("w")  # noqa: SIM115  as long as the process

        def step(micro_batches: Any, step: int) -> Any:
            began, cpu = time.perf_counter(), time.process_time()
            result = take(micro_batches, step)
            print(json.dumps([step, result.loss, began, cpu]), file=notes, flush=True)
            return result

        engine.step = step
    return engine


def worker(config: Mapping[str, Any]) -> dict[str, Any]:
    """Run our worker function with the recording engine in a Ray Train worker."""
    from cluster.run import worker as ours

    with mock.patch.object(ours, "build_engine", partial(timed_engine, ours.build_engine)):
        return ours.train_worker(config)


def ray_arm(tree: dict[str, Any]) -> None:
    """Train by our own launch, in this process."""
    from cluster.recipe.config import build_recipe
    from cluster.runtime.local import set_quiet_environment

    set_quiet_environment()
    from cluster.run.launch import launch_training

    with mock.patch("cluster.run.trainer.train_worker", worker):
        code = launch_training(build_recipe(tree), command="scaling").code
    if code:
        raise SystemExit(f"the run ended with code {code}: see {tree['output']}")


def plain_arm(tree: dict[str, Any], in_memory: bool) -> None:
    """Train in this process, one of those that torchrun started."""
    import torch
    import torch.distributed as dist

    from cluster.recipe.config import build_recipe
    from cluster.run.worker import build_engine
    from cluster.worker.setup import WorkerRank
    from perceiver.factory import build_model
    from perceiver.tasks import build_task
    from perceiver.train.engine.deepspeed_engine import init_distributed
    from perceiver.train.hooks import History, MetricsHook
    from perceiver.train.loop import Span, train
    from pipelines.feed.ingest import TrainShare, load_data, train_batches

    torch.set_num_threads(1)
    recipe = build_recipe(tree)
    init_distributed()
    rank, world = dist.get_rank(), dist.get_world_size()
    manifest = load_data(recipe.data)
    training, steps = recipe.train, recipe.train.total_steps(0)
    epoch_steps = manifest.split(recipe.data.train_split).samples / training.global_batch
    span = Span(0, steps, training.global_batch, training.accumulation(world), epoch_steps, recipe.seed)
    share = TrainShare(recipe.seed, training.global_batch, training.micro(world), 0, steps, rank, world)
    batches = train_batches(recipe.data.model_copy(update={"executor": "inline"}), manifest, share, "cpu")
    torch.manual_seed(recipe.seed)
    classes = len(manifest.classes)
    me = WorkerRank(rank, world, world, torch.device("cpu"))
    model, task = build_model(recipe.model, classes=classes), build_task(recipe.task, classes=classes)
    engine = timed_engine(build_engine, recipe, model, task, span, me)
    batches = iter(list(batches)) if in_memory else batches
    train(engine, batches, [MetricsHook(History(), training.log_every)], span)


def recipe_tree(given: argparse.Namespace, setting: str, folder: Path) -> dict[str, Any]:
    """Return the recipe of a setting: that many steps without interruption."""
    from cluster.recipe.config import for_workers, load_recipe

    workers, times = SETTINGS[setting]
    recipe = load_recipe(given.recipe, given.overrides)
    tree = for_workers(recipe)
    tree["output"] = str(folder / "runs")
    tree["train"] |= {
        "steps": given.steps + LEFT_OUT,
        "epochs": None,
        "eval_every": 1e9,
        "checkpoint_every": 1e9,
        "global_batch": times * recipe.train.global_batch,
    }
    tree["cluster"]["workers"] = workers
    tree["tracking"]["enabled"] = False
    tree["data"]["prefetch_bytes"] = AHEAD_BYTES
    return tree


def take(given: argparse.Namespace, setting: str, arm: str) -> list[tuple[float, float, float]]:
    """Start an arm of a setting; return loss, seconds and CPU seconds of each step that counts."""
    with tempfile.TemporaryDirectory(prefix="scaling-") as place:
        folder = Path(place)
        (folder / "recipe.json").write_text(json.dumps(recipe_tree(given, setting, folder)))
        command = [sys.executable]
        if arm != "ray":
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={SETTINGS[setting][0]}"]
        command += [__file__, "--one", arm, str(folder / "recipe.json")]
        environment = {
            **os.environ,
            NOTES: str(folder / "notes"),
            ONE_CORE: str(int(given.one_core)),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{setting}, {arm}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        notes = [json.loads(line) for line in (folder / "notes").read_text().splitlines()]
    assert [note[0] for note in notes] == list(range(given.steps + LEFT_OUT)), f"{setting}, {arm}: steps are missing"
    pairs = list(zip(notes, notes[1:], strict=False))[LEFT_OUT:]
    return [(here[1], after[2] - here[2], after[3] - here[3]) for here, after in pairs]


def measure(given: argparse.Namespace, setting: str) -> list[dict[str, Any]]:
    """Let the arms take turns; return one result each."""
    arms = [arm for arm in ARMS if arm in (given.arm or ARMS)]
    walls: dict[str, list[float]] = {arm: [] for arm in arms}
    cpus: dict[str, list[float]] = {arm: [] for arm in arms}
    losses: dict[str, list[float]] = {}
    for turn in range(given.rounds):
        for arm in arms if turn % 2 == 0 else reversed(arms):
            steps = take(given, setting, arm)
            found, wall, cpu = (list(column) for column in zip(*steps, strict=True))
            walls[arm].append(1000 * statistics.fmean(wall))
            cpus[arm].append(1000 * statistics.fmean(cpu))
            for other, expected in losses.items():
                worst = max(abs(a - b) for a, b in zip(found, expected, strict=True))
                if not worst <= TOLERANCE:
                    raise SystemExit(f"{setting}: the losses of {arm} and {other} differ by {worst}: not the same work")
            losses[arm] = found
    workers, times = SETTINGS[setting]
    return [
        {
            "setting": setting,
            "workers": workers,
            "batch_times": times,
            "arm": arm,
            "rounds": given.rounds,
            "step_ms": statistics.median(walls[arm]),
            "spread_ms": max(walls[arm]) - min(walls[arm]),
            "cpu_ms": statistics.median(cpus[arm]),
        }
        for arm in arms
    ]


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what follows from the steps: overheads, speed-up (ideal 2) and weak efficiency (ideal 1)."""
    step = {(row["setting"], row["arm"]): row["step_ms"] for row in rows}
    found = []
    for setting in SETTINGS:
        ours = step.get((setting, "ray"), math.nan)
        for arm in ARMS[1:]:
            if (setting, arm) in step and (setting, "ray") in step:
                found.append({"figure": f"ray / {arm}, {setting}", "value": ours / step[setting, arm]})
    for arm in ARMS:
        one = step.get(("one", arm))
        for name, setting in (("strong speed-up", "strong"), ("weak efficiency", "weak")):
            if one is not None and (setting, arm) in step:
                found.append({"figure": f"{name}, {arm}", "value": one / step[setting, arm]})
    return found


def main() -> None:
    """Run the command line described at the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/train/quickstart.yaml")
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="all by default")
    parser.add_argument("--arm", choices=ARMS, action="append", help="all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="timed steps of a start")
    parser.add_argument("--one-core", action="store_true", help="workers share one core, in every arm")
    parser.add_argument("--json", action="store_true", help="print one line a figure")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="keys of the recipe")
    given = parser.parse_args()
    if given.one:
        tree = json.loads(Path(given.one[1]).read_text())
        ray_arm(tree) if given.one[0] == "ray" else plain_arm(tree, given.one[0] == "memory")
        return
    rows: list[dict[str, Any]] = []
    if not given.json:
        print("| setting | workers | arm | step ms | spread of rounds ms | CPU ms |\n|---|---|---|---|---|---|")
    for setting in given.setting or SETTINGS:
        for row in measure(given, setting):
            rows.append(row)
            line = "| {setting} | {workers} | {arm} | {step_ms:.1f} | {spread_ms:.1f} | {cpu_ms:.1f} |".format(**row)
            print(json.dumps(row) if given.json else line, flush=True)
    if not given.json:
        print("\n| figure | value |\n|---|---|")
    for row in ratios(rows):
        print(json.dumps(row) if given.json else f"| {row['figure']} | {row['value']:.3f} |")


if __name__ == "__main__":
    main()
