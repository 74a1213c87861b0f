"""`perceiver blend`: the weights of G-blend from the histories of runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from perceiver.cli.blend import command
from perceiver.config import UserError


def run(folder: Path, name: str, pairs: list[tuple[float, float]], key: str = "loss") -> str:
    """Write the history of a run with an evaluation in each epoch of 10 steps."""
    rows: list[dict[str, float]] = []
    for epoch, (train, held_out) in enumerate(pairs, 1):
        at = {"step": 10 * epoch, "time": 0.0}
        rows += [{**at, f"train/{key}": train, "train/epoch": float(epoch)}, {**at, f"eval/{key}": held_out}]
    (folder / name).mkdir()
    (folder / name / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, str]:
    """dG is 0.2, 0.1 and 0, dO 0.2, 0.05 and 0.1 from the first to the last epoch."""
    return {
        "audio": run(tmp_path, "a", [(1.0, 1.0), (0.7, 0.8), (0.6, 0.8)]),
        "video": run(tmp_path, "v", [(1.0, 1.1), (0.9, 1.0), (0.85, 1.0)]),
        "joint": run(tmp_path, "j", [(0.9, 0.9), (0.8, 0.8), (0.8, 0.9)], key="loss_joint"),
    }


def answer(runs: dict[str, str], *options: str) -> Any:
    given = [f"{name}={place}" for name, place in runs.items()]
    found = CliRunner().invoke(command, [*given, *options, "--json"], catch_exceptions=False, standalone_mode=False)
    return json.loads(found.stdout)


def test_weights_from_the_first_to_the_last_evaluation(runs: dict[str, str]) -> None:
    found = answer(runs)
    assert (found["from"], found["to"]) == (1, 3) and found["runs"]["audio"]["train"] == [1.0, 0.6]
    weights = {name: one["weight"] for name, one in found["runs"].items()}
    assert weights == pytest.approx({"audio": 5 / 45, "video": 40 / 45, "joint": 0})
    text = (
        CliRunner().invoke(command, [f"{name}={place}" for name, place in runs.items()], standalone_mode=False).output
    )
    assert "task.blend: {audio: 0.111, video: 0.889, joint: 0.000}" in text


def test_other_epochs(runs: dict[str, str]) -> None:
    """From 1 to 2: dG 0.2, 0.1, 0.1; dO 0.1, 1e-4, 1e-4."""
    assert answer(runs, "--to", "2")["runs"]["audio"]["weight"] == pytest.approx(20 / (20 + 2e7))


def test_what_cannot_be_compared_is_refused(runs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--to 4: the runs have evaluations at the epochs 1, 2, 3"):
        answer(runs, "--to", "4")
    with pytest.raises(UserError, match="an earlier and a later"):
        answer(runs, "--from", "3")
    once = run(tmp_path, "once", [(1.0, 1.0)])
    with pytest.raises(UserError, match="once: the history has 1 evaluations"):
        answer({"audio": once, "video": runs["video"]})
    with pytest.raises(UserError):
        answer({"audio": str(tmp_path / "nowhere")})
