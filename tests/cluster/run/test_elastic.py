"""A run's samples and losses at any number of workers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.runtime.local import free_port
from tests.cluster.recipes import write_recipe

BATCH, STEPS = 32, 6
ROOT = Path(__file__).parents[3]


def run(world: int, recipe: Path, folder: Path) -> list[dict[str, Any]]:
    """Train with this number of processes over Gloo; return what each of them recorded."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port("127.0.0.1")), "WORLD_SIZE": str(world)}
    environment = {**os.environ, **address, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    files = [folder / f"{world}-{rank}.json" for rank in range(world)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.run.elastic_worker", recipe, file],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    try:
        printed = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world, "\n".join(printed)
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_losses_and_samples_do_not_depend_on_the_number_of_workers(tmp_path: Path, tree: dict[str, Any]) -> None:
    """32 samples in micro-batches of 5: at 3 and 5 workers some have padded rows, and some contain nothing else."""
    tree["data"] |= {"executor": "inline"}
    tree["train"] = {"steps": STEPS, "global_batch": BATCH, "micro_batch": 5}
    recipe = write_recipe(tmp_path, tree)
    seen = {world: run(world, recipe, tmp_path) for world in (1, 2, 3, 5)}
    (alone,) = seen[1]
    assert len(alone["losses"]) == STEPS and alone["losses"][-1] < alone["losses"][0]
    for world, ranks in seen.items():
        for rank in ranks:
            assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5), (world, rank)
        for step, wanted in enumerate(alone["used"]):
            assert len(wanted) == BATCH
            assert sorted(i for rank in ranks for i in rank["used"][step]) == sorted(wanted)
