"""The plan's step time and memory against measurements on a GPU.

    python benchmarks/gpu_plan.py --lines lines.jsonl            # a table; on any machine
    python benchmarks/gpu_plan.py --lines lines.jsonl --json     # a JSON object per measurement, with the plan's parts
    python benchmarks/gpu_plan.py                                # on the GPU: `perceiver plan --calibrate`
    python benchmarks/gpu_plan.py --tiny                         # measures a row at a tiny size here and compares it

The lines are those of `gpu_rows.py` and `gpu_step.py`, or the file of `gpu.py`, which has both. Compared are the steps
of `ours` (also compiled) and `ours plain` with the parameters of their row's preset, and the steps `eager` and
`compiled` of the ImageNet Perceiver. The plan is that of one device without ZeRO, as the steps were measured, and
without reading. Memory is without the libraries' (`context_gb` of the hardware table),
which torch's allocator does not count. A ratio is predicted over measured.

Parts of a step: `products_ms` and `float32_products_ms`, by FLOPs or traffic, the larger of both; `kernel_ms` of
separable attention; `other_ms`, all other operations by traffic; or, if that is longer, `launch_ms`, in which the host
launches all operations; and `optimizer_ms`.

Without `--lines` the recipe, by default the quickstart with `data/digits`, is planned before and after a calibration,
which takes Ray and DeepSpeed; without them, or without the data, the line has `error`.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from gpu_rows import ROWS, Setting, configure, prepare, shrinking  # noqa: E402

from perceiver.config import UserError  # noqa: E402

if TYPE_CHECKING:
    from cluster.capacity.workload import Workload
    from cluster.runtime.hardware import Device

CHANGES: dict[str, dict[str, Any]] = {"ours": {}, "ours compiled": {}, "ours plain": {"attention": "plain"}}
PLANNED = set(ROWS) - {"autoencoding"}
"""Rows with a plan: that of autoencoding would decode every element, and training decodes some."""
VARIANTS = {"eager": "ours", "compiled": "ours compiled"}
COLUMNS = ("predicted_ms", "measured_ms", "step_ratio", "predicted_gb", "measured_gb", "memory_ratio")
RECIPE = ["recipes/train/quickstart.yaml", "cluster.workers=1"]
Values = dict[str, Any]


def workload(row: str, implementation: str, tiny: bool) -> "Workload":
    """Return the workload of a row, traced on the meta device."""
    # Imported where they are used: the calibration's line of a machine without them names what is missing.
    from cluster.capacity.workload import build_workload
    from cluster.recipe.config import build_recipe

    config, classes = configure(ROWS[row], tiny, CHANGES[implementation])
    compile = implementation == "ours compiled"
    recipe = build_recipe(
        {
            "name": "row",
            "data": {"url": "unused"},
            "model": config.model_dump(mode="json"),
            "task": {"kind": "classification"},
            "optim": {"kind": "adamw", "lr": 1e-3},
            "train": {"steps": 1, "global_batch": 1, "precision": "bf16", "compile": compile},
            "deepspeed": {"zero_stage": 0},
        }
    )
    return build_workload(recipe, samples=1, sample_bytes=1.0, classes=classes)


def predict(work: "Workload", device: "Device", batch: int) -> Values:
    """Return the plan's step in milliseconds, its memory in GB without the libraries', and the parts of both."""
    from cluster.capacity.estimate import Machines, memory, pass_seconds, step_time

    place = Machines(device, "device", devices=1, nodes=1, data_cpus=1.0)
    step, used = step_time(work, place, batch, 1, None), memory(work, place, batch, 0, None)
    seconds = {
        "predicted": step.compute + step.optimizer,
        **pass_seconds(work, device, batch),
        "optimizer": step.optimizer,
    }
    sizes = {
        "predicted": used.total - used.context,
        "states": used.weights + used.gradients + used.optimizer,
        "activations": used.activations,
    }
    return {f"{k}_ms": v * 1e3 for k, v in seconds.items()} | {f"{k}_gb": v / 1e9 for k, v in sizes.items()}


def measured_steps(lines: Iterable[Values]) -> Iterator[Values]:
    """Yield row, implementation, batch, ms, memory_gb and parameters of the lines that are steps of a row's model."""
    for line in lines:
        if line.get("error"):
            continue
        if line.get("table") == "step" and line.get("variant") in VARIANTS and line.get("step_ms"):
            # Its memory is above weights, gradients and moments, which are there before the step.
            yield {
                "row": "image perceiver",
                "implementation": VARIANTS[line["variant"]],
                "batch": line["batch"],
                "ms": line["step_ms"],
                "memory_above_gb": line.get("memory_gb"),
            }
        elif line.get("row") in PLANNED and line.get("implementation") in CHANGES and line.get("pass") == "step":
            yield line


def compare(lines: Iterable[Values], device: "Device", tiny: bool = False) -> Iterator[Values]:
    """Yield prediction and measurement of each measured step."""
    works: dict[tuple[str, str], Workload] = {}
    for line in measured_steps(lines):
        row, implementation, batch = (line[key] for key in ("row", "implementation", "batch"))
        work = works.get((row, implementation))
        if work is None:
            work = works[row, implementation] = workload(row, implementation, tiny)
        if line.get("parameters", work.account.parameters) != work.account.parameters:
            print(f"{row}: {line['parameters']:,} parameters, not {ROWS[row].preset}'s", file=sys.stderr)
            continue
        found = predict(work, device, batch)
        gigabytes = line.get("memory_gb")
        if line.get("memory_above_gb"):
            gigabytes = line["memory_above_gb"] + found["states_gb"]
        found |= {"measured_ms": line["ms"], "step_ratio": found["predicted_ms"] / line["ms"]}
        found |= {"measured_gb": gigabytes, "memory_ratio": found["predicted_gb"] / gigabytes if gigabytes else None}
        named = {"table": "plan", "row": row, "implementation": implementation, "batch": batch}
        yield {**named, **{key: found[key] for key in COLUMNS}, **found}


def show(comparisons: Iterable[Values], as_json: bool) -> None:
    """Print comparisons as a table, or as JSON lines."""
    if not as_json:
        print("| row | implementation | batch | " + " | ".join(c.replace("_", " ") for c in COLUMNS) + " |")
        print("|---" * (3 + len(COLUMNS)) + "|")
    for found in comparisons:
        if as_json:
            print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}), flush=True)
            continue
        cells = ["" if found[c] is None else f"{found[c]:.{2 if 'ratio' in c else 1}f}" for c in COLUMNS]
        print(f"| {found['row']} | {found['implementation']} | {found['batch']} | {' | '.join(cells)} |", flush=True)


def device_name() -> str:
    """Return the name in the hardware table of this machine's device.

    Raises:
        UserError: the table has no such device.
    """
    from cluster.runtime.hardware import load_hardware

    if not torch.cuda.is_available():
        return "cpu"
    here = torch.cuda.get_device_name()
    found = [name for name, device in load_hardware(None).devices.items() if device.match.lower() in here.lower()]
    if not found:
        raise UserError(f"the hardware table has no {here}")
    return found[0]


def plan(gpu: str, recipe: list[str], *options: str) -> Values:
    """Return what `perceiver plan --json` prints.

    Raises:
        UserError: it failed.
    """
    words = [sys.executable, "-m", "perceiver", "plan", *recipe, "--gpu", gpu, "--gpus", "1", "--json", *options]
    done = subprocess.run(words, cwd=HERE.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def calibration(recipe: list[str]) -> Values:
    """Return the plan of a recipe on this machine before and after its calibration, or an error."""
    result: Values = {"table": "calibration", "row": Path(recipe[0]).stem, "error": None}
    began = time.monotonic()
    try:
        missing = [name for name in ("ray", "deepspeed") if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"perceiver plan --calibrate needs {' and '.join(missing)}")
        gpu = device_name()
        plans = {"before": plan(gpu, recipe), "after": plan(gpu, recipe, "--calibrate")}
        for name, found in plans.items():
            result[f"{name}_ms"] = 1e3 * found["step_seconds"]["total"]
            result[f"{name}_gb"] = found["memory"]["total"] / 1e9
            result[f"{name}_calibrated"] = found["calibrated"]
    except UserError as error:
        result["error"] = str(error)[:200]
    return {**result, "seconds": round(time.monotonic() - began, 1)}


def measure_tiny() -> list[Values]:
    """Measure the points' row at a tiny size."""
    batch, _, found = shrinking(ROWS["points"], "ours", Setting(prepare(100.0), None, 1.0, True))
    return [{"row": "points", "implementation": "ours", "batch": batch, **values} for values in found]


def main(words: list[str] | None = None) -> int:
    """Run the command line described at the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=Path, metavar="FILE", help="measurements, JSON objects per line")
    parser.add_argument("--gpu", default="h200", help="device of the hardware table that they are of; default: h200")
    parser.add_argument("--json", action="store_true", help="print JSON objects per line")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes")
    parser.add_argument("recipe", nargs="*", help="recipe to calibrate with, and KEY=VALUE")
    given = parser.parse_args(words)
    if not given.lines and not given.tiny:
        print(json.dumps(calibration(given.recipe or RECIPE)), flush=True)
        return 0
    from cluster.runtime.hardware import load_hardware

    if given.lines:
        lines = [json.loads(text) for text in given.lines.read_text().splitlines() if text.startswith("{")]
        show(compare(lines, load_hardware(None).device(given.gpu), given.tiny), given.json)
    else:
        show(compare(measure_tiny(), load_hardware(None).device("cpu"), tiny=True), as_json=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
