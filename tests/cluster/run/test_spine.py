"""The number of our frames from the command to the optimizer step, and to a committed checkpoint, in a real run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.recipes import write_recipe

MOST_FRAMES, MOST_FILES = 8, 3


@pytest.mark.slow
def test_the_stack_of_a_step_and_of_a_checkpoint_is_short(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["train"] = {"steps": 2, "global_batch": 16, "checkpoint_every": 0.2}
    recipe = write_recipe(tmp_path, tree)
    stacks = tmp_path / "stacks"
    stacks.mkdir()
    environment = {"PYTHONPATH": str(Path(__file__).with_name("spine")), "SPINE_FOLDER": str(stacks)}
    command = [sys.executable, "-m", "perceiver", "train", str(recipe)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr

    def stack(name: str) -> list[str]:
        return max((json.loads(file.read_text()) for file in stacks.glob(f"{name}-*.json")), key=len)

    frames = [frame for frame in stack("fit") + stack("step") if not frame.endswith(":<module>")]
    assert frames[0] == "perceiver/__main__.py:main" and "cluster/run/worker.py:train_worker" in frames
    assert len(frames) <= MOST_FRAMES, "\n".join(frames)
    commit = [*stack("commit"), "perceiver/train/checkpoint/store.py:commit"]
    files = {frame.partition(":")[0] for frame in commit[commit.index("perceiver/train/loop.py:train") :]}
    assert len(files) <= MOST_FILES, files
