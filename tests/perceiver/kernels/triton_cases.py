"""`python -m tests.perceiver.kernels.triton_cases`: the Triton kernels against float64, on the GPU if there is one.

Without a GPU it requires TRITON_INTERPRET=1, and uses small sizes only. Exit code 1 if a case differs.
"""

import sys
from functools import partial
from typing import Any

import torch

from perceiver.kernels import separable_triton
from perceiver.kernels.separable_triton import Plan
from perceiver.kernels.shared_kv import moments_backward, moments_forward
from tests.perceiver.kernels.test_kernels import problem

SMALL = [(2, 40, 4, 12, 20), (1, 130, 2, 16, 8), (2, 33, 5, 5, 7), (1, 3, 1, 1, 1)]
LARGE = [(2, 512, 3, 224, 224), (1, 512, 4, 500, 333), (3, 100, 5, 64, 50), (64, 128, 2, 64, 64)]
WIDE = Plan(strip=4, block=128, programs=2)
"""Another division, with several latents per thread and few bands."""
SMALL_WIDE = [(1, 20, 3, 17, 8), (1, 70, 1, 5, 7), (1, 3, 5, 1, 1)]


def differences(
    sizes: tuple[int, int, int, int, int],
    strength: float,
    device: str,
    plan: Plan | None,
) -> dict[str, float]:
    """Return the greatest difference of each result, relative to its own greatest value (0.1 at least)."""
    forward = partial(separable_triton.forward, plan=plan)
    backward = partial(separable_triton.backward, plan=plan)
    parameters, fixed = problem(*sizes, strength)
    single: Any = [t.float().to(device) for t in (*parameters, *fixed)]
    exact: Any = [t.double() for t in single]
    wanted: Any = moments_forward(*exact)
    got: Any = forward(*single)
    slopes = [torch.randn_like(t) for t in wanted[:3]]
    delta = torch.stack([(s * w).sum(-1) for s, w in zip(slopes, wanted[:3], strict=True)]).sum(0)
    single_slopes, single_delta = [s.float() for s in slopes], delta.float()
    got_back = backward(*single, got[3], single_slopes, single_delta)
    arguments: Any = [*exact, wanted[3], slopes, delta]
    wanted_back = moments_backward(*arguments)
    names = ("moments", "by_row", "by_column", "lse", "dq", "drows", "dcolumns")
    pairs = zip((*got, *got_back), (*wanted, *wanted_back), strict=True)
    found = {
        name: float((a - b).abs().max() / b.abs().max().clamp(min=0.1))
        for name, (a, b) in zip(names, pairs, strict=True)
    }
    if device == "cuda":
        again = (*forward(*single), *backward(*single, got[3], single_slopes, single_delta))
        found["again"] = float(any(not torch.equal(a, b) for a, b in zip((*got, *got_back), again, strict=True)))
    return found


def main() -> int:
    """Run the cases and print one line for each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    separable_triton.prove(torch.device(device))
    large, strengths = (LARGE, (0.5, 20.0, 100.0)) if device == "cuda" else ([], (0.5, 100.0))
    # Strength 100 needs the true maximum instead of the first row's.
    cases: list[tuple[str, Plan | None, tuple[int, int, int, int, int], float]] = [
        ("", None, sizes, strength) for sizes in SMALL + large for strength in strengths
    ]
    cases += [("wide", WIDE, sizes, strength) for sizes in SMALL_WIDE + large for strength in (0.5, 100.0)]
    failed = 0
    for name, plan, sizes, strength in cases:
        found = differences(sizes, strength, device, plan)
        good = all(error < 2e-4 * max(1, strength / 20) for error in found.values())  # not for NaN
        failed += not good
        shown = {k: f"{v:.1e}" for k, v in found.items()}
        print("ok" if good else "DIFFERS", sizes, strength, name, shown, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
