"""A run's samples and losses at any number of workers."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.recipes import write_recipe

BATCH, STEPS = 32, 6
ROOT = Path(__file__).parents[3]


def run(worlds: Sequence[int], recipe: Path, folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Train with these numbers of processes over Gloo; return what each process recorded, by their number."""
    command = [sys.executable, "-m", "tests.cluster.run.elastic_worker", recipe, folder, *map(str, worlds)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=350)
    assert done.returncode == 0, done.stdout + done.stderr
    return {
        world: [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)] for world in worlds
    }


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_losses_and_samples_do_not_depend_on_the_number_of_workers(tmp_path: Path, tree: dict[str, Any]) -> None:
    """32 samples in micro-batches of 5: at 3 and 5 workers some have padded rows, and some contain nothing else."""
    tree["data"] |= {"executor": "inline"}
    tree["train"] = {"steps": STEPS, "global_batch": BATCH, "micro_batch": 5}
    recipe = write_recipe(tmp_path, tree)
    seen = run((1, 2, 3, 5), recipe, tmp_path)
    (alone,) = seen[1]
    assert len(alone["losses"]) == STEPS and alone["losses"][-1] < alone["losses"][0]
    for world, ranks in seen.items():
        for rank in ranks:
            assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5), (world, rank)
        for step, wanted in enumerate(alone["used"]):
            assert len(wanted) == BATCH
            assert sorted(i for rank in ranks for i in rank["used"][step]) == sorted(wanted)
