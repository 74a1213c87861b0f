"""`python -m tests.perceiver.kernels.triton_cases`: the Triton kernels against float64, on the GPU if there is one.

Without a GPU it requires TRITON_INTERPRET=1, and uses small sizes only. Exit code 1 if a case differs.
"""

import sys
from typing import Any

import torch

from perceiver.kernels import separable_triton
from perceiver.shared_kv import moments_backward, moments_forward
from tests.perceiver.kernels.test_kernels import problem

SMALL = [(2, 40, 4, 12, 20), (1, 130, 2, 16, 8), (2, 33, 5, 5, 7), (1, 3, 2, 1, 1)]
LARGE = [(2, 512, 4, 224, 224), (1, 512, 4, 500, 333), (3, 100, 5, 64, 50), (64, 128, 2, 64, 64)]


def differences(sizes: tuple[int, ...], strength: float, device: str) -> dict[str, float]:
    """Return the greatest difference of each result, relative to its own greatest value (0.1 at least)."""
    parameters, fixed = problem(*sizes, strength)
    single: Any = [t.float().to(device) for t in (*parameters, *fixed)]
    exact: Any = [t.double() for t in single]
    wanted: Any = moments_forward(*exact)
    got: Any = separable_triton.forward(*single)
    slopes = [torch.randn_like(t) for t in wanted[:3]]
    delta = torch.stack([(s * w).sum(-1) for s, w in zip(slopes, wanted[:3], strict=True)]).sum(0)
    single_slopes, single_delta = [s.float() for s in slopes], delta.float()
    got_back = separable_triton.backward(*single, got[3], single_slopes, single_delta)
    wanted_back = moments_backward(*exact, wanted[3], slopes, delta)
    again = separable_triton.backward(*single, got[3], single_slopes, single_delta)
    names = ("moments", "by_row", "by_column", "lse", "dq", "drows", "dcolumns")
    pairs = zip((*got, *got_back), (*wanted, *wanted_back), strict=True)
    found = {
        name: float((a - b).abs().max() / b.abs().max().clamp(min=0.1))
        for name, (a, b) in zip(names, pairs, strict=True)
    }
    found["again"] = float(any(not torch.equal(a, b) for a, b in zip(got_back, again, strict=True)))
    return found


def main() -> int:
    """Run the cases and print one line for each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    separable_triton.prove(torch.device(device))
    failed = 0
    for sizes in SMALL + (LARGE if device == "cuda" else []):
        for strength in (0.5, 20.0):
            found = differences(sizes, strength, device)
            good = all(error < 2e-4 for error in found.values())  # not for NaN
            failed += not good
            print("ok" if good else "DIFFERS", sizes, strength, {k: f"{v:.1e}" for k, v in found.items()}, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
