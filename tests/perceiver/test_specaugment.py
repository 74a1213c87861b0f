"""SpecAugment: masks of stretches and bands, a function of seed, step and sample, at any number of workers."""

from typing import Any

import torch

from perceiver.hashing import GOLDEN, mix64
from perceiver.modalities.mel import MelConfig, uniform_draws
from perceiver.train.loop import with_draw_seeds

MEL: dict[str, Any] = {"samples": 3200, "rate": 8000, "window": 64, "hop": 32, "bins": 40, "high": 3000.0}
MASKS = {"time_masks": 2, "time_width": 20, "frequency_masks": 2, "frequency_width": 8}


def batch_of(rows: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    audio = torch.randint(-9000, 9000, (rows, 3200), generator=g, dtype=torch.int16)
    return {"audio": audio, "sample_id": torch.arange(rows) * 7}


def masked(batch: dict[str, torch.Tensor], step: int = 3, seed: int = 0) -> torch.Tensor:
    """Return which values of the spectrograms (B, 100, 40) are masked."""
    config = {**MEL, "layout": "grid", "positions": {"kind": "none"}}
    inputs = MelConfig.model_validate({**config, **MASKS}).build().train()
    plain = MelConfig.model_validate(config).build()
    found, whole = (one(with_draw_seeds(batch, seed, step), torch.float32).data for one in (inputs, plain))
    return (found != whole)[..., 0].unflatten(1, (100, 40))


def test_masks_depend_on_seed_step_and_sample_alone() -> None:
    batch = batch_of(8)
    whole = masked(batch)
    torch.manual_seed(1)
    halves = [masked({key: value[rows] for key, value in batch.items()}) for rows in (slice(0, 3), slice(3, 8))]
    assert torch.equal(torch.cat(halves), whole)
    assert not torch.equal(masked(batch, step=4), whole) and not torch.equal(masked(batch, seed=1), whole)
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 8


def test_masks_are_stretches_of_frames_and_bands_of_bins_up_to_their_widths() -> None:
    found = masked(batch_of(600))
    frames, bins = found.all(2).sum(1), found.all(1).sum(1)
    # Two stretches of 0 to 20 frames and two bands of 0 to 8 bins each, which may overlap.
    assert frames.max() > 30 and frames.max() <= 40 and bins.max() > 12 and bins.max() <= 16
    assert 15 < frames.float().mean() < 20 and 6 < bins.float().mean() < 8
    # Every other value is shown, and every frame and bin is masked as often as it can be.
    assert torch.equal(found, found.all(2)[:, :, None] | found.all(1)[:, None, :])
    inner = found.all(2).float().mean(0)[25:75]
    assert inner.min() > 0.15 and inner.max() < 0.3


def test_draws_are_those_of_splitmix64() -> None:
    seeds = [0, 1, 5 << 60, -3]
    found = uniform_draws(torch.tensor(seeds), 5)
    for row, seed in enumerate(seeds):
        wanted = [(mix64(seed + GOLDEN * (number + 1)) >> 40) / 2**24 for number in range(5)]
        assert found[row].tolist() == wanted


def test_evaluation_masks_nothing() -> None:
    config = {**MEL, **MASKS, "positions": {"kind": "none"}}
    module = MelConfig.model_validate(config).build()
    batch = with_draw_seeds(batch_of(2), 0, 0)
    assert not torch.equal(module.train()(batch, torch.float32).data, module.eval()(batch, torch.float32).data)
    plain = MelConfig.model_validate({**MEL, "positions": {"kind": "none"}}).build()
    assert torch.equal(module(batch, torch.float32).data, plain(batch, torch.float32).data)
