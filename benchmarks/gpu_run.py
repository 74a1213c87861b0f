"""Training runs by `perceiver train` on a GPU: throughput and the share of time that steps wait for data.

    perceiver prepare digits data/digits          # otherwise the second run does this, with a download
    python benchmarks/gpu_run.py                  # both runs; one JSON line each
    python benchmarks/gpu_run.py --tiny           # small models, a few steps, on the CPU where there is no GPU

- imagenet: `recipes/train/imagenet_perceiver.yaml` (44.9 M parameters, RandAugment, LAMB, ZeRO 1, bf16) on JPEGs of
  500 x 375 that are made first, with one worker at batch 64.
- imagenet, bf16 residual: the same with `train.bf16_residual=true`.
- quickstart: `recipes/train/quickstart.yaml` with one worker, for some steps.

A run is a subprocess; the figures come from its `history.jsonl`. The first steps are left out: they wait for the first
data tasks, and kernels are compiled. `samples_per_s`, `step_ms` and `waiting` (share of the time) are those of all
other steps together. `best_samples_per_s` is that of the fastest window of `log_every` steps. `seconds` is the
command's whole time, with start-up, evaluation, checkpoint and report.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_data  # noqa: E402
from benchmarks.ingest import run_one  # noqa: E402

NEVER = 1e6
"""Epochs between evaluations and checkpoints: only at the end."""
LIMIT_S = 300
"""For a tiny run on a machine that is busy; the others have less."""
TINY = (
    "data.image_size=[32,32]",
    "data.tasks=1",
    "data.cpus_per_task=0.5",
    "model.inputs.size=[32,32]",
    "model.latents=8",
    "model.latent_channels=16",
    "model.heads=2",
)

HALF = ("train.bf16_residual=true",)


@dataclass(frozen=True)
class Length:
    """How long a run is: its steps, the steps per record, and those that are left out."""

    steps: int
    log_every: int
    left_out: int

    def keys(self) -> list[str]:
        """Return the keys of a recipe."""
        train = {
            "epochs": "null",
            "steps": self.steps,
            "log_every": self.log_every,
            "eval_every": NEVER,
            "checkpoint_every": NEVER,
        }
        return [f"train.{key}={value}" for key, value in train.items()]


def records(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's history that contain training metrics."""
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [row for row in rows if "train/samples_per_s" in row]


def figures(rows: Iterable[dict[str, Any]], batch: int, left_out: int) -> dict[str, Any]:
    """Return throughput, step time and waiting over the steps after the first `left_out`.

    A row is about the steps since the row before, so `left_out` must end with one.

    Args:
        rows: see `records`.
        batch: samples per step.
        left_out: steps at the beginning that do not count.
    """
    steps, seconds, waited, before, rates = 0, 0.0, 0.0, 0, []
    rows = list(rows)
    for row in rows:
        window = row["step"] - before
        if before >= left_out:
            spent = window * batch / row["train/samples_per_s"]
            steps, seconds, waited = steps + window, seconds + spent, waited + spent * row["train/data_wait"]
            rates.append(row["train/samples_per_s"])
        before = row["step"]
    if not steps:
        raise ValueError(f"no record after step {left_out}: got steps {[row['step'] for row in rows]}")
    return {
        "steps": steps,
        "samples_per_s": round(steps * batch / seconds, 1),
        "best_samples_per_s": round(max(rates), 1),
        "step_ms": round(1e3 * seconds / steps, 2),
        "waiting": round(waited / seconds, 4),
        "first_loss": rows[0]["train/loss"],
        "last_loss": rows[-1]["train/loss"],
    }


def train(recipe: str, keys: list[str], output: Path, limit_s: float) -> tuple[dict[str, Any], float]:
    """Run `perceiver train`; return its outcome, and the seconds it took.

    Raises:
        RuntimeError: the command failed, or took longer than the limit.
    """
    places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "perceiver", "train", str(ROOT / f"recipes/train/{recipe}.yaml")]
    began = time.perf_counter()
    outcome = run_one([*command, f"output={output}", "--json", *keys], os.environ | {"PYTHONPATH": places}, limit_s)
    if outcome is None:
        raise RuntimeError(f"perceiver train took longer than {limit_s} s")
    return outcome, time.perf_counter() - began


def measure(recipe: str, keys: list[str], output: Path, length: Length, batch: int, limit_s: float) -> dict[str, Any]:
    """Run a recipe and return its figures."""
    keys = [*keys, *length.keys(), f"train.global_batch={batch}", "cluster.workers=1"]
    outcome, seconds = train(recipe, keys, output, limit_s)
    found = figures(records(Path(outcome["run"])), batch, length.left_out)
    loss = (outcome.get("evaluation") or {}).get("loss")
    return {"batch": batch, **found, "test_loss": loss, "seconds": round(seconds, 1), "status": outcome["status"]}


def imagenet(folder: Path, gpus: int, count: int, tiny: bool, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Make photographs unless they are there, train on them."""
    began = time.perf_counter()
    size = 0.0
    if not (folder / "prepared").exists():
        size = gpu_data.write_files(gpu_data.jpeg, folder / "photos", count, ".jpg")
    made = time.perf_counter()
    if size:
        gpu_data.prepare("image_folder", folder / "photos", folder / "prepared", count)
    prepared = time.perf_counter()
    batch, length = (4, Length(3, 1, 1)) if tiny else (64, Length(45, 5, 5))
    keys = [*keys, f"data.url={folder / 'prepared'}", "data.eval_split=test", f"cluster.gpus_per_worker={gpus}"]
    keys += [f"train.micro_batch={batch}", *(TINY if tiny else ())]
    found = measure("imagenet_perceiver", keys, folder / "runs", length, batch, LIMIT_S if tiny else 110)
    facts = {"jpegs": count, "mean_bytes": round(size)}
    return facts | found | {"make_s": round(made - began, 1), "prepare_s": round(prepared - made, 1)}


def quickstart(folder: Path, gpus: int, digits: Path, tiny: bool) -> dict[str, Any]:
    """Train on the digits."""
    if not (digits / "manifest.json").exists():
        command = [sys.executable, "-m", "perceiver", "prepare", "digits", str(digits)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    batch, length = (32, Length(4, 1, 1)) if tiny else (128, Length(200, 20, 20))
    keys = [f"data.url={digits}", f"cluster.gpus_per_worker={gpus}"]
    return measure("quickstart", keys, folder / "runs", length, batch, LIMIT_S if tiny else 60)


def main() -> int:
    """Run the command line described at the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny model, 40 JPEGs, 3 steps")
    parser.add_argument(
        "--run", choices=["imagenet", "imagenet, bf16 residual", "quickstart"], action="append", help="all by default"
    )
    parser.add_argument("--count", type=int, help="JPEGs to make; default 1500, 40 with --tiny")
    parser.add_argument("--digits", type=Path, default=ROOT / "data/digits", help="prepared digits, made if missing")
    given = parser.parse_args()
    import torch

    gpus, count = int(torch.cuda.is_available()), given.count or (40 if given.tiny else 1500)
    runs = {
        "imagenet": lambda folder: imagenet(folder, gpus, count, given.tiny),
        "imagenet, bf16 residual": lambda folder: imagenet(
            folder, gpus, count, given.tiny, ["train.bf16_residual=true"]
        ),
        "quickstart": lambda folder: quickstart(folder, gpus, given.digits.resolve(), given.tiny),
    }
    code = 0
    with tempfile.TemporaryDirectory(prefix="gpu-run-") as place:
        for name in given.run or runs:
            line: dict[str, Any] = {"table": "runs", "run": name, "device": "gpu" if gpus else "cpu"}
            try:
                line |= runs[name](Path(place))
            except (RuntimeError, ValueError, OSError, subprocess.SubprocessError) as error:
                line["error"], code = str(error)[-800:], 1
            print(json.dumps(line), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
