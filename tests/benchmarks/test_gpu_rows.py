"""The papers' models on a GPU (`benchmarks/gpu_rows.py`) and the plan against them (`gpu_plan.py`), at tiny sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_plan, gpu_rows
from cluster.runtime.hardware import load_hardware
from perceiver.config import UserError

H200 = load_hardware(None).device("h200")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert gpu_rows.main([*words, "--tiny"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def uncounted(tmp_path: Path) -> str:
    """Return a file without FLOPs, whose counting takes longer than the tiny passes."""
    path = tmp_path / "counts.json"
    path.write_text("{}")
    return str(path)


@pytest.mark.parametrize("row", gpu_rows.ROWS)
def test_every_implementation_of_a_row_is_measured(row: str, uncounted: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu_rows, "order", lambda names: [(row, each) for each in gpu_rows.ROWS[row].eager])
    found = run(capsys, "--row", row, "--counts", uncounted)
    assert [line["error"] for line in found] == [None] * len(found)
    pairs = {(line["implementation"], line["pass"]) for line in found}
    assert pairs == {(name, kind) for name in gpu_rows.ROWS[row].eager for kind in ("forward", "step")}
    assert all(line["ms"] > 0 and line["parameters"] > 0 for line in found)
    assert len({line["parameters"] for line in found}) == 1
    assert set(found[0]) == {"table", "row", "implementation", *gpu_rows.COLUMNS}


def test_compiled_layers_are_measured_after_the_first_rows() -> None:
    names = ["points", "video"]
    kinds = gpu_rows.order(names)
    assert kinds.index(("points", "ours plain compiled")) in range(2, kinds.index(("video", "ours")))
    compiled = {pair for pair in gpu_rows.order(list(gpu_rows.ROWS)) if pair[1] in gpu_rows.COMPILED}
    assert compiled == {(row, each) for row in ("points", "audio raw", "language") for each in gpu_rows.COMPILED}


@pytest.mark.parametrize("implementation", gpu_rows.COMPILED)
def test_compiled_layers_compute_the_same(implementation: str) -> None:
    row = gpu_rows.ROWS["language"]
    plain, raw = gpu_rows.build(row, "ours plain", 2, "cpu", tiny=True)
    model, _ = gpu_rows.build(row, implementation, 2, "cpu", tiny=True)
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model(raw), plain(raw), rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_rates_are_the_counts_over_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 samples, 3 of 10^12 FLOPs forward: 36 TFLOP in 100 ms are 360 TFLOP/s."""
    found = [{"pass": kind, "ms": 100.0, "memory_gb": 1.0, "parameters": 7} for kind in ("forward", "step")]
    monkeypatch.setattr(gpu_rows, "shrinking", lambda *_: (12, "note", found))
    counts = {"points": {"ours": {"forward": 3e12, "step": 8e12, "paper": 4e12}}}
    setting = gpu_rows.Setting("cpu", 1000.0, 1.0, True)
    forward, step = gpu_rows.lines("points", "ours", setting, counts)
    assert (forward["tflops_executed"], forward["tflops_paper"], forward["share_of_peak"]) == (360, 480, 0.36)
    assert (step["tflops_executed"], step["tflops_paper"]) == (960, 1440)
    assert step["batch"] == 12 and step["note"] == "note"


def test_counts_of_both_paths_are_the_accounting_s() -> None:
    counts = gpu_rows.count("points", True)
    assert counts["ours"]["paper"] == counts["plain"]["paper"] == counts["plain"]["forward"]
    assert counts["plain"]["step"] > 2 * counts["plain"]["forward"]


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def measure(row: Any, implementation: str, batch: int, setting: Any) -> list[Any]:
        tried.append(batch)
        if batch > 64:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return []

    monkeypatch.setattr(gpu_rows, "measure", measure)
    batch, note, _ = gpu_rows.shrinking(gpu_rows.ROWS["points"], "ours", gpu_rows.Setting("cpu", None, 1.0, False))
    assert tried == [256, 128, 64] and batch == 64
    assert note == "256 wanted, out of memory at 128"


def test_what_fails_is_a_line_and_the_next_row_is_measured(uncounted: str, capsys: Any, monkeypatch: Any) -> None:
    build = gpu_rows.build

    def failing(row: Any, implementation: str, *rest: Any) -> Any:
        if implementation == "ours":
            raise RuntimeError("first line\nsecond line")
        return build(row, implementation, *rest)

    monkeypatch.setattr(gpu_rows, "build", failing)
    monkeypatch.setattr(gpu_rows, "order", lambda names: [("points", "ours"), ("points", "ours plain")])
    failed, *others = run(capsys, "--row", "points", "--counts", uncounted)
    assert failed["error"] == "RuntimeError: first line" and failed["ms"] is None
    assert [line["pass"] for line in others] == ["forward", "step"]


def test_without_time_left_each_measurement_is_named(uncounted: str, capsys: Any) -> None:
    found = run(capsys, "--seconds", "-1", "--counts", uncounted)
    assert [(line["row"], line["implementation"]) for line in found] == gpu_rows.order(list(gpu_rows.ROWS))
    assert all("left out" in line["error"] for line in found)


def test_a_measurement_that_takes_too_long_ends() -> None:
    with pytest.raises(gpu_rows.TooLongError, match="longer than"), gpu_rows.limited(0.01):
        while True:
            pass


def test_the_peak_is_that_of_the_hardware_table() -> None:
    assert gpu_rows.peak_tflops("NVIDIA H200") == H200.bf16_tflops
    assert gpu_rows.peak_tflops("cpu") is None


def plan_lines() -> list[dict[str, Any]]:
    work = gpu_plan.workload("points", "ours", True)
    found = gpu_plan.predict(work, H200, 2)
    line = {
        "row": "points",
        "implementation": "ours",
        "pass": "step",
        "batch": 2,
        "parameters": work.account.parameters,
    }
    line |= {"ms": 2 * found["predicted_ms"], "memory_gb": found["predicted_gb"] / 3, "error": None}
    return [line, {**line, "pass": "forward"}, {**line, "error": "failed"}, {**line, "parameters": 5}, {"job": "rows"}]


def test_the_plan_is_compared_with_measured_steps_of_the_same_model() -> None:
    (found,) = gpu_plan.compare(plan_lines(), H200, tiny=True)
    assert found["step_ratio"] == pytest.approx(0.5) and found["memory_ratio"] == pytest.approx(3)
    assert found["predicted_gb"] == pytest.approx(found["states_gb"] + found["activations_gb"])
    parts = found["products_ms"] + found["float32_products_ms"] + found["kernel_ms"] + found["other_ms"]
    assert found["predicted_ms"] == pytest.approx(max(parts, found["launch_ms"]) + found["optimizer_ms"])


def test_memory_above_the_states_is_compared_with_the_activations() -> None:
    work = gpu_plan.workload("image perceiver", "ours", True)
    above = gpu_plan.predict(work, H200, 4)["activations_gb"]
    line = {"table": "step", "variant": "eager", "batch": 4, "step_ms": 1.0, "memory_gb": above}
    (found,) = gpu_plan.compare([line], H200, tiny=True)
    assert found["memory_ratio"] == pytest.approx(1)


def test_lines_become_a_table(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(["no JSON", *map(json.dumps, plan_lines())]))
    assert gpu_plan.main(["--lines", str(path), "--tiny"]) == 0
    header, rule, row = capsys.readouterr().out.splitlines()
    assert header.count("|") == rule.count("|") == row.count("|") and "| points | ours | 2 |" in row


def test_calibration_without_its_libraries_or_data_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_plan.importlib.util, "find_spec", lambda name: None if name == "ray" else True)
    assert gpu_plan.calibration(["recipe.yaml"])["error"] == "perceiver plan --calibrate needs ray"

    def refuse(*_: Any) -> Any:
        raise UserError("data.url = data/digits is not prepared")

    monkeypatch.setattr(gpu_plan.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(gpu_plan, "plan", refuse)
    assert gpu_plan.calibration(["recipe.yaml"])["error"] == "data.url = data/digits is not prepared"
