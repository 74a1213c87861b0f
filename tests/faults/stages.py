"""A process that saves checkpoints and is killed before one of its operations on the disk."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from perceiver.train.checkpoint.store import CheckpointStore, Snapshot
from tests.perceiver.train.engine.torch_engine import TorchEngine
from tests.perceiver.train.toy import toy_engine

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate"}


def killed_at_each_stage(folder: Path) -> tuple[int, list[int]]:
    """Kill a save of step 2 before its first, second, ... file operation, until one completes.

    Returns:
        The number of operations, and those after which there was no complete checkpoint.
    """
    command = [sys.executable, "-m", "tests.faults.stages", str(folder)]
    done = subprocess.run(command, check=True, timeout=300, stdout=subprocess.PIPE)
    found = json.loads(done.stdout)
    return found["stages"], found["wrong"]


def main(folder: Path) -> None:
    """Fork a process for each stage; what they need is imported once, also what the first save imports."""
    save(toy_engine(), CheckpointStore(str(folder / "first")), 1)
    wrong = []
    for stage in range(1, 200):
        place = str(folder / f"stage-{stage:03d}")
        child = os.fork()
        if child == 0:
            save_until_killed(place, stage)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        got_through = os.waitstatus_to_exitcode(status) == 0
        newest = CheckpointStore(place).newest()
        if newest is None or (got_through and newest.step != 2):
            wrong.append(stage)
        if got_through:
            print(json.dumps({"stages": stage - 1, "wrong": wrong}))
            return
    raise AssertionError("no save was completed")


def save_until_killed(place: str, stage: int) -> None:
    """Save step 1 without a fault, then step 2 with the kill."""
    engine, store = toy_engine(), CheckpointStore(place)
    save(engine, store, 1)
    left = stage

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in EVENTS and place in str(arguments[:2]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save(engine, store, 2)


def save(engine: TorchEngine, store: CheckpointStore, step: int) -> None:
    """Save a checkpoint of a step."""
    store.save(engine, Snapshot(step, 8 * step, {}, {}, {}, {}, "{}\n"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
