"""Fourier features against values calculated by hand from Perceiver §3.2."""

import math

import pytest
import torch

from perceiver.modalities._positions import Positions
from perceiver.positions import FourierConfig, Grid, LearnedConfig, fourier_features, grid_tables


def test_fourier_features_by_hand():
    """Frequencies 1, 3, 5 for mu=10 on the first axis and 1, 2, 3 for mu=6 on the second."""
    x, y = 0.25, -0.6
    expected = [x, y]
    expected += [math.sin(math.pi * f * x) for f in (1, 3, 5)] + [math.sin(math.pi * f * y) for f in (1, 2, 3)]
    expected += [math.cos(math.pi * f * x) for f in (1, 3, 5)] + [math.cos(math.pi * f * y) for f in (1, 2, 3)]
    got = fourier_features(torch.tensor([[x, y]], dtype=torch.float64), 3, (10.0, 6.0))
    torch.testing.assert_close(got[0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(6,), (4, 5), (2, 3, 4)])
def test_grid_tables_sum_to_the_features(shape):
    rates = tuple(2.0 * n for n in shape)
    table = grid_tables(shape, 4, rates, torch.float64, torch.device("cpu"))
    axes = [torch.linspace(-1, 1, n, dtype=torch.float64) for n in shape]
    coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    expected = fourier_features(coordinates, 4, rates).flatten(0, -2)
    torch.testing.assert_close(Grid(shape, table).dense(), expected)


def test_learned_positions_are_interpolated_to_another_size():
    positions = Positions(LearnedConfig(channels=2), (3, 3))
    ramp = torch.linspace(0, 1, 3)
    positions.table.data = torch.stack([ramp[:, None].expand(3, 3), ramp.expand(3, 3)], -1).flatten(0, 1)
    finer = positions.learned((5, 5)).view(5, 5, 2)
    torch.testing.assert_close(finer[:, 0, 0], torch.linspace(0, 1, 5))
    torch.testing.assert_close(finer[2, :, 1], torch.linspace(0, 1, 5))


def test_channels():
    assert FourierConfig(bands=64).channels(2) == 258
    assert Positions(FourierConfig(bands=64), (224, 224)).channels == 258
