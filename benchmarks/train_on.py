"""The training loss and the learning rate of runs that were trained on, as a picture for the documentation.

    python benchmarks/train_on.py docs/images/train-on.png runs/a="as proposed" runs/b="length alone" --from-step 300

Reads the history of each run's newest checkpoint.
"""

import argparse
import json
from pathlib import Path
from typing import Any

WINDOW = 3
COLOURS = ("#2563c9", "#d9610f", "#30363d")


def rows(run: str, from_step: int) -> list[dict[str, Any]]:
    """Return the recorded rows with a training loss."""
    newest = max(Path(run).glob("checkpoints/step-*"))
    found = [json.loads(line) for line in (newest / "history.jsonl").read_text().splitlines()]
    return [row for row in found if "train/loss" in row and row["step"] >= from_step]


def smooth(values: list[float]) -> list[float]:
    """Return the mean of each value and its neighbours."""
    parts = [values[max(0, i - WINDOW) : i + WINDOW + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def draw(target: str, runs: list[str], from_step: int) -> None:
    """Draw the runs, given as FOLDER=LABEL; the first one is in front."""
    import matplotlib.pyplot as plt

    figure, (loss, rate) = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
    for colour, run in reversed(list(zip(COLOURS, runs, strict=False))):
        folder, _, label = run.partition("=")
        found = rows(folder, from_step)
        steps = [row["step"] for row in found]
        loss.plot(steps, smooth([row["train/loss"] for row in found]), color=colour, label=label)
        rate.plot(steps, [row["train/lr"] for row in found], color=colour)
        print(f"{label}: loss {found[-1]['train/loss']:.3f} at step {steps[-1]}")
    loss.set(xlabel="step", ylabel="training loss", yscale="log")
    rate.set(xlabel="step", ylabel="learning rate")
    loss.legend(frameon=False, fontsize=8)
    figure.savefig(target, dpi=80)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("runs", nargs="+", metavar="FOLDER=LABEL")
    parser.add_argument("--from-step", type=int, default=0)
    given = parser.parse_args()
    draw(given.target, given.runs, given.from_step)
