"""The jobs for a GPU: their checks at a tiny size on the CPU, and the figures that they read from a run's folder."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import gpu_checks, gpu_data, gpu_ingest, gpu_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def lines() -> list[dict]:
    command = [sys.executable, "benchmarks/gpu_checks.py", "--tiny"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_all_checks_pass_on_a_cpu(lines):
    assert all(set(line) == {"table", "check", "result", "wanted", "passed"} for line in lines)
    assert all(line["table"] == "checks" and line["passed"] is True for line in lines)
    names = " ".join(line["check"] for line in lines)
    assert all(f"{kind}, ZeRO {stage}, fp32" in names for kind in ("adamw", "lamb") for stage in range(4))
    assert "bf16" in names and "loss after 6 steps, lamb" in names


def test_a_check_that_raises_is_a_line_and_the_next_one_runs(monkeypatch):
    def broken(data, tiny):
        raise RuntimeError("no\nNCCL")

    def sound(data, tiny):
        yield "sound", 1, 1, True

    monkeypatch.setattr(gpu_checks, "CHECKS", {"broken": broken, "sound": sound})
    found = list(gpu_checks.verdicts(["broken", "sound"], gpu_checks.Digits(torch.device("cpu")), True))
    assert found == [("broken", "RuntimeError: no NCCL", "a result", False), ("sound", 1, 1, True)]


@pytest.mark.parametrize(
    ("code", "output", "result", "passed"),
    [
        (0, "........\n8 passed in 9.1s\n", {"passed": 8}, True),
        (0, "1 passed, 7 skipped in 9.1s\n", {"passed": 1, "skipped": 7}, False),
        (
            1,
            "FAILED a.py::b - AssertionError\n1 failed, 7 passed in 9.1s\n",
            {"failed": 1, "passed": 7, "tests": ["a.py::b"]},
            False,
        ),
        (4, "", "no output, exit code 4", False),
    ],
)
def test_the_verdict_on_the_tests(code, output, result, passed):
    assert gpu_checks.tests_verdict(code, output)[1:] == (result, "all passed", passed)


def test_the_first_steps_of_a_run_do_not_count(tmp_path):
    def row(step, rate, wait, loss):
        return {"step": step, "train/samples_per_s": rate, "train/data_wait": wait, "train/loss": loss}

    rows = [row(5, 1.0, 0.9, 7.0), {"step": 5, "eval/loss": 3.0}, row(10, 100.0, 0.1, 6.0), row(12, 50.0, 0.3, 5.0)]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    found = gpu_run.figures(gpu_run.records(tmp_path), 20, 5)
    # 5 steps of 20 samples take 1 s, 0.1 s of it waiting; 2 steps take 0.8 s, 0.24 s of it waiting.
    assert found == {
        "steps": 7,
        "samples_per_s": pytest.approx(140 / 1.8, abs=0.05),
        "best_samples_per_s": 100.0,
        "step_ms": pytest.approx(1800 / 7, abs=0.005),
        "waiting": pytest.approx(0.34 / 1.8, abs=5e-5),
        "first_loss": 7.0,
        "last_loss": 5.0,
    }


def test_a_run_without_enough_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match="step 5"):
        gpu_run.figures([{"step": 5, "train/samples_per_s": 1.0, "train/data_wait": 0.0, "train/loss": 1.0}], 8, 5)


def test_the_photographs():
    one = gpu_data.jpeg(3)
    assert one == gpu_data.jpeg(3) != gpu_data.jpeg(5)
    assert Image.open(io.BytesIO(one)).size == gpu_data.SIZE
    assert 50_000 < len(one) < 200_000


def test_a_pace_counts_the_waits(monkeypatch):
    clock = [0.0]

    class Clock:
        perf_counter = staticmethod(lambda: clock[0])

        @staticmethod
        def sleep(seconds):
            clock[0] += seconds

    def batches():
        while True:
            clock[0] += 0.1
            yield None

    monkeypatch.setattr(gpu_ingest, "time", Clock)
    monkeypatch.setattr(gpu_ingest, "tree_cpu", lambda: clock[0])
    found = gpu_ingest.pace(batches(), 10, 4, 2, 0.3)
    assert found == {"samples_per_s": 25.0, "waiting": 0.25, "cpu_ms": 40.0}
