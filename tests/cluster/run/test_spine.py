"""A short real run: the number of our frames in it, and its losses without private names of Ray and DeepSpeed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.recipes import small_tree, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
MOST_FRAMES, MOST_FILES, STEPS = 8, 3, 8


def losses(folder: Path, images: str, **environment: str) -> dict[int, float]:
    """Train in a new folder, and return the recorded loss of each step."""
    folder.mkdir(exist_ok=True)
    tree = small_tree(folder, images)
    tree |= {"cluster": {"workers": 1}, "tracking": {"enabled": False}}
    tree["train"] = {"steps": STEPS, "global_batch": 16, "log_every": 1}
    command = [sys.executable, "-m", "perceiver", "train", str(write_recipe(folder, tree))]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    history = folder / "runs" / "small-001" / "checkpoints" / f"step-{STEPS:08d}" / "history.jsonl"
    rows = map(json.loads, history.read_text().splitlines())
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory, images: str) -> tuple[Path, dict[int, float]]:
    """The folder of the stacks that the run recorded, see spine/sitecustomize.py, and its losses."""
    folder = tmp_path_factory.mktemp("usual")
    recorder = {"PYTHONPATH": str(Path(__file__).with_name("spine")), "SPINE_FOLDER": str(folder)}
    return folder, losses(folder, images, **recorder)


def test_the_stack_of_a_step_and_of_a_checkpoint_is_short(usual: tuple[Path, dict[int, float]]) -> None:
    def stack(name: str) -> list[str]:
        return max((json.loads(file.read_text()) for file in usual[0].glob(f"{name}-*.json")), key=len)

    frames = [frame for frame in stack("fit") + stack("step") if not frame.endswith(":<module>")]
    assert frames[0] == "perceiver/__main__.py:main" and "cluster/run/worker.py:train_worker" in frames
    assert len(frames) <= MOST_FRAMES, "\n".join(frames)
    commit = [*stack("commit"), "perceiver/train/checkpoint/store.py:commit"]
    files = {frame.partition(":")[0] for frame in commit[commit.index("perceiver/train/loop.py:train") :]}
    assert len(files) <= MOST_FILES, files


def test_the_losses_are_the_same_without_private_names(
    tmp_path: Path, images: str, usual: tuple[Path, dict[int, float]]
) -> None:
    """DeepSpeed compiles an operator that is skipped otherwise."""
    # A build that was killed leaves a lock in the user's folder, at which all later ones wait.
    public = {"PERCEIVER_PUBLIC_API": "1", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    assert losses(tmp_path, images, **public) == usual[1] and len(usual[1]) == STEPS
