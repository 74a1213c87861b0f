"""Time and memory of a forward pass and of a training step on a GPU, ours and the public implementations.

    python benchmarks/step_gpu.py --peers peers                          # all rows, as a table; peers as in step.py
    python benchmarks/step_gpu.py --peers peers --row imagenet --batch imagenet=16

The models and rows are those of `benchmarks/step.py`, at batches that occupy a GPU, under bf16 autocast.
Each implementation runs in a separate process, one after the other. `ms` is the median over CUDA events, `memory GB`
the peak allocation above the built model, in a step with gradients and AdamW's state. TFLOP/s is the GFLOP of
`step.py` (a step: three times them) over the time. Besides ours:

- ours torch: without the Triton kernel (PERCEIVER_KERNELS=0).
- ours plain: `attention: plain`, torch's own attention over projected keys and values.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from step import BUILDERS, CLASSES, PEERS, ROWS, Row, count_flops

BATCHES = {"small": 256, "imagenet": 32, "points": 256, "audio": 256}
VARIANTS = {"ours torch": "ours", "ours plain": "ours"}
MODELS = ("ours", "ours torch", "ours plain", "ours-io", "transformers", "perceiver-io", "perceiver-pytorch")


def plain(row: Row) -> tuple[Any, Any]:
    """Return our model with torch's own attention, and its inputs."""
    from perceiver.attention import CrossAttention

    model, x = BUILDERS["ours"](row)
    for module in model.modules():
        if isinstance(module, CrossAttention):
            module.kind = "plain"
    return model, x


def median_ms(run: Any, repeats: int) -> float:
    """Return the median time of a run on the device, after two to warm up."""
    import torch

    times = []
    for turn in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if turn > 1:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(row_name: str, name: str, batch: int, repeats: int) -> dict[str, Any]:
    """Build one implementation on the GPU and run its passes."""
    import torch

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as the engine does for bf16
    row = ROWS[row_name]
    row.batch = 1
    gflops = count_flops(VARIANTS.get(name, name), row) * batch if name in ("ours", "ours-io") else 0.0
    row.batch = batch
    model, x = plain(row) if name == "ours plain" else BUILDERS[VARIANTS.get(name, name)](row)
    model, x = model.cuda().train(), x.cuda()
    target = torch.randint(CLASSES, (batch,), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def forward() -> None:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            model(x)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()

    result: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    base = torch.cuda.memory_allocated()
    for kind, run in {"forward": forward, "step": step}.items():
        torch.cuda.reset_peak_memory_stats()
        ms = median_ms(run, repeats)
        gigabytes = (torch.cuda.max_memory_allocated() - base) / 1e9
        rate = gflops * (3 if kind == "step" else 1) / ms if gflops else None
        result[kind] = {"ms": ms, "memory_gb": gigabytes, "tflops": rate}
    return result


def child(row: str, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure in a separate process; a peer that fails is reported, not hidden."""
    environment = dict(os.environ)
    if name in PEERS:
        if arguments.peers is None:
            return {"error": "give --peers FOLDER with it installed"}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(Path(arguments.peers).resolve()), os.environ.get("PYTHONPATH", "")]
        )
    if name == "ours torch":
        environment["PERCEIVER_KERNELS"] = "0"
    batch = dict(pair.split("=") for pair in arguments.batch).get(row, BATCHES[row])
    command = [sys.executable, __file__, "--one", row, name, str(batch), "--repeats", str(arguments.repeats)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    return {"batch": int(batch), **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    """Run the command line described at the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS, action="append", help="row to run; all by default")
    parser.add_argument("--implementation", choices=MODELS, action="append", help="all by default")
    parser.add_argument("--peers", help="folder that the peers were installed into (pip --target)")
    parser.add_argument("--batch", action="append", default=[], help="ROW=SIZE")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        row, name, batch = arguments.one
        print(json.dumps(measure(row, name, int(batch), arguments.repeats)))
        return
    print("| row | batch | implementation | pass | ms | memory GB | TFLOP/s | parameters |\n" + "|---" * 8 + "|")
    for row in arguments.row or ROWS:
        for name in arguments.implementation or MODELS:
            found = child(row, name, arguments)
            if "error" in found:
                print(f"| {row} | | {name} | {found['error']} | | | | |", flush=True)
                continue
            for kind in ("forward", "step"):
                f = found[kind]
                rate = f"{f['tflops']:.0f}" if f["tflops"] else ""
                cells = (row, found["batch"], name, kind, f"{f['ms']:.1f}", f"{f['memory_gb']:.2f}", rate)
                print("| " + " | ".join(map(str, cells)) + f" | {found['parameters']:,} |", flush=True)


if __name__ == "__main__":
    main()
