"""MixUp of the pairs of a global batch (Kong et al., PANNs): its samples 2i and 2i + 1, one share per pair.

A micro-batch that begins at an even place of the global batch contains whole pairs, so that pairs and shares are the
same at any number of workers.
"""

import numpy as np
import torch
from torch import Tensor


def partners(rows: int, device: torch.device) -> Tensor:
    """Return the row (B,) that each row is paired with; a single last row is its own partner."""
    return (torch.arange(rows, device=device) ^ 1).clamp(max=rows - 1)


def pair_shares(alpha: float, seed: int, step: int, sample_id: Tensor) -> Tensor:
    """Draw a Beta(alpha, alpha) number for each pair, as a function of seed, step and the pair's sample ids.

    Args:
        alpha: parameter of the Beta distribution.
        seed: of the task.
        step: optimizer step.
        sample_id: (B,) ids of the samples; negative: padding.

    Returns:
        The share of its own in each mixed sample (B,), float32 on the CPU: a pair's shares are l and 1 - l. A single
        last row has share 1.
    """
    ids = (sample_id.cpu().numpy() + 1).astype(np.uint64)
    bits = np.random.Philox(key=np.array([seed, step], np.uint64))
    generator, state = np.random.Generator(bits), bits.state
    shares = torch.ones(len(ids))
    for row in range(0, len(ids) - 1, 2):
        # Setting the counter takes a fifth of the time of making a generator per pair.
        state["state"]["counter"][2:] = ids[row : row + 2]
        bits.state = state
        drawn = generator.beta(alpha, alpha)
        shares[row], shares[row + 1] = drawn, 1 - drawn
    return shares


def mixed_pairs(x: Tensor, partner: Tensor, share: Tensor) -> Tensor:
    """Return samples or pixels (B, ...) of which each row keeps its share (B,) and takes the rest of its partner."""
    weight = share.view(-1, *(1,) * (x.ndim - 1))
    mixed = torch.lerp(x[partner].float(), x.float(), weight)
    return (mixed if x.is_floating_point() else mixed.round()).to(x.dtype)
