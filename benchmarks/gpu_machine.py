"""What a GPU can do for our sizes: copies, matrix products in four number types, NCCL; JSON lines for `gpu.py`.

    python benchmarks/gpu_machine.py
    python benchmarks/gpu_machine.py --tiny     # tiny sizes, on the CPU where there is no GPU

The products are 8,192 cubed and those of the latents' linear layers in the ImageNet Perceiver at batch 32 (16,384
rows of 1,024 channels to 1,024 and to 3,072), of normally distributed numbers. A time is the median over ten pairs of
CUDA events around several calls each, after two to warm up. Calls repeat with the same tensors, so small operands may
come from the cache. `error` is the root mean square of the difference from the same product in float64 on a few rows,
relative to that of the product.

fp8 is `torch.nn.functional.scaled_mm` of float8_e4m3fn with one scale per row of the activations and one per output
channel, with fast accumulation, to bfloat16. "fp8 + quantise" includes scaling and casting bfloat16 activations, by
separate operations ("eager") or by `torch.compile`; the weights are always cast beforehand.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

PRODUCTS = ((8192, 8192, 8192), (16384, 1024, 1024), (16384, 1024, 3072))
TINY = ((64, 64, 64), (128, 32, 48))
REPEATS, WARM_UP, ERROR_ROWS = 10, 2, 64
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
NOT_AVAILABLE = (AttributeError, RuntimeError, ValueError, NotImplementedError, ImportError, TypeError)


def tell(**line: Any) -> None:
    """Print a line for `gpu.py`."""
    print(json.dumps(line), flush=True)


def reason(error: Exception) -> str:
    """Return an error as one short line."""
    first = (str(error).splitlines() or [""])[0]
    return f"not available: {type(error).__name__}: {first[:120]}"


def median_ms(run: Callable[[], object], calls: int) -> float:
    """Return the median time of a call in milliseconds, measured over several calls at a time."""
    times = []
    for turn in range(REPEATS + WARM_UP):
        if CUDA:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        if CUDA:
            end.record()
            torch.cuda.synchronize()
        ms = start.elapsed_time(end) if CUDA else (time.perf_counter() - begin) * 1e3
        if turn >= WARM_UP:
            times.append(ms / calls)
    return statistics.median(times)


def copy(size: int) -> None:
    """Measure a copy on the device; each byte is read and written."""
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source), calls=4)
    tell(table="copy on the device", bytes=size, ms=ms, read_and_written_gb_per_s=2 * size / ms / 1e6)


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix as float8 and the scale of each row (rows x 1)."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def kinds(x: torch.Tensor, weight: torch.Tensor) -> dict[str, Callable[[], Callable[[], torch.Tensor]]]:
    """Return a function per number type that prepares its operands and returns the product.

    `x` is rows x inputs, `weight` outputs x inputs, both float32.
    """

    def bf16() -> Callable[[], torch.Tensor]:
        a, b = x.bfloat16(), weight.bfloat16()
        return lambda: a @ b.t()

    def float32(precision: str) -> Callable[[], torch.Tensor]:
        torch.set_float32_matmul_precision(precision)
        return lambda: x @ weight.t()

    def fp8(quantiser: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None) -> Callable[[], torch.Tensor]:
        b, b_scale = quantise(weight)
        activations, given = x.bfloat16(), quantise(x.bfloat16())
        by_row = F.ScalingType.RowWise

        def product() -> torch.Tensor:
            a, a_scale = quantiser(activations) if quantiser else given
            options: dict[str, Any] = {"output_dtype": torch.bfloat16, "use_fast_accum": True}
            return F.scaled_mm(a, b.t(), a_scale, by_row, b_scale.t(), by_row, **options)

        return product

    return {
        "bf16": bf16,
        "TF32": lambda: float32("high"),
        "float32": lambda: float32("highest"),
        "fp8": lambda: fp8(None),
        "fp8 + quantise, eager": lambda: fp8(quantise),
        "fp8 + quantise, compiled": lambda: fp8(torch.compile(quantise, dynamic=False)),
    }


def products(sizes: tuple[tuple[int, int, int], ...]) -> None:
    """Measure all types of product, the compiled one last: it takes seconds to build."""
    operands = [(torch.randn(m, k, device=DEVICE), torch.randn(n, k, device=DEVICE)) for m, k, n in sizes]
    for kind in kinds(*operands[0]):
        for (m, k, n), (x, weight) in zip(sizes, operands, strict=True):
            line: dict[str, Any] = {"table": "products", "rows": m, "inputs": k, "outputs": n, "type": kind}
            flops = 2 * m * k * n
            try:
                run = kinds(x, weight)[kind]()
                got = run()[:ERROR_ROWS].double()
                ms = median_ms(run, calls=max(1, min(20, int(2e12 / flops))) if CUDA else 1)
            except NOT_AVAILABLE as error:
                tell(**line, note=reason(error))
                continue
            wanted = x[:ERROR_ROWS].double() @ weight.double().t()
            deviation = ((got - wanted).square().mean() / wanted.square().mean()).sqrt().item()
            tell(**line, ms=ms, tflops=flops / ms / 1e9, error=deviation)


def all_reduce(size: int) -> None:
    """Measure an all-reduce among one rank: what a call costs before there is a second device."""
    import torch.distributed as dist

    backend = "nccl" if CUDA else "gloo"
    line: dict[str, Any] = {"table": "all-reduce, one rank", "backend": backend, "bytes": size}
    try:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        version = ".".join(map(str, torch.cuda.nccl.version())) if CUDA else None
        data = torch.ones(size // 4, device=DEVICE)
        ms = median_ms(lambda: dist.all_reduce(data), calls=4)
        right = bool((data == 1).all())
        dist.destroy_process_group()
    except NOT_AVAILABLE as error:
        tell(**line, note=reason(error))
        return
    tell(**line, version=version, ms=ms, values_right=right)


def main() -> None:
    """Run the command line described at the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes")
    tiny = parser.parse_args().tiny
    torch.manual_seed(0)
    for size in (2**16,) if tiny else (2**26, 2**32):
        copy(size)
    all_reduce(2**12 if tiny else 180_000_000)  # the gradients of 45 M parameters in float32
    products(TINY if tiny else PRODUCTS)


if __name__ == "__main__":
    main()
