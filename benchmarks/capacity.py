"""Accuracy of the plan: the estimates of `perceiver plan --calibrate` against measurements of `perceiver train`.

    python benchmarks/capacity.py --recipe recipes/train/quickstart.yaml --workers 1 --workers 2 --json

Prints one line per number of workers: step time and memory of a worker, estimated and measured. The step time is the
mean of the recorded windows, the first ones left out: samples are made ahead, so that early steps share the cores with
more decoding than late ones. The memory is a worker's peak resident set without what it shares with other processes.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

WINDOWS_LEFT_OUT = 3


def run_json(*command: str) -> dict[str, Any]:
    """Run a verb with --json and return its last line."""
    done = subprocess.run([sys.executable, "-m", "perceiver", *command, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"perceiver {' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


class MemoryWatch(threading.Thread):
    """Follows the training workers of this machine; `peak` is the largest unshared memory of one of them."""

    def __init__(self, every_s: float = 0.25) -> None:
        super().__init__(daemon=True)
        self.every_s, self.peak = every_s, 0
        self.stop = threading.Event()

    def run(self) -> None:
        """Look every so often."""
        while not self.stop.wait(self.every_s):
            for process in psutil.process_iter(["cmdline"]):
                if "RayTrainWorker" in " ".join(process.info["cmdline"] or []):
                    with contextlib.suppress(psutil.Error):
                        self.peak = max(self.peak, process.memory_full_info().uss)


def measure(recipe: str, overrides: list[str], folder: str) -> tuple[float, float]:
    """Train; return samples per second and the peak bytes of a worker."""
    watch = MemoryWatch()
    watch.start()
    done = run_json("train", recipe, *overrides, f"output={folder}", "tracking.enabled=false")
    watch.stop.set()
    watch.join()
    newest = max(Path(done["run"]).glob("checkpoints/step-*"))
    records = [json.loads(line) for line in (newest / "history.jsonl").read_text().splitlines()]
    rates = [r["train/samples_per_s"] for r in records if "train/samples_per_s" in r][WINDOWS_LEFT_OUT:]
    return statistics.harmonic_mean(rates), float(watch.peak)


def main() -> None:
    """Estimate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="recipes/train/quickstart.yaml")
    parser.add_argument("--workers", type=int, action="append")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", help="keys of the recipe")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for workers in given.workers or [1, 2]:
            keys = [*given.overrides, f"cluster.workers={workers}"]
            began = time.perf_counter()
            plan = run_json("plan", given.recipe, *keys, "--gpu", "cpu", "--gpus", str(workers), "--calibrate")
            spent = time.perf_counter() - began
            rate, memory = measure(given.recipe, keys, folder)
            seconds = plan["micro_batch"] * plan["accumulation"] * workers / rate
            row = {
                "recipe": given.recipe,
                "overrides": given.overrides,
                "workers": workers,
                "calibration_s": spent,
                "step_s": seconds,
                "step_s_foretold": plan["step_seconds"]["total"],
                "step_off": plan["step_seconds"]["total"] / seconds - 1,
                "memory_mb": memory / 1e6,
                "memory_mb_foretold": plan["memory"]["total"] / 1e6,
                "memory_off": plan["memory"]["total"] / memory - 1,
            }
            print(
                json.dumps(row)
                if given.json
                else f"{workers} workers: step {seconds:.4f} s, foretold {row['step_s_foretold']:.4f} "
                f"({row['step_off']:+.0%}); "
                f"memory {memory / 1e6:.0f} MB, foretold {row['memory_mb_foretold']:.0f} ({row['memory_off']:+.0%})"
            )


if __name__ == "__main__":
    main()
