"""Time and memory of a forward pass and of a training step, ours beside the public implementations, in one run.

    pip install --no-deps --target peers perceiver-pytorch==0.11.0
    pip install --no-deps --ignore-requires-python --target peers perceiver-io==0.11.0     # the extra `bench`
    python benchmarks/step.py --peers peers                                   # all rows, as a table
    python benchmarks/step.py --peers peers --row small --json                # one line a measurement

perceiver-io's package is called `perceiver` as ours is, and one process's memory would hide another's: each measurement
is a process of its own. A step is forward, backward and AdamW. `seconds` is the median; `cpu_seconds` the median of
the process's CPU time, which other work on the machine disturbs less; `memory_mb` the peak above the built model.
`gflops` counts matrix products of one forward pass, multiply and add apart, as executed (the compiled kernel's work is
not among them). The implementation `matmul` is the machine's rate at the latents' own sizes: what remains after the
short cuts can at best run at it. Every peer is at its nearest equal configuration:

- perceiver-io: the same depths and widths, weights shared as in ours, decoded by one query instead of a mean.
- perceiver-pytorch: the same depths and widths, weights tied; its MLP is a GEGLU of four times the width.
- transformers: Perceiver IO, one cross-attend; to be held against `ours-io`.
Points and audio are given to the peers with their Fourier features made beforehand; ours makes them in the step.
"""

import argparse
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLASSES = 1000
IMPLEMENTATIONS = ("ours", "ours-io", "perceiver-io", "perceiver-pytorch", "transformers", "matmul")


class Row:
    """One setting: batch, inputs (`shape` of the grid or None for points, data channels, bands), latents and depth."""

    def __init__(self, batch: int, inputs: dict[str, Any], n: int, d: int, crosses: int, selves: int) -> None:
        self.batch, self.inputs, self.n, self.d, self.crosses, self.selves = batch, inputs, n, d, crosses, selves

    @property
    def shape(self) -> tuple[int, ...]:
        """Grid of the inputs; (M,) for points."""
        i = self.inputs
        return {"image": i.get("size"), "points": (i.get("points"),), "audio": (3840,)}[i["kind"]]

    @property
    def data(self) -> int:
        """Data channels beside the positions."""
        return {"image": 3, "points": 0, "audio": 16}[self.inputs["kind"]]

    @property
    def channels(self) -> int:
        """Channels of an input, positions included (64 bands)."""
        axes = 3 if self.inputs["kind"] == "points" else len(self.shape)
        return self.data + axes * 129


ROWS = {
    "small": Row(8, {"kind": "image", "size": (64, 64)}, 128, 256, 2, 4),
    "imagenet": Row(1, {"kind": "image", "size": (224, 224)}, 512, 1024, 8, 6),
    "points": Row(16, {"kind": "points", "points": 2048}, 256, 512, 2, 6),
    "audio": Row(8, {"kind": "audio", "samples": 61_440, "patch": 16}, 256, 512, 2, 4),
}
REPEATS = {"small": 7, "imagenet": 3, "points": 3, "audio": 5}


def ours(row: Row, kind: str) -> tuple[Any, Any]:
    """Our model and raw inputs."""
    import torch

    from perceiver.factory import build_model, model_config

    depth = {"cross_attends": row.crosses} if kind == "perceiver" else {"blocks": row.crosses}
    values = {"kind": kind, "inputs": row.inputs, "latents": row.n, "latent_channels": row.d, "heads": 8, **depth,
              "self_attends_per_block": row.selves}  # fmt: skip
    model: Any = build_model(model_config(values), classes=CLASSES)
    raw = next(iter(model.example(row.batch, "cpu").values()))
    if raw.is_floating_point():
        return model, torch.rand_like(raw) * 2 - 1
    return model, torch.randint(0, 127, raw.shape).to(raw.dtype)


def perceiver_io(row: Row) -> tuple[Any, Any]:
    """krasserm's perceiver-io: encoder, and a decoder with one query."""
    import torch
    from torch import nn

    # Only its activation checkpointing needs fairscale, which is not used here.
    stub = types.ModuleType("fairscale.nn")
    stub.checkpoint_wrapper = None  # type: ignore[attr-defined]
    sys.modules["fairscale"], sys.modules["fairscale.nn"] = types.ModuleType("fairscale"), stub
    core: Any = importlib.import_module("perceiver.model.core")
    image = row.inputs["kind"] == "image"

    class Adapter(core.InputAdapter):
        def __init__(self) -> None:
            super().__init__(num_input_channels=row.channels)
            if image:
                self.position = core.FourierPositionEncoding(input_shape=row.shape, num_frequency_bands=64)

        def forward(self, x: Any) -> Any:
            return torch.cat([x.flatten(1, -2), self.position(len(x))], dim=-1) if image else x

    encoder = core.PerceiverEncoder(
        Adapter(), num_latents=row.n, num_latent_channels=row.d, num_cross_attention_heads=1,
        num_cross_attention_qk_channels=row.channels, num_cross_attention_layers=row.crosses,
        num_self_attention_heads=8, num_self_attention_layers_per_block=row.selves,
        num_self_attention_blocks=row.crosses,
    )  # fmt: skip
    decoder = core.PerceiverDecoder(
        core.ClassificationOutputAdapter(CLASSES, row.d), core.TrainableQueryProvider(1, row.d),
        num_latent_channels=row.d, num_cross_attention_heads=1,
    )  # fmt: skip
    return nn.Sequential(encoder, decoder), dense_inputs(row)


def perceiver_pytorch(row: Row) -> tuple[Any, Any]:
    """lucidrains' perceiver-pytorch."""
    library: Any = importlib.import_module("perceiver_pytorch")
    image = row.inputs["kind"] == "image"
    model = library.Perceiver(
        num_freq_bands=64, max_freq=float(row.shape[0]), depth=row.crosses, input_axis=2 if image else 1,
        input_channels=3 if image else row.channels, fourier_encode_data=image, num_latents=row.n, latent_dim=row.d,
        cross_heads=1, cross_dim_head=row.channels, latent_heads=8, latent_dim_head=row.d // 8, num_classes=CLASSES,
        weight_tie_layers=True, self_per_cross_attn=row.selves,
    )  # fmt: skip
    return model, dense_inputs(row)


def transformers_perceiver(row: Row) -> tuple[Any, Any]:
    """The transformers library's Perceiver with a classification decoder."""
    from torch import nn

    module: Any = importlib.import_module("transformers.models.perceiver.modeling_perceiver")
    library: Any = importlib.import_module("transformers")
    image = row.inputs["kind"] == "image"
    config = library.PerceiverConfig(
        num_latents=row.n, d_latents=row.d, d_model=row.channels, num_blocks=row.crosses,
        num_self_attends_per_block=row.selves, num_self_attention_heads=8, num_cross_attention_heads=1,
        num_labels=CLASSES, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    positions = {"concat_pos": True, "max_resolution": row.shape, "num_bands": 64, "sine_only": False}
    before = None
    if image:
        before = module.PerceiverImagePreprocessor(
            config, prep_type="pixels", spatial_downsample=1, fourier_position_encoding_kwargs=positions
        )
    decoder = module.PerceiverClassificationDecoder(
        config, num_channels=row.d, trainable_position_encoding_kwargs={"num_channels": row.d, "index_dims": 1},
        use_query_residual=True,
    )  # fmt: skip
    inner = module.PerceiverModel(config, input_preprocessor=before, decoder=decoder)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Any) -> Any:
            return self.inner(x).logits

    x = dense_inputs(row)
    return Logits(), x.permute(0, 3, 1, 2).contiguous() if image else x


def dense_inputs(row: Row) -> Any:
    """Pixels (B, H, W, 3), or elements (B, M, C) with their features."""
    import torch

    last = 3 if row.inputs["kind"] == "image" else row.channels
    return torch.rand(row.batch, *row.shape, last) * 2 - 1


BUILDERS: dict[str, Callable[[Row], tuple[Any, Any]]] = {
    "ours": lambda row: ours(row, "perceiver"),
    "ours-io": lambda row: ours(row, "perceiver_io"),
    "perceiver-io": perceiver_io,
    "perceiver-pytorch": perceiver_pytorch,
    "transformers": transformers_perceiver,
}


def resident_mb(field: str) -> float:
    """Return VmRSS or VmHWM of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def timed(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Return the medians of wall and CPU seconds."""
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return statistics.median(walls), statistics.median(cpus)


def measure(row_name: str, implementation: str, threads: int, repeats: int) -> list[dict[str, Any]]:
    """Measure one implementation at one row in this process."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    row = ROWS[row_name]
    if implementation == "matmul":
        return [{"row": row_name, **matmul_rate(row)}]
    model, x = BUILDERS[implementation](row)
    model.train()
    target = torch.zeros(row.batch, dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters())

    def forward() -> None:
        with torch.no_grad():
            model(x)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()

    results = []
    gc.collect()
    base = resident_mb("VmRSS")
    flops = 0
    for name, run in (("forward", forward), ("step", step)):
        Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
        run()
        peak = resident_mb("VmHWM") - base
        wall, cpu = timed(run, repeats)
        if not flops:
            # Fused attention is not counted by torch: its unfused form is, with the same products.
            unfused = sdpa_kernel(SDPBackend.MATH)
            with torch.no_grad(), unfused, FlopCounterMode(display=False) as counter:
                for parameter in model.parameters():
                    parameter.requires_grad_(False)
                model(x)
                for parameter in model.parameters():
                    parameter.requires_grad_(True)
            flops = counter.get_total_flops()
        results.append({"row": row_name, "implementation": implementation, "pass": name, "seconds": round(wall, 4),
                        "cpu_seconds": round(cpu, 4), "memory_mb": round(peak), "gflops": round(flops / 1e9, 2),
                        "parameters": sum(p.numel() for p in model.parameters())})  # fmt: skip
    return results


def matmul_rate(row: Row) -> dict[str, Any]:
    """Time the product that most of the latents' work consists of: (B N) x D by D x D."""
    import torch

    a, w = torch.randn(row.batch * row.n, row.d), torch.randn(row.d, row.d)
    count = max(1, int(2e10 / (2 * a.shape[0] * row.d**2)))

    def run() -> None:
        for _ in range(count):
            torch.nn.functional.linear(a, w)

    run()
    wall, cpu = timed(run, 5)
    gflops = 2 * a.shape[0] * row.d**2 * count / 1e9
    return {"implementation": "matmul", "pass": "forward", "seconds": round(wall, 4), "cpu_seconds": round(cpu, 4),
            "memory_mb": 0, "gflops": round(gflops, 2), "parameters": 0}  # fmt: skip


def child(row: str, implementation: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure in a new process; a peer that fails is reported, not hidden."""
    peer = implementation in ("perceiver-io", "perceiver-pytorch")
    if peer and arguments.peers is None:
        return [{"row": row, "implementation": implementation, "error": "give --peers FOLDER with it installed"}]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    if peer:
        environment["PYTHONPATH"] = str(Path(arguments.peers).resolve())
    command = [sys.executable, __file__, "--one", row, implementation, "--threads", str(arguments.threads)]
    command += ["--repeats", str(arguments.repeats or REPEATS[row])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return [{"row": row, "implementation": implementation, "error": last}]
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Run the command line described at the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS, action="append", help="row to run; all by default")
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, action="append", help="all by default")
    parser.add_argument("--peers", help="folder that the peers were installed into (pip --target)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, help="timed runs; by row by default")
    parser.add_argument("--json", action="store_true", help="print one line a measurement")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], arguments.one[1], arguments.threads, arguments.repeats)))
        return
    if not arguments.json:
        print("| row | implementation | pass | seconds | CPU seconds | memory MB | GFLOP forward | parameters |")
        print("|---|---|---|---|---|---|---|---|")
    for row in arguments.row or ROWS:
        for implementation in arguments.implementation or IMPLEMENTATIONS:
            for result in child(row, implementation, arguments):
                print(json.dumps(result) if arguments.json else as_line(result), flush=True)


def as_line(r: dict[str, Any]) -> str:
    """Format a measurement as a row of the table."""
    if "error" in r:
        return f"| {r['row']} | {r['implementation']} | {r['error']} | | | | | |"
    return (
        f"| {r['row']} | {r['implementation']} | {r['pass']} | {r['seconds']:.3f} | {r['cpu_seconds']:.3f} | "
        f"{r['memory_mb']} | {r['gflops']} | {r['parameters']:,} |"
    )


if __name__ == "__main__":
    main()
