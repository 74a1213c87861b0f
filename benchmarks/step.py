"""Time and memory of a forward pass and of a training step, ours and the public implementations in one run.

    pip install --no-deps --target peers perceiver-pytorch==0.11.0
    pip install --no-deps --ignore-requires-python --target peers perceiver-io==0.11.0     # the extra `bench`
    python benchmarks/step.py --peers peers                                   # all rows, as a table
    python benchmarks/step.py --peers peers --row small --json                # one line a measurement

perceiver-io's package is called `perceiver` as ours is, and one process's memory would hide another's: each
implementation runs in a separate process. All of a row's processes are built first and then take turns, one pass each,
so that a disturbance of the machine hits all alike. A step is forward, backward and AdamW. `seconds` is the median;
`cpu_seconds` the median of the process's CPU time, which other work on the machine disturbs less; `memory_mb` the peak
above the built model. The first pass of each kind warms up, and counts only where it is the only one: perceiver-pytorch
at the size of ImageNet. `gflops` counts matrix products of one forward pass, multiply and add apart, as executed (ours
on the meta device). `matmul` is the rate of torch's linear layer at the latents' own sizes, `matmul-onednn` that of the
product that ours takes where it is faster. Every peer is at its nearest equal configuration:

- perceiver-io: the same depths and widths, weights shared as in ours, decoded by one query instead of a mean.
- perceiver-pytorch: the same depths and widths, weights tied; its MLP is a GEGLU of four times the width.
- transformers: Perceiver IO, one cross-attend; to be compared with `ours-io`.
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
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

CLASSES = 1000
MODELS = ("ours", "ours-io", "perceiver-io", "perceiver-pytorch", "transformers")
RATES = ("matmul", "matmul-onednn")
PASSES = ("forward", "step")
PEERS = ("perceiver-io", "perceiver-pytorch")


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
        """Data channels, without positions."""
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
REPEATS = {"small": 7, "imagenet": 1, "points": 2, "audio": 3}
ONCE = {("imagenet", "perceiver-pytorch")}


def ours(row: Row, kind: str) -> tuple[Any, Any]:
    """Return our model and raw inputs."""
    import torch

    from perceiver.factory import build_model, model_config

    depth = {"cross_attends": row.crosses} if kind == "perceiver" else {"blocks": row.crosses}
    values = {
        "kind": kind,
        "inputs": row.inputs,
        "latents": row.n,
        "latent_channels": row.d,
        "heads": 8,
        **depth,
        "self_attends_per_block": row.selves,
    }
    model: Any = build_model(model_config(values), classes=CLASSES)
    raw = next(iter(model.example(row.batch, "cpu").values()))
    if raw.is_floating_point():
        return model, torch.rand_like(raw) * 2 - 1
    return model, torch.randint(0, 127, raw.shape).to(raw.dtype)


def perceiver_io(row: Row) -> tuple[Any, Any]:
    """Return krasserm's perceiver-io: encoder, and a decoder with one query."""
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
        Adapter(),
        num_latents=row.n,
        num_latent_channels=row.d,
        num_cross_attention_heads=1,
        num_cross_attention_qk_channels=row.channels,
        num_cross_attention_layers=row.crosses,
        num_self_attention_heads=8,
        num_self_attention_layers_per_block=row.selves,
        num_self_attention_blocks=row.crosses,
    )
    decoder = core.PerceiverDecoder(
        core.ClassificationOutputAdapter(CLASSES, row.d),
        core.TrainableQueryProvider(1, row.d),
        num_latent_channels=row.d,
        num_cross_attention_heads=1,
    )
    return nn.Sequential(encoder, decoder), dense_inputs(row)


def perceiver_pytorch(row: Row) -> tuple[Any, Any]:
    """Return lucidrains' perceiver-pytorch."""
    library: Any = importlib.import_module("perceiver_pytorch")
    image = row.inputs["kind"] == "image"
    model = library.Perceiver(
        num_freq_bands=64,
        max_freq=float(row.shape[0]),
        depth=row.crosses,
        input_axis=2 if image else 1,
        input_channels=3 if image else row.channels,
        fourier_encode_data=image,
        num_latents=row.n,
        latent_dim=row.d,
        cross_heads=1,
        cross_dim_head=row.channels,
        latent_heads=8,
        latent_dim_head=row.d // 8,
        num_classes=CLASSES,
        weight_tie_layers=True,
        self_per_cross_attn=row.selves,
    )
    return model, dense_inputs(row)


def transformers_perceiver(row: Row) -> tuple[Any, Any]:
    """Return the transformers library's Perceiver with a classification decoder."""
    from torch import nn

    module: Any = importlib.import_module("transformers.models.perceiver.modeling_perceiver")
    library: Any = importlib.import_module("transformers")
    image = row.inputs["kind"] == "image"
    config = library.PerceiverConfig(
        num_latents=row.n,
        d_latents=row.d,
        d_model=row.channels,
        num_blocks=row.crosses,
        num_self_attends_per_block=row.selves,
        num_self_attention_heads=8,
        num_cross_attention_heads=1,
        num_labels=CLASSES,
        attention_probs_dropout_prob=0.0,
    )
    positions = {"concat_pos": True, "max_resolution": row.shape, "num_bands": 64, "sine_only": False}
    before = None
    if image:
        before = module.PerceiverImagePreprocessor(
            config, prep_type="pixels", spatial_downsample=1, fourier_position_encoding_kwargs=positions
        )
    decoder = module.PerceiverClassificationDecoder(
        config,
        num_channels=row.d,
        trainable_position_encoding_kwargs={"num_channels": row.d, "index_dims": 1},
        use_query_residual=True,
    )
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
    """Return pixels (B, H, W, 3), or elements (B, M, C) with their features."""
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


def timed(run: Callable[[], Any]) -> dict[str, float]:
    """Return the wall and CPU seconds of a run."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def peak_of(run: Callable[[], Any], base: float) -> dict[str, float]:
    """Return the seconds of a run and its peak of resident memory above `base`, in MB."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    return {**timed(run), "memory_mb": round(resident_mb("VmHWM") - base)}


def passes(model: Any, x: Any, batch: int) -> dict[str, Callable[[], None]]:
    """Return what a forward pass and a training step of a model do."""
    import torch

    model.train()
    target = torch.zeros(batch, dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters())

    def forward() -> None:
        with torch.no_grad():
            model(x)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()

    return {"forward": forward, "step": step}


def count_flops(implementation: str, row: Row) -> float:
    """Return the GFLOP of a forward pass; fused attention counts by its unfused form, of equal products."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # transformers reads values of its tensors, which the meta device does not have; our compiled kernels need it.
    with torch.device("meta" if implementation in ("ours", "ours-io") else "cpu"):
        model, x = BUILDERS[implementation](row)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.requires_grad_(False)(x)
    return counter.get_total_flops() / 1e9


def products(implementation: str, row: Row) -> tuple[Callable[[], None], float]:
    """Return a run of the product that most of the latents' work consists of, (B N) x D by D x D, and its GFLOP."""
    import torch

    multiply = torch.nn.functional.linear
    if implementation == "matmul-onednn":
        from perceiver.kernels import dense

        if not dense.faster():
            raise RuntimeError("not used on this machine")
        multiply = dense.product
    a, w = torch.randn(row.batch * row.n, row.d), torch.randn(row.d, row.d)
    count = max(1, int(2e10 / (2 * a.shape[0] * row.d**2)))

    def run() -> None:
        for _ in range(count):
            multiply(a, w)

    return run, 2 * a.shape[0] * row.d**2 * count / 1e9


def serve(row_name: str, implementation: str, threads: int) -> None:
    """Build one implementation in this process, print its facts, then run the passes that standard input names."""
    import torch

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # prints of libraries are not part of the answer
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    row = ROWS[row_name]
    facts: dict[str, Any] = {"parameters": 0}
    if implementation in RATES:
        run, facts["gflops"] = products(implementation, row)
        runs = {"forward": run}
    else:
        model, x = BUILDERS[implementation](row)
        facts["parameters"] = sum(p.numel() for p in model.parameters())
        runs = passes(model, x, row.batch)
    gc.collect()
    base = resident_mb("VmRSS")
    facts["first"] = {name: peak_of(run, base) for name, run in runs.items()}
    if "gflops" not in facts:
        facts["gflops"] = count_flops(implementation, row)
    facts["gflops"] = round(facts["gflops"], 2)
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(timed(runs[line.strip()])), file=answers, flush=True)


class Child:
    """The process of one implementation, and its measurements; a peer that fails is reported, not hidden."""

    def __init__(self, row: str, implementation: str, arguments: argparse.Namespace) -> None:
        self.row, self.implementation = row, implementation
        self.repeats = 0 if (row, implementation) in ONCE else arguments.repeats or REPEATS[row]
        self.error, self.process, self.facts = "", None, {}
        self.samples: dict[str, list[dict[str, float]]] = {}
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
        if implementation in PEERS:
            if arguments.peers is None:
                self.error = "give --peers FOLDER with it installed"
                return
            environment["PYTHONPATH"] = str(Path(arguments.peers).resolve())
        command = [sys.executable, __file__, "--one", row, implementation, "--threads", str(arguments.threads)]
        self.log: Any = tempfile.TemporaryFile("w+")  # noqa: SIM115
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=self.log, text=True)
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = cast(Any, self.process).stdout.readline()
        if line:
            return json.loads(line)
        self.log.seek(0)
        self.error = (self.log.read().strip().splitlines() or ["no output"])[-1]
        return {}

    def take_turn(self, turn: int) -> None:
        """Run each pass once, unless this implementation has had its turns or failed."""
        for name in self.facts.get("first", {}):
            if not self.error and turn < self.repeats:
                cast(Any, self.process).stdin.write(name + "\n")
                cast(Any, self.process).stdin.flush()
                self.samples.setdefault(name, []).append(self._answer())

    def results(self) -> list[dict[str, Any]]:
        """End the process and return a measurement for each pass."""
        if self.process is not None:
            self.process.communicate()
        named = {"row": self.row, "implementation": self.implementation}
        if self.error:
            return [{**named, "error": self.error}]
        results = []
        for name, first in self.facts["first"].items():
            samples = self.samples.get(name) or [first]
            medians = {k: round(statistics.median(s[k] for s in samples), 4) for k in ("seconds", "cpu_seconds")}
            memory = 0 if self.implementation in RATES else first["memory_mb"]
            results.append(
                {
                    **named,
                    "pass": name,
                    **medians,
                    "memory_mb": memory,
                    "gflops": self.facts["gflops"],
                    "parameters": self.facts["parameters"],
                }
            )
        return results


def main() -> None:
    """Run the command line described at the top."""
    implementations = (*MODELS, *RATES)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS, action="append", help="row to run; all by default")
    parser.add_argument("--implementation", choices=implementations, action="append", help="all by default")
    parser.add_argument("--peers", help="folder that the peers were installed into (pip --target)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, help="timed runs; by row by default")
    parser.add_argument("--json", action="store_true", help="print one line a measurement")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        serve(arguments.one[0], arguments.one[1], arguments.threads)
        return
    if not arguments.json:
        print("| row | implementation | pass | seconds | CPU seconds | memory MB | GFLOP forward | parameters |")
        print("|---|---|---|---|---|---|---|---|")
    for row in arguments.row or ROWS:
        children = [Child(row, name, arguments) for name in arguments.implementation or implementations]
        for turn in range(max(child.repeats for child in children)):
            for child in children:
                child.take_turn(turn)
        for result in (r for child in children for r in child.results()):
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
