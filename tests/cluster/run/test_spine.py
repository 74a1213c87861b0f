"""A short real run without private names of Ray and DeepSpeed: the number of our frames in it, and its losses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.recipes import small_tree, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
MOST_FRAMES, MOST_FILES, STEPS = 8, 3, 8
ROOT, RECORDER = Path(__file__).parents[3], Path(__file__).with_name("spine")


def losses(folder: Path, images: str, command: list[str], data: dict[str, Any], **environment: str) -> dict[int, float]:
    """Train in a new folder with a command that takes a recipe, and return the recorded loss of each step."""
    folder.mkdir(exist_ok=True)
    tree = small_tree(folder, images)
    tree |= {"cluster": {"workers": 1}, "tracking": {"enabled": False}}
    tree["train"] = {"steps": STEPS, "global_batch": 16, "log_every": 1}
    tree["data"] |= data
    words = [sys.executable, "-m", *command, str(write_recipe(folder, tree))]
    environment = {**os.environ, **environment}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    history = folder / "runs" / "small-001" / "checkpoints" / f"step-{STEPS:08d}" / "history.jsonl"
    rows = map(json.loads, history.read_text().splitlines())
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory, images: str) -> tuple[Path, dict[int, float]]:
    """The folder of the stacks that the run recorded, see spine/sitecustomize.py, and its losses.

    DeepSpeed would compile its shared-memory all-reduce for a minute, which a private name prevents otherwise.
    """
    folder = tmp_path_factory.mktemp("public")
    recorder = {"PYTHONPATH": str(RECORDER), "SPINE_FOLDER": str(folder), "SPINE_UNBUILT": "deepspeed_shm_comm"}
    return folder, losses(folder, images, ["perceiver", "train"], {}, PERCEIVER_PUBLIC_API="1", **recorder)


def test_the_stack_of_a_step_and_of_a_checkpoint_is_short(public: tuple[Path, dict[int, float]]) -> None:
    def stack(name: str) -> list[str]:
        return max((json.loads(file.read_text()) for file in public[0].glob(f"{name}-*.json")), key=len)

    frames = [frame for frame in stack("fit") + stack("step") if not frame.endswith(":<module>")]
    assert frames[0] == "perceiver/__main__.py:main" and "cluster/run/worker.py:train_worker" in frames
    assert len(frames) <= MOST_FRAMES, "\n".join(frames)
    commit = [*stack("commit"), "perceiver/train/checkpoint/store.py:commit"]
    files = {frame.partition(":")[0] for frame in commit[commit.index("perceiver/train/loop.py:train") :]}
    assert len(files) <= MOST_FILES, files


def test_the_losses_are_the_same_without_private_names(
    tmp_path: Path, images: str, public: tuple[Path, dict[int, float]]
) -> None:
    """As with them in a worker that reads its data without Ray."""
    usual = losses(tmp_path, images, ["tests.cluster.run.whole_worker"], {"executor": "inline"}, DS_ACCELERATOR="cpu")
    assert len(usual) == STEPS and public[1] == pytest.approx(usual, rel=1e-6)
