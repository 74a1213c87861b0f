"""Time, memory and error of the kernels of separable cross-attention on a GPU, divided into programs in several ways.

    python benchmarks/gpu_kernel.py             # 512 latents, 224 x 224 inputs, batch 32
    TRITON_INTERPRET=1 python benchmarks/gpu_kernel.py --tiny     # without a GPU: no time, tiny sizes

It prints one JSON line per variant and pass. `ms` is the median over CUDA events of a whole call; `kernel_ms` is the
time of the kernel that processes the scores in one call, as torch's profiler reports it, without the transpositions
and sums around it. `ms_large` is `ms` with scores of strength 20, where the forward pass may have to compute bands
again. `error_small` and `error_large` are the greatest difference from float64 of any result, relative to
the result's greatest value, at a smaller size with scores of strength 0.5 and 20; `repeats` tells whether a repeated
call gives the same bits. A variant that fails has `error` instead.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from perceiver.kernels import separable_triton
from perceiver.kernels.separable_triton import BACKWARD, FORWARD, Plan
from perceiver.kernels.shared_kv import moments_backward, moments_forward

TINY, SMALLER, FULL = (1, 16, 3, 8), (2, 512, 64, 48), (32, 512, 224, 224)
REPEATS = 15
STRENGTHS = 0.5, 20.0


FORWARDS = {
    "chosen": FORWARD,
    "8 x 128": Plan(block=128, programs=1056),
    "8 x 128, short bands": Plan(block=128, programs=2112),
    "8 x 128, 168 registers": Plan(block=128, registers=168),
    "8 x 64, short bands": Plan(programs=4224),
    "16 x 64": Plan(strip=16, registers=168),
    "16 x 64, short bands": Plan(strip=16, programs=3168, registers=168),
    "4 x 128": Plan(strip=4, block=128, registers=168),
}
BACKWARDS = {
    "chosen": BACKWARD,
    "8 x 128": Plan(block=128, programs=1056),
    "8 x 64": Plan(programs=2112, registers=128),
    "16 x 64": Plan(strip=16, registers=168),
    "16 x 64, short bands": Plan(strip=16, programs=3168, registers=168),
    "4 x 128": Plan(strip=4, block=128, registers=168),
}
"""Columns x latents of a program, registers and length of the bands."""


def variants() -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """Yield the name, the pass and its function of each variant."""
    for name, plan in FORWARDS.items():
        yield name, "forward", partial(separable_triton.forward, plan=plan)
    for name, plan in BACKWARDS.items():
        yield name, "backward", partial(separable_triton.backward, plan=plan)


class Case:
    """One problem: the arguments of both passes, in float32 and, if wanted, the results in float64."""

    def __init__(self, sizes: tuple[int, ...], features: int, strength: float, device: str, exact: bool) -> None:
        batch, latents, height, width = sizes
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(batch, latents, size) for size in (features, height, width)]
        random = partial(torch.randn, generator=generator, device=device)
        parameters = [strength * random(shape) for shape in shapes]
        fixed = [random(batch, features, height * width), 0.5 + random(batch, height * width).sigmoid()]
        slopes = [random(shape) for shape in shapes]
        self.forward = (*parameters, *fixed)
        self.wanted: dict[str, tuple[Tensor, ...]] = {}
        if exact:
            *moments, lse = moments_forward(*(x.double() for x in self.forward))
            delta = torch.stack([(s * m).sum(-1) for s, m in zip(slopes, moments, strict=True)]).sum(0)
            doubled: Any = [*(x.double() for x in self.forward), lse, [s.double() for s in slopes], delta]
            gradients = moments_backward(*doubled)
            self.wanted = {"forward": (*moments, lse), "backward": gradients}
            lse, delta = lse.float(), delta.float()
        else:
            *moments, lse = separable_triton.forward(*self.forward)
            delta = torch.stack([(s * m).sum(-1) for s, m in zip(slopes, moments, strict=True)]).sum(0)
        self.backward = (*self.forward, lse, slopes, delta)

    def arguments(self, name: str) -> tuple[Any, ...]:
        """Return the arguments of the pass `name`."""
        return self.forward if name == "forward" else self.backward


def compare(case: Case, name: str, run: Callable[..., Any]) -> tuple[float, bool]:
    """Return the greatest relative error of a pass, and whether a repeated call gives the same bits."""
    arguments = case.arguments(name)
    got, again = run(*arguments), run(*arguments)
    errors = [
        float((a.double() - b).abs().max() / b.abs().max().clamp(min=0.1))
        for a, b in zip(got, case.wanted[name], strict=True)
    ]
    return max(errors), all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def median_ms(run: Callable[[], Any]) -> float:
    """Return the median time of a call on the GPU, after three to warm up."""
    times = []
    for turn in range(REPEATS + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if turn > 2:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def kernel_ms(run: Callable[[], Any]) -> float | None:
    """Return the time on the GPU of the longest kernel of one call, None if the profiler reports none."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
        return max((event.device_time_total / 1e3 for event in profiler.key_averages()), default=None)
    except (RuntimeError, AssertionError):  # no access to the profiler's counters
        return None


def measure(name: str, run: Callable[..., Any], cases: list[Case], full: list[Case]) -> dict[str, Any]:
    """Return what the top of this file describes, of one pass of one variant."""
    began = time.perf_counter()
    small, large = (compare(case, name, run) for case in cases)
    result: dict[str, Any] = {"error_small": small[0], "error_large": large[0], "repeats": small[1] and large[1]}
    if full:
        calls = [partial(run, *case.arguments(name)) for case in full]
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result["ms"], result["ms_large"] = map(median_ms, calls)
        result["memory_gb"] = (torch.cuda.max_memory_allocated() - base) / 1e9
        result["kernel_ms"] = kernel_ms(calls[0])
    return {**result, "seconds": time.perf_counter() - began}


def main() -> None:
    """Run the command line described at the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, no time: for Triton's interpreter")
    parser.add_argument("--features", type=int, default=3)
    parser.add_argument("--batch", type=int, default=FULL[0])
    arguments = parser.parse_args()
    device = "cpu" if arguments.tiny else "cuda"
    batch = 1 if arguments.tiny else arguments.batch
    sizes, large = TINY if arguments.tiny else SMALLER, (batch, *FULL[1:])
    cases = [Case(sizes, arguments.features, strength, device, exact=True) for strength in STRENGTHS]
    full = [] if arguments.tiny else [Case(large, arguments.features, s, device, exact=False) for s in STRENGTHS]
    for variant, name, run in variants():
        line = {"table": "kernel", "variant": variant, "pass": name, "batch": batch, "features": arguments.features}
        try:
            line |= measure(name, run, cases, full)
        except Exception as error:  # noqa: BLE001  a variant that does not compile is a result
            line["error"] = f"{type(error).__name__}: {error}"[:300]
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
