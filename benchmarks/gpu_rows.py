"""Time and memory of the papers' models at their own sizes on one GPU, ours and the strongest simple rivals.

    python benchmarks/gpu_rows.py                             # counts FLOPs, then measures; one JSON object per line
    python benchmarks/gpu_rows.py --count > counts.json       # counts only, on any machine
    python benchmarks/gpu_rows.py --counts counts.json        # measures only
    python benchmarks/gpu_rows.py --tiny                      # every row at a tiny size, in float32 on a CPU

Each row is a preset. A step is forward, backward and fused AdamW under bf16 autocast, on random inputs that are on the
device. `ms` is the median over CUDA events, at least three after two to warm up; `memory_gb` the peak allocation with
weights, gradients and the optimizer's state. A batch that needs more than --memory-gb is halved, which `note` states.

- ours; ours plain: `attention: plain`, torch's own attention over projected keys and values. Both eager.
- ours compiled: with `train.compile`, which compiles the layers of a training step, not of a forward pass alone.
- ours plain compiled: the plain model, each cross-attend and self-attend compiled by `torch.compile`, in both passes
  (compiling the whole model of 12 to 26 layers takes minutes). Compiling is a part of the warm-up.
  Steps of both compiled ones are replayed as CUDA graphs (`cuda_graphs.py`), so that the host's speed counts less.
- transformers: that library's model of the same function and shapes, where it has one. Its flow model gets 3 x 3
  neighbourhoods made beforehand; ours makes them in the step.

`tflops_executed` counts the matrix products and convolutions that the chosen path executes, forward and backward, and
`share_of_peak` is their share of the dense bf16 peak of the hardware table. `tflops_paper` counts those of the plain
path forward, as the papers do, and three times as many for a step. The products of transformers are counted as those of
the plain path, whose function it computes. Separable attention's float32 kernel is no matrix product and not counted.
"""

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cuda_graphs import GraphedForward  # noqa: E402
from perceiver.accounting import account, count_parameters  # noqa: E402
from perceiver.attention import CrossAttend, SelfAttend  # noqa: E402
from perceiver.config import Config  # noqa: E402
from perceiver.factory import build_model, model_config  # noqa: E402
from perceiver.kernels.compiled import CompiledLayers  # noqa: E402
from perceiver.presets import PRESETS, preset_values  # noqa: E402
from perceiver.step_trace import trace_step  # noqa: E402

TABLE = "models at the papers' sizes"
WARM, LEAST, MOST = 2, 3, 20
TINY_BATCH = 2
COMPILE_S = 40.0
"""Seconds for compiling, in addition to a row's own."""
COMPILED = ("ours compiled", "ours plain compiled")
COLUMNS = ("batch", "pass", "ms", "memory_gb", "tflops_executed", "share_of_peak", "tflops_paper", "parameters")
COLUMNS += ("note", "error")
Values = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A preset, the batch, the loss (class, tags, tokens, flow or autoencoding), rivals, and changes for `--tiny`."""

    preset: str
    batch: int
    loss: str
    tiny: Values
    transformers: bool = False
    compiled: bool = False
    theirs: Values = field(default_factory=dict)
    """Settings that transformers' model fixes otherwise; they change neither shapes nor products."""

    @property
    def plain(self) -> bool:
        """Whether the model has cross-attention, so that its plain path is another one."""
        return PRESETS[self.preset].model["kind"] in ("perceiver", "perceiver_io")

    @property
    def eager(self) -> list[str]:
        """Implementations that are not compiled."""
        return ["ours", *["ours plain"] * self.plain, *["transformers"] * self.transformers]


_TINY: Values = {"latents": 8, "latent_channels": 16, "heads": 2, "self_attends_per_block": 1}
_TINY_IO: Values = {**_TINY, "blocks": 1}
_PIXELS: Values = {"inputs": {"size": (16, 16)}}
_SOUND: Values = {"samples": 1024}
_CLIP: Values = {"frames": 2, "size": (16, 16)}
_WORDS: Values = {"length": 32, "channels": 24}
_TINY_TEXT: Values = {**_TINY, "latent_channels": 32, "heads": 8, "qk_channels": 16, "v_channels": 32}
_TINY_TEXT |= {"cross_qk_channels": 16, "cross_v_channels": 32, "decoder_v_channels": 24, "inputs": _WORDS}
_TINY_FLOW: Values = {"size": (8, 12), "positions": {"max_resolution": (8, 12)}}
_TINY_SIGNALS: Values = {
    "inputs": {"modalities": {"audio": _SOUND, "video": _CLIP}},
    "decoder": {"modalities": {"audio": {"grid": (4,)}, "video": {"grid": (1, 2, 2)}}},
}

# In order of value, see `order`.
ROWS = {
    "points": Row("perceiver_modelnet40", 256, "class", {**_TINY, "inputs": {"points": 32}}, compiled=True),
    "audio raw": Row("perceiver_audioset_raw", 128, "tags", {**_TINY, "inputs": _SOUND}, compiled=True),
    "audio mel": Row("perceiver_audioset_mel", 128, "tags", {**_TINY, "inputs": _SOUND}),
    "audio video": Row(
        "perceiver_audioset_av_raw", 128, "tags", {**_TINY, "inputs": {"modalities": {"audio": _SOUND, "video": _CLIP}}}
    ),
    "flow": Row("perceiver_io_flow", 8, "flow", {**_TINY, "inputs": _TINY_FLOW}, True, theirs={"decoder.scale": 0.01}),
    "language": Row("perceiver_io_mlm_bytes", 128, "tokens", _TINY_TEXT, True, compiled=True),
    "image fourier": Row("perceiver_io_imagenet_fourier", 32, "class", {**_TINY_IO, **_PIXELS}, True),
    "image conv": Row(
        "perceiver_io_imagenet_conv",
        32,
        "class",
        {**_TINY_IO, **_PIXELS},
        True,
        theirs={"inputs.conv_padding": "symmetric"},
    ),
    "image learned": Row(
        "perceiver_io_imagenet_learned", 32, "class", {**_TINY_IO, **_PIXELS}, True, theirs={"query_residual": True}
    ),
    "cnn14": Row("cnn14_audioset", 32, "tags", {"widths": (8, 8), "inputs": {"samples": 8192}}),
    "resnet50": Row("resnet50", 256, "class", {"depths": (1, 1), "widths": (16, 32), "stem": 8, **_PIXELS}),
    "image perceiver": Row("perceiver_imagenet", 32, "class", {**_TINY, **_PIXELS, "cross_attends": 2}),
    "video": Row("perceiver_audioset_video", 128, "tags", {**_TINY, "inputs": _CLIP}),
    "autoencoding": Row("perceiver_io_kinetics", 16, "autoencoding", {**_TINY, **_TINY_SIGNALS}),
    "vit": Row("vit_b16", 256, "class", {"width": 16, "layers": 1, "heads": 2, **_PIXELS}),
    "transformer": Row("transformer_64x64", 32, "class", {"width": 16, "layers": 1, "heads": 2, **_PIXELS}),
}
FIRST = list(ROWS).index("resnet50") + 1
"""Number of rows before the compiled implementations."""


# The models


def configure(row: Row, tiny: bool, changes: Mapping[str, Any] | None = None) -> tuple[Config, int | None]:
    """Return a row's model config, with dotted changes, and its number of classes."""
    values = preset_values(row.preset, row.tiny if tiny else {})
    for path, value in (changes or {}).items():
        *parents, last = path.split(".")
        place = values
        for parent in parents:
            place[parent] = dict(place[parent])
            place = place[parent]
        place[last] = value
    return model_config(values), PRESETS[row.preset].classes


def build(row: Row, implementation: str, batch: int, device: str, tiny: bool) -> tuple[nn.Module, Any]:
    """Return an implementation's model on the device, and its random inputs."""
    changes = row.theirs if implementation == "transformers" else {}
    if implementation.startswith("ours plain"):
        changes = {"attention": "plain"}
    config, classes = configure(row, tiny, changes)
    with torch.device(device):
        model: Any = build_model(config, classes=classes)
        raw = {name: random_like(tensor) for name, tensor in model.example(batch, device).items()}
        if implementation == "transformers":
            model, raw = transformers_model(model), transformers_inputs(raw)
    if implementation == "ours compiled":
        model.compiled = CompiledLayers("eager" if tiny else "inductor")
    if implementation == "ours plain compiled":
        compile_layers(model, tiny)
    return model.to(device).train(), raw if isinstance(raw, Tensor) or len(raw) > 1 else next(iter(raw.values()))


def random_like(tensor: Tensor) -> Tensor:
    """Return random values of a tensor's shape and type; bytes and samples fit every range."""
    if tensor.is_floating_point():
        return torch.rand_like(tensor) * 2 - 1
    return torch.randint(0, 127, tensor.shape, dtype=tensor.dtype, device=tensor.device)


class Logits(nn.Module):
    """Returns the logits of a model of the transformers library."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs to logits."""
        return self.inner(x).logits


def transformers_model(model: nn.Module) -> nn.Module:
    """Return the transformers library's model with the shapes and weights of ours."""
    from perceiver.export.transformers_layout import to_transformers

    return Logits(to_transformers(model))


def transformers_inputs(raw: Mapping[str, Tensor]) -> Tensor:
    """Return what that library's model reads: normalised pixels, ids, or neighbourhoods (B, 2, 27, H, W)."""
    if "text" in raw:
        return raw["text"]
    if "image" in raw:
        return torch.rand(raw["image"].shape) * 2 - 1
    batch, frames, channels, *size = raw["video"].shape
    return torch.rand(batch, frames, 9 * channels, *size) * 2 - 1


def compile_layers(model: nn.Module, tiny: bool) -> None:
    """Compile each cross-attend and self-attend; layers of equal shapes share the code."""
    for module in model.modules():
        if isinstance(module, CrossAttend | SelfAttend):
            module.compile(dynamic=False, backend="eager" if tiny else "inductor")


def objective(row: Row, outputs: Any, raw: Any, targets: dict[str, Tensor]) -> Tensor:
    """Return a loss of the kind that the paper trains with; targets are made at the first call."""
    functional = nn.functional
    if row.loss == "tokens":
        return functional.cross_entropy(outputs.flatten(0, 1), raw.flatten())
    if row.loss == "autoencoding":
        return sum(
            (value.float().abs().mean() for value in outputs.values()), torch.zeros((), device=raw["video"].device)
        )
    if row.loss == "flow":
        return (outputs.float() - 1).abs().mean()
    if "y" not in targets:
        shape, device = outputs.shape, outputs.device
        is_class = row.loss == "class"
        targets["y"] = (
            torch.randint(shape[1], shape[:1], device=device) if is_class else torch.zeros(shape, device=device)
        )
    loss = functional.cross_entropy if row.loss == "class" else functional.binary_cross_entropy_with_logits
    return loss(outputs, targets["y"])


def passes(row: Row, model: nn.Module, raw: Any, device: str, compiled: bool = False) -> dict[str, Callable[[], None]]:
    """Return what a forward pass and a training step do."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    arguments, targets = (raw,), {}
    if row.loss == "autoencoding":
        # Training decodes 512 elements of each signal and the label (Perceiver IO App. I).
        grids = {name: spec.grid for name, spec in model.decoder.specs.items() if hasattr(spec, "grid")}
        sizes = {name: torch.Size(grid).numel() for name, grid in grids.items()}
        rows = len(raw["video"])
        arguments = raw, {n: torch.randint(size, (rows, min(512, size)), device=device) for n, size in sizes.items()}

    def forward() -> None:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            model(*arguments)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            loss = objective(row, model(*arguments), raw, targets)
        loss.backward()
        optimizer.step()

    if compiled and device != "cpu":
        model.forward = GraphedForward(model, model.forward)
    return {"forward": forward, "step": step}


# The counts


def count(name: str, tiny: bool) -> dict[str, dict[str, float]]:
    """Return the FLOPs per sample of a row's chosen and plain path, on the meta device: forward, step, the paper's."""
    row = ROWS[name]
    if row.loss == "autoencoding":
        return {}  # counted would be the decoding of all elements, not of the 1,025 that training asks for
    config, classes = configure(row, tiny)
    found = account(config, classes=classes)
    counts = {"ours": {"forward": found.executed_flops, "step": trace_step(config, classes=classes).flops}}
    if row.plain:
        plain, _ = configure(row, tiny, {"attention": "plain"})
        counts["plain"] = {"forward": found.forward_flops, "step": trace_step(plain, classes=classes).flops}
    for path in counts.values():
        path["paper"] = found.forward_flops
    return counts


def count_all(names: list[str], tiny: bool) -> Values:
    """Return `count` of each row, counted in several processes."""
    if tiny:
        return {name: count(name, tiny) for name in names}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(names), os.cpu_count() or 1), context, torch.set_num_threads, (1,)) as pool:
        return dict(zip(names, pool.map(count, names, [tiny] * len(names)), strict=True))


def peak_tflops(name: str) -> float | None:
    """Return the dense bf16 peak of a GPU in the hardware table, None for other devices."""
    try:
        from cluster.runtime.hardware import load_hardware
    except ImportError:
        return None
    gpus = (device for key, device in load_hardware(None).devices.items() if key != "cpu")
    return next((gpu.bf16_tflops for gpu in gpus if gpu.match.lower() in name.lower()), None)


# The measurement


class TooLongError(Exception):
    """A measurement takes longer than it may."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `TooLongError` in this, the main thread, after so many seconds."""

    def end(*_: Any) -> None:
        raise TooLongError(f"longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def once(run: Callable[[], None], device: str) -> float:
    """Return the milliseconds of a run."""
    if device == "cpu":
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def timed(run: Callable[[], None], device: str, seconds: float) -> float:
    """Return the median milliseconds of a run, after two to warm up, as often as the seconds allow but three times."""
    for _ in range(WARM):
        once(run, device)
    began, times = time.monotonic(), []
    while len(times) < LEAST or (len(times) < MOST and time.monotonic() - began < seconds):
        times.append(once(run, device))
    return statistics.median(times)


def clear(device: str) -> None:
    """Free the memory of the last model, and what was compiled for it."""
    torch.compiler.reset()
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Setting:
    """The device, its peak in TFLOP/s if known, seconds per row, and whether sizes are tiny."""

    device: str
    peak: float | None
    seconds: float
    tiny: bool


def measure(row: Row, implementation: str, batch: int, setting: Setting) -> list[Values]:
    """Build an implementation and measure a forward pass and a step; return a dictionary for each."""
    device = setting.device
    seconds = 0.0 if setting.tiny else setting.seconds / 4 / (len(row.eager) + len(COMPILED) * row.compiled)
    torch.manual_seed(0)
    model, raw = build(row, implementation, batch, device, setting.tiny)
    found = []
    for name, run in passes(row, model, raw, device, implementation in COMPILED).items():
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        ms = timed(run, device, seconds)
        memory = None if device == "cpu" else torch.cuda.max_memory_allocated() / 1e9
        found.append({"pass": name, "ms": ms, "memory_gb": memory, "parameters": count_parameters(model)})
    return found


def shrinking(row: Row, implementation: str, setting: Setting) -> tuple[int, str | None, list[Values]]:
    """Measure at the row's batch, halved as long as memory runs out; return batch, note and measurements."""
    batch = first = TINY_BATCH if setting.tiny else row.batch
    while True:
        try:
            found = measure(row, implementation, batch, setting)
            return batch, None if batch == first else f"{first} wanted, out of memory at {2 * batch}", found
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise
        # After the handler, whose exception refers to the model.
        clear(setting.device)
        batch //= 2


def lines(name: str, implementation: str, setting: Setting, counts: Values) -> Iterator[Values]:
    """Yield the lines of a row's implementation, one with `error` if it fails."""
    row = ROWS[name]
    limit = 4 * setting.seconds + COMPILE_S * implementation.endswith("compiled")
    try:
        with limited(limit):
            batch, note, found = shrinking(row, implementation, setting)
    except Exception as error:  # noqa: BLE001  whatever fails is a line, and the next row is measured
        text = (str(error).strip().splitlines() or [""])[0]
        yield line(name, implementation, error=f"{type(error).__name__}: {text}"[:200])
        return
    path = counts.get(name, {}).get("ours" if implementation in ("ours", "ours compiled") else "plain")
    for values in found:
        if path:
            times = batch / values["ms"] / 1e9
            values["tflops_executed"] = path[values["pass"]] * times
            values["tflops_paper"] = path["paper"] * times * (3 if values["pass"] == "step" else 1)
            values["share_of_peak"] = values["tflops_executed"] / setting.peak if setting.peak else None
        yield line(name, implementation, **values, batch=batch, note=note)


def line(name: str, implementation: str, **values: Any) -> Values:
    """Return a line with all its keys."""
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
    return {"table": TABLE, "row": name, "implementation": implementation, **dict.fromkeys(COLUMNS), **rounded}


def order(names: list[str]) -> list[tuple[str, str]]:
    """Return rows and implementations in order of value: the first rows, what is compiled, the other rows."""
    eager = [(name, each) for name in names for each in ROWS[name].eager]
    first = [pair for pair in eager if list(ROWS).index(pair[0]) < FIRST]
    compiled = [(name, each) for name in names if ROWS[name].compiled for each in COMPILED]
    return [*first, *compiled, *(pair for pair in eager if pair not in first)]


def prepare(memory_gb: float) -> str:
    """Return the device; on a GPU, limit its memory and choose the precision that the engine chooses for bf16."""
    torch.set_float32_matmul_precision("high")
    if not torch.cuda.is_available():
        return "cpu"
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gb * 1e9 / total))
    return "cuda"


def context_line() -> Values:
    """Return the memory of the device that libraries and other processes use, not torch's allocator."""
    free, total = torch.cuda.mem_get_info()
    used = (total - free - torch.cuda.memory_reserved()) / 1e9
    return {"table": "device", "row": torch.cuda.get_device_name(), "total_gb": total / 1e9, "context_gb": used}


def main(words: list[str] | None = None) -> int:
    """Run the command line described at the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS, nargs="+", default=list(ROWS), help="all by default")
    parser.add_argument("--seconds-per-row", type=float, default=8.0, help="approximate, without compiling; default: 8")
    parser.add_argument("--seconds", type=float, default=150.0, help="after which no measurement starts; default: 150")
    parser.add_argument("--memory-gb", type=float, default=100.0, help="most memory; default: 100")
    parser.add_argument("--counts", type=Path, help="FLOPs of an earlier --count")
    parser.add_argument("--count", action="store_true", help="only print the FLOPs")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes")
    given = parser.parse_args(words)
    began = time.monotonic()
    counts = json.loads(given.counts.read_text()) if given.counts else count_all(given.row, given.tiny)
    if given.count:
        print(json.dumps(counts, indent=1))
        return 0
    device = prepare(given.memory_gb)
    peak = peak_tflops(torch.cuda.get_device_name()) if device == "cuda" else None
    setting = Setting(device, peak, given.seconds_per_row, given.tiny)
    for name, implementation in order(given.row):
        if time.monotonic() - began > given.seconds:
            print(json.dumps(line(name, implementation, error=f"left out: {given.seconds:g} s are over")), flush=True)
            continue
        for values in lines(name, implementation, setting, counts):
            print(json.dumps(values), flush=True)
        clear(device)
    if device == "cuda":
        print(json.dumps(context_line()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
