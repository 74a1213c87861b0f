"""Resizing images by Pillow's bicubic filter, which widens as it shrinks them, so that nothing is aliased."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


def to_pixels(image: Image.Image) -> Pixels:
    """Pixels of a Pillow image as (C, H, W) uint8: a view, since whoever puts a batch together copies them anyway."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def resized(image: Image.Image, size: tuple[int, int], box: Box, *, flip: bool = False) -> Pixels:
    """A box of an image, mode L or RGB, in another size; its pixels as (C, height, width) uint8.

    A box on whole pixels is cut out first, and torch computes the same filter with the processor's vector instructions
    in a third of Pillow's time: the same pixels but for a level or two of 255, or more where a pass is cut off at black
    or white, since Pillow chooses which pass comes first. Any other box is left to Pillow. torch is imported at the
    first box that needs it.

    Args:
        image: mode L or RGB.
        size: (height, width) wanted.
        box: what is shown, inside the image.
        flip: mirror left and right.
    """
    height, width = size
    left, top, right, bottom = map(int, box)
    whole = (left, top, right, bottom)
    if (image.size, box) != ((width, height), (0, 0, width, height)):
        if box == whole:
            return _resized_by_torch(image.crop(whole), size, flip)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return to_pixels(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image)


def _resized_by_torch(image: Image.Image, size: tuple[int, int], flip: bool) -> Pixels:
    import torch
    from torch.nn.functional import interpolate

    shown = np.array(image)
    pixels = torch.from_numpy(shown.reshape(*shown.shape[:2], -1)).permute(2, 0, 1)[None]
    pixels = interpolate(pixels, size, mode="bicubic", antialias=True)[0]
    return (pixels.flip(2) if flip else pixels).numpy()
