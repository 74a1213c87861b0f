"""RandAugment: each operation at the paper's magnitude."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from PIL import Image

from pipelines.transforms.image import AugmentConfig, CropConfig, training_view
from pipelines.transforms.randaugment import OPERATIONS, RandAugmentConfig, rand_augment

COLOUR = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
GREY = 128


def applied(name: str, pixels: np.ndarray = COLOUR, level: float = 0.5, seed: int = 0) -> np.ndarray:
    """Return the pixels after one operation."""
    return np.asarray(OPERATIONS[name](Image.fromarray(pixels), level, np.random.default_rng(seed)))


def test_there_are_the_16_operations() -> None:
    assert len(OPERATIONS) == 16


@pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness", "Sharpness"])
def test_enhancements_do_nothing_at_magnitude_5(name: str) -> None:
    assert (applied(name) == COLOUR).all()
    assert (applied(name, level=0.9) != COLOUR).any()


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("Invert", lambda v: 255 - v),
        ("Posterize", lambda v: v // 64 * 64),
        ("Solarize", lambda v: np.where(v < 128, v, 255 - v)),
        ("SolarizeAdd", lambda v: np.where(v < 128, np.minimum(v + 55, 255), v)),
    ],
)
def test_pixel_operations(name: str, wanted: Callable[[np.ndarray], np.ndarray]) -> None:
    assert (applied(name) == wanted(COLOUR.astype(int))).all()
    assert (applied(name, COLOUR[..., 0]) == wanted(COLOUR[..., 0].astype(int))).all()


def test_translations_move_50_pixels_and_fill_with_grey() -> None:
    for name, axis in (("TranslateX", 1), ("TranslateY", 0)):
        moves = set()
        for seed in range(20):
            out = applied(name, seed=seed)
            inner = [slice(None)] * 2
            for sign in (1, -1):
                there, here, empty = list(inner), list(inner), list(inner)
                there[axis] = slice(50, None) if sign > 0 else slice(None, -50)
                here[axis] = slice(None, -50) if sign > 0 else slice(50, None)
                empty[axis] = slice(-50, None) if sign > 0 else slice(None, 50)
                if (out[tuple(here)] == COLOUR[tuple(there)]).all() and (out[tuple(empty)] == GREY).all():
                    moves.add(sign)
        assert moves == {1, -1}


def test_shears_and_turns_go_both_ways_and_fill_with_grey() -> None:
    white = np.full((101, 101, 3), 255, np.uint8)
    for name in ("ShearX", "ShearY", "Rotate"):
        outs = {applied(name, white, seed=seed).tobytes() for seed in range(20)}
        assert len(outs) == 2
        assert all(set(np.unique(np.frombuffer(out, np.uint8))) == {GREY, 255} for out in outs)
    share = (applied("ShearX", white) == GREY).mean()
    assert share == pytest.approx(0.15 / 2, abs=0.005), "a slope of 0.15 uncovers a triangle of 15 % of the width"


def test_cutout_greys_a_square_of_40_pixels() -> None:
    white = np.full((200, 200, 3), 255, np.uint8)
    sizes = [int((applied("Cutout", white, seed=seed)[..., 0] == GREY).sum()) for seed in range(60)]
    assert max(sizes) == 1600 and min(sizes) >= 400


def test_modes_and_sizes_are_kept_and_all_operations_are_drawn() -> None:
    config = RandAugmentConfig(layers=2, magnitude=9)
    for pixels in (COLOUR, COLOUR[..., 0]):
        image = Image.fromarray(pixels)
        outs = [rand_augment(image, config, np.random.default_rng(seed)) for seed in range(200)]
        assert {(out.size, out.mode) for out in outs} == {(image.size, image.mode)}
    drawn = {int(number) for seed in range(200) for number in np.random.default_rng(seed).integers(16, size=2)}
    assert drawn == set(range(16))


def test_the_papers_training_view() -> None:
    config = AugmentConfig(crop=CropConfig(), flip=True, rand_augment=RandAugmentConfig())
    views = [training_view(COLOUR, (32, 32), config, partial(np.random.default_rng, seed)) for seed in (1, 1, 2)]
    assert views[0].shape == (3, 32, 32)
    assert (views[0] == views[1]).all() and (views[0] != views[2]).any()
