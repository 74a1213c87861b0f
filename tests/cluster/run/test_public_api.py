"""The main job without private names of Ray and DeepSpeed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.recipes import write_recipe


def losses(folder: Path, tree: dict[str, Any], *starts: list[str], **environment: str) -> dict[int, float]:
    """Train with each of these arguments in turn, and return the recorded loss of each step."""
    folder.mkdir()
    recipe = write_recipe(folder, {**tree, "output": str(folder / "runs")})
    for words in starts:
        command = [sys.executable, "-m", "perceiver", "train", str(recipe), *words]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=550)
        assert done.returncode == 0, done.stdout + done.stderr
    history = folder / "runs" / "small-001" / "checkpoints" / "step-00000008" / "history.jsonl"
    rows = map(json.loads, history.read_text().splitlines())
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.mark.slow
def test_the_losses_are_the_same_without_private_names(tmp_path: Path, tree: dict[str, Any]) -> None:
    """Also of a run that was resumed; DeepSpeed compiles an operator that is skipped otherwise."""
    tree["train"] = {"steps": 8, "global_batch": 16, "log_every": 1}
    usual = losses(tmp_path / "usual", tree, [])
    twice = ["train.steps=4"], ["--resume"]
    # A build that was killed leaves a lock in the user's folder, at which all later ones wait.
    public = {"PERCEIVER_PUBLIC_API": "1", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    assert losses(tmp_path / "public", tree, *twice, **public) == usual and len(usual) == 8
