"""The training step of the ImageNet Perceiver on a GPU: what compilation, precision and the optimizer change.

    python benchmarks/gpu_step.py            # JSON lines
    python benchmarks/gpu_step.py --tiny     # a small model on the CPU, to try the script

bf16 autocast, fused AdamW, batch 32, random images; times are medians over CUDA events after two passes to warm up.
`first_s` is the first step, compilation included. `tflops` counts the matrix products that are executed, three forward
passes a step. Tables: `step` (variants), `profile` (where a step's GPU time goes), `small` (micro-batches that the host
cannot launch fast enough), `accuracy` (gradients against float32), `start` (a second process with the compiler's cache,
and one without: seconds to the first step, and whether the weights after three steps are the same bits), `attention`
(torch's implementations at the latents' size), `optimizer`.
"""

import argparse
import gc
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cuda_graphs import GraphedForward  # noqa: E402
from perceiver.accounting import count_flops  # noqa: E402
from perceiver.attention import SelfAttend  # noqa: E402
from perceiver.factory import build_model, model_config  # noqa: E402
from perceiver.kernels.compiled import CompiledLayers  # noqa: E402
from perceiver.model import Encoder  # noqa: E402
from perceiver.optim.lamb import Lamb  # noqa: E402

PEAK = 989.0
"""TFLOP/s of dense bf16 products by the vendor's datasheet for H100 and H200."""
IMAGENET: dict[str, Any] = {"kind": "perceiver", "inputs": {"kind": "image", "size": [224, 224]}}
TINY: dict[str, Any] = {
    "kind": "perceiver",
    "inputs": {"kind": "image", "size": [16, 16]},
    "latents": 32,
    "latent_channels": 64,
    "cross_attends": 2,
    "self_attends_per_block": 2,
}


class OnlySelfAttends(CompiledLayers):
    """Compiles the latents' layers and not the cross-attends."""

    def prove(self, layer: nn.Module, *args: Any) -> None:
        """Compile the first self-attend."""
        if isinstance(layer, SelfAttend):
            super().prove(layer, *args)


class Setting:
    """Device, sizes and repeats."""

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.device = "cpu" if tiny else "cuda"
        self.values = TINY if tiny else IMAGENET
        self.batch, self.repeats, self.classes = (4, 1, 10) if tiny else (32, 5, 1000)
        self.backend = "aot_eager" if tiny else "inductor"
        with torch.device("meta"):
            self.flops = count_flops(build_model(model_config(self.values), classes=self.classes))

    def model(self, compiled: CompiledLayers | None = None, *, half_residual: bool = False, **values: Any) -> Encoder:
        """Return a model whose last layer is not zero, so that all gradients are alive."""
        torch.manual_seed(0)
        model = cast(Encoder, build_model(model_config({**self.values, **values}), classes=self.classes))
        nn.init.normal_(cast(nn.Linear, model.head).weight, std=0.02)
        model.compiled, model.half_residual = compiled, half_residual
        return model.to(self.device).train()

    def data(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return random images and labels."""
        generator = torch.Generator().manual_seed(1)
        size = self.values["inputs"]["size"]
        images = torch.randint(0, 256, (batch, 3, *size), generator=generator, dtype=torch.uint8)
        labels = torch.randint(self.classes, (batch,), generator=generator)
        return images.to(self.device), labels.to(self.device)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, *, half: bool = True) -> Tensor:
        """Return the loss under autocast, or in float32."""
        with torch.autocast(self.device, torch.bfloat16, enabled=half):
            return F.cross_entropy(model(images), labels)

    def ms(self, run: Callable[[], object], repeats: int | None = None) -> float:
        """Return the median milliseconds of a run after two to warm up."""
        times = []
        for _ in range((repeats or self.repeats) + 2):
            if self.device == "cpu":
                began = time.perf_counter()
                run()
                times.append(1e3 * (time.perf_counter() - began))
                continue
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times[2:])

    @contextmanager
    def memory(self) -> Iterator[dict[str, float]]:
        """Give the peak gigabytes above what is allocated."""
        found = {"memory_gb": 0.0}
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
        yield found
        if self.device == "cuda":
            found["memory_gb"] = (torch.cuda.max_memory_allocated() - base) / 1e9

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def emit(table: str, **values: Any) -> None:
    """Print one line."""
    print(json.dumps({"table": table, **values}), flush=True)


def free(setting: Setting) -> None:
    """Free the memory of models that are no longer used, which refer to themselves through their graphs."""
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.empty_cache()


def stepper(setting: Setting, model: nn.Module, batch: int, optimizer: Any = None) -> Callable[[], None]:
    """Return a function that takes one optimizer step, without waiting for the GPU."""
    images, labels = setting.data(batch)
    adamw = optimizer or torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        adamw.zero_grad()
        setting.loss(model, images, labels).backward()
        adamw.step()

    return step


VARIANTS: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"compiled": CompiledLayers},
    "compiled, CUDA graphs": {"compiled": CompiledLayers, "graphed": True},
    "compiled, CUDA graphs, bf16 residual": {"compiled": CompiledLayers, "graphed": True, "half_residual": True},
    "compiled, bf16 residual": {"compiled": CompiledLayers, "half_residual": True},
    "eager, CUDA graphs": {"graphed": True},
    "compiled self-attends only, CUDA graphs": {"compiled": OnlySelfAttends, "graphed": True},
}
PROFILED = ("compiled", "compiled, CUDA graphs, bf16 residual")


def variant(setting: Setting, name: str, profiled: bool) -> None:
    """Measure forward pass and step of one variant."""
    torch.compiler.reset()
    how = dict(VARIANTS[name])
    compiled, graphed = how.pop("compiled", None), how.pop("graphed", False)
    model = setting.model(compiled(setting.backend) if compiled else None, **how)
    if graphed and setting.device == "cuda":
        model.forward = GraphedForward(model, model.forward)
    step = stepper(setting, model, setting.batch)
    with setting.memory() as memory:
        began = time.perf_counter()
        step()
        setting.synchronize()
        first = time.perf_counter() - began
        step_ms = setting.ms(step)
    tflops = 3 * setting.flops * setting.batch / step_ms / 1e9
    emit(
        "step",
        variant=name,
        batch=setting.batch,
        step_ms=step_ms,
        **memory,
        tflops=tflops,
        share_of_peak=tflops / PEAK,
        first_s=first,
        compiled=model.compiled.works if model.compiled else None,
        graphed=getattr(model.forward, "works", None),
    )
    if profiled:
        profile(setting, name, step)


KINDS = {
    "attention": ("flash", "fmha", "sdpa", "cudnn_generated"),
    "cross-attend kernel": ("forward_kernel", "backward_kernel", "transpose_kernel", "join_kernel"),
    "matrix products": ("gemm", "nvjet", "cutlass", "sm90_xmma", "cublas"),
    "optimizer": ("multi_tensor",),
    "compiled": ("triton_",),
}


def profile(setting: Setting, name: str, step: Callable[[], None]) -> None:
    """Print the GPU time of a step by kind of kernel, and the longest of those that are not products."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if setting.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        step()
        setting.synchronize()
    kinds: dict[str, list[float]] = {}
    kernels = []
    for event in found.key_averages():
        ms = getattr(event, "self_device_time_total", 0) / 1e3 if setting.device == "cuda" else 0.0
        if str(event.device_type).endswith("CUDA") and ms:
            low = event.key.lower()
            kind = next((kind for kind, marks in KINDS.items() if any(mark in low for mark in marks)), "other")
            total = kinds.setdefault(kind, [0.0, 0])
            total[0] += ms
            total[1] += event.count
            kernels.append((ms, event.count, kind, event.key[:90]))
    for kind, (ms, count) in sorted(kinds.items(), key=lambda pair: -pair[1][0]):
        emit("profile", variant=name, kind=kind, ms=ms, kernels=count)
    for ms, count, kind, key in sorted(kernels, reverse=True)[:16]:
        emit("longest kernels", variant=name, kind=kind, ms=ms, count=count, kernel=key)


def attention_backends(setting: Setting) -> None:
    """Time torch's attention at the size of the latents."""
    n, d, heads = (32, 16, 4) if setting.tiny else (512, 128, 8)
    q, k, v = (
        torch.randn(setting.batch, n, heads, d, device=setting.device, dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for _ in range(3)
    )
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        try:
            with sdpa_kernel(getattr(SDPBackend, backend)):

                def both() -> None:
                    F.scaled_dot_product_attention(q, k, v).sum().backward()

                def forward() -> None:
                    with torch.no_grad():
                        F.scaled_dot_product_attention(q, k, v)

                emit("attention", backend=backend, forward_ms=setting.ms(forward, 10), both_ms=setting.ms(both, 10))
        except RuntimeError as error:
            emit("attention", backend=backend, error=str(error).splitlines()[0][:120])


def small(setting: Setting) -> None:
    """Time the step of small batches, which the host launches more slowly than the GPU computes."""
    for batch in (1, 4):
        for name in ("eager", "compiled", "compiled, CUDA graphs"):
            torch.compiler.reset()
            model = setting.model(None if name == "eager" else CompiledLayers(setting.backend))
            if name.endswith("graphs") and setting.device == "cuda":
                model.forward = GraphedForward(model, model.forward)
            step = stepper(setting, model, batch)
            step()
            emit("small", batch=batch, variant=name, step_ms=setting.ms(step))
            del model, step
            free(setting)


def accuracy(setting: Setting) -> None:
    """Compare loss and gradients in bf16, also with a bf16 residual and compiled, with those in float32."""
    images, labels = setting.data(4)

    def gradients(half: bool, **how: Any) -> tuple[float, Tensor]:
        torch.compiler.reset()
        model = setting.model(**how)
        loss = setting.loss(model, images, labels, half=half)
        loss.backward()
        return float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.set_float32_matmul_precision("highest")
    loss, wanted = gradients(half=False)
    cases: dict[str, dict[str, Any]] = {
        "float32, compiled": {"half": False, "compiled": CompiledLayers(setting.backend)},
        "bf16": {"half": True},
        "bf16, compiled": {"half": True, "compiled": CompiledLayers(setting.backend)},
        "bf16 residual": {"half": True, "half_residual": True},
        "bf16 residual, compiled": {"half": True, "half_residual": True, "compiled": CompiledLayers(setting.backend)},
    }
    for name, how in cases.items():
        value, got = gradients(**how)
        emit(
            "accuracy",
            variant=name,
            loss_error=abs(value - loss) / loss,
            gradient_error=float((got - wanted).norm() / wanted.norm()),
            cosine=float(F.cosine_similarity(got, wanted, dim=0)),
        )
    torch.set_float32_matmul_precision("high")


def optimizers(setting: Setting) -> None:
    """Time the update alone."""
    model = setting.model()
    for param in model.parameters():
        param.grad = torch.randn_like(param) * 1e-3
    kinds = {
        "AdamW, fused": torch.optim.AdamW(model.parameters(), fused=True),
        "AdamW": torch.optim.AdamW(model.parameters(), foreach=True),
        "LAMB": Lamb(model.parameters()),
    }
    for name, optimizer in kinds.items():
        emit("optimizer", kind=name, ms=setting.ms(optimizer.step))


def start(setting: Setting) -> None:
    """Time the first step with an empty compiler cache and with a full one, and compare the weights' bits."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        for cache, name in ((one, "empty cache"), (one, "same cache"), (other, "another empty cache")):
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
            command = [sys.executable, __file__, "--start", *(["--tiny"] if setting.tiny else [])]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                emit("start", cache=name, error=(done.stderr.strip().splitlines() or ["no output"])[-1][:160])
            else:
                emit("start", cache=name, **json.loads(done.stdout.splitlines()[-1]))


def three_steps(setting: Setting) -> None:
    """Take three steps and print the seconds of the first, and a hash of the weights."""
    model = setting.model(CompiledLayers(setting.backend))
    step = stepper(setting, model, setting.batch)
    began = time.perf_counter()
    step()
    setting.synchronize()
    first = time.perf_counter() - began
    step()
    step()
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    print(json.dumps({"first_s": first, "weights": digest.hexdigest()[:16]}))


def main() -> None:
    """Run the command line described at the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    parser.add_argument("--table", action="append", help="only these tables")
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    setting = Setting(arguments.tiny)
    if arguments.start:
        three_steps(setting)
        return
    parts: dict[str, Callable[[], None]] = {
        **{f"step:{name}": (lambda name=name: variant(setting, name, name in PROFILED)) for name in VARIANTS},
        "small": lambda: small(setting),
        "accuracy": lambda: accuracy(setting),
        "attention": lambda: attention_backends(setting),
        "optimizer": lambda: optimizers(setting),
        "start": lambda: start(setting),
    }
    for name, run in parts.items():
        table = name.partition(":")[0]
        if arguments.table and table not in arguments.table:
            continue
        began = time.perf_counter()
        try:
            run()
        except Exception as error:  # noqa: BLE001  the next measurement may work
            emit(table, variant=name, error=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
        print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
        free(setting)


if __name__ == "__main__":
    main()
