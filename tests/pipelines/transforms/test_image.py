"""Images: any damage is a BadSample, any mode is converted, views match their names."""

import io
import math
import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from pydantic import ValidationError

from pipelines.features import ImageFeature
from pipelines.features.base import ViewConfig
from pipelines.transforms import BadSample
from pipelines.transforms.decode import decode_image, to_picture
from pipelines.transforms.image import (
    AugmentConfig,
    CropConfig,
    affine_coefficients,
    centred_box,
    crop_box,
    evaluation_view,
    shifted,
    training_view,
)
from pipelines.transforms.resize import resized
from tests.pipelines.toys import png

COLOUR = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """Encode a Pillow image."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_lossless_images_come_back() -> None:
    assert (decode_image(png(COLOUR), 3) == COLOUR).all()
    assert (decode_image(png(COLOUR[..., 0]), 1) == COLOUR[..., :1]).all()


def test_every_mode_becomes_the_wanted_one() -> None:
    image = Image.fromarray(COLOUR)
    grey16 = Image.fromarray(COLOUR[..., 0].astype(np.uint16) * 257)
    encoded = [
        saved(image.convert("CMYK"), "JPEG"),
        saved(image.convert("P"), "PNG"),
        saved(image.convert("1"), "PNG"),
        saved(image.convert("LA"), "PNG"),
        saved(image.convert("RGBA"), "PNG"),
        saved(grey16, "PNG"),
        saved(image, "GIF"),
        saved(image, "WEBP"),
    ]
    for data in encoded:
        assert decode_image(data, 3).shape == (12, 10, 3)
        assert decode_image(data, 1).shape == (12, 10, 1)
    assert (decode_image(encoded[5], 1) == COLOUR[..., :1]).all()


def test_alpha_is_composited_over_white() -> None:
    clear = Image.fromarray(np.zeros((4, 4, 4), np.uint8), "RGBA")
    assert (decode_image(saved(clear, "PNG"), 3) == 255).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"progressive": True},
        {"keep_rgb": True},
        {"quality": 30},
        {"restart_marker_rows": 1},
    ],
)
def test_jpegs_are_decoded_as_by_pillow(options: dict[str, object], channels: int) -> None:
    """Both decoders give the same."""
    smooth = Image.fromarray(COLOUR).resize((75, 43))
    for image in (smooth, smooth.convert("L"), smooth.convert("CMYK")):
        if image.mode != "RGB" and "keep_rgb" in options:
            continue
        data = saved(image, "JPEG", **options)
        seen = Image.open(io.BytesIO(data)).convert("L" if channels == 1 else "RGB")
        assert (decode_image(memoryview(data), channels) == np.asarray(seen).reshape(43, 75, channels)).all()


def test_exif_rotation_is_applied() -> None:
    """Each orientation of a camera; a JPEG's is read by us, the others' by Pillow."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("JPEG", "PNG", "TIFF"):
            data = saved(Image.fromarray(COLOUR), kind, exif=exif)
            upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
            assert (decode_image(data, 3) == np.asarray(upright)).all(), (kind, orientation)


def test_an_orientation_that_only_xmp_knows_is_seen() -> None:
    exif = Image.Exif()
    exif[0x010F] = "a camera's maker"
    data = saved(Image.fromarray(COLOUR), "JPEG", exif=exif, xmp=b'<x tiff:Orientation="6"/>')
    assert decode_image(data, 3).shape == (10, 12, 3)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0no TIFF header",
        b"Exif\0\0MM\0*\0\0\0\x08\0\xff\x01\x12",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x05\0\0\0\x01\0\0\0\0\0\0",
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_metadata_that_cannot_be_read_costs_no_image(kind: str, exif: bytes, recwarn: pytest.WarningsRecorder) -> None:
    assert decode_image(saved(Image.fromarray(COLOUR), kind, exif=exif), 3).shape == COLOUR.shape
    assert not recwarn.list


def test_damage_that_pillow_reads_over_is_no_bad_sample() -> None:
    """Scanned and re-saved archives often have it; Pillow decides."""
    data = saved(Image.fromarray(COLOUR).resize((64, 64)), "JPEG")
    place = data.index(b"\xff\xda") + 40
    for bad in (
        data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :],
        data + b"trailing bytes",
        data[:20] + b"ab" + data[20:],
    ):
        assert (decode_image(bad, 3) == np.asarray(Image.open(io.BytesIO(bad)).convert("RGB"))).all()


def _huge_png() -> bytes:
    """Return a file of 60 bytes that claims 100,000 x 100,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
        + (struct.pack(">I", 4) + b"IDAT" + bytes(8))
    )


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "0 bytes"),
        (b"<html>not found</html>", "cannot identify"),
        (saved(Image.fromarray(COLOUR), "JPEG")[:-60], "undecodable"),
        (png(COLOUR)[:-50], "undecodable"),
        (png(COLOUR)[:100] + b"\0\0\0\0" + png(COLOUR)[104:], "undecodable"),
        (_huge_png(), "more than 100000000 pixels"),
    ],
)
def test_damage_is_a_bad_sample(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        decode_image(data, 3)


def test_without_augmentation_nothing_changes() -> None:
    rng = np.random.default_rng(0)
    assert (training_view(COLOUR, (12, 10), AugmentConfig(), lambda: rng) == COLOUR.transpose(2, 0, 1)).all()
    assert (evaluation_view(COLOUR, (12, 10), 0.875) == COLOUR.transpose(2, 0, 1)).all()


def test_shift_moves_whole_pixels_and_zeros_in() -> None:
    pixels = np.arange(1, 13, dtype=np.uint8).reshape(1, 3, 4)
    assert shifted(pixels, 1, -1)[0].tolist() == [[0, 0, 0, 0], [2, 3, 4, 0], [6, 7, 8, 0]]
    assert shifted(pixels, -2, 2)[0].tolist() == [[0, 0, 9, 10], [0, 0, 0, 0], [0, 0, 0, 0]]
    views = {
        training_view(pixels[0, ..., None], (3, 4), AugmentConfig(shift=1), partial(np.random.default_rng, i)).tobytes()
        for i in range(200)
    }
    assert views == {shifted(pixels, down, right).tobytes() for down in (-1, 0, 1) for right in (-1, 0, 1)}


def test_flip_mirrors_half_of_the_time() -> None:
    config = AugmentConfig(flip=True)
    views = [training_view(COLOUR, (12, 10), config, partial(np.random.default_rng, i)) for i in range(400)]
    flipped = [bool((view == COLOUR.transpose(2, 0, 1)).all()) for view in views]
    assert 150 < sum(flipped) < 250
    other = training_view(COLOUR, (12, 10), config, partial(np.random.default_rng, flipped.index(False)))
    assert (other == COLOUR[:, ::-1].transpose(2, 0, 1)).all()


def test_affine_turns_zooms_and_shifts_about_the_centre() -> None:
    """Checked by where a dot ends: Pillow samples output (x, y) from the input at the transformed place."""
    config = AugmentConfig(rotate=30, scale=(0.8, 1.25), shear=10, shift=3)
    for seed in range(20):
        a, b, c, d, e, f = affine_coefficients((40, 60), config, np.random.default_rng(seed))
        zoom = 1 / math.sqrt(a * e - b * d)
        assert 0.8 <= zoom <= 1.25
        assert abs(math.degrees(math.atan2(-d, e))) <= 30
        inverse = np.linalg.inv(np.array([[a, b], [d, e]]))
        moved = inverse @ (np.array([30 - c, 20 - f])) - np.array([30, 20])
        assert (abs(moved) <= 3 + 1e-9).all()


def test_affine_keeps_a_centred_disc() -> None:
    y, x = np.mgrid[:41, :41] - 20
    disc = np.where(x * x + y * y < 100, 200, 0).astype(np.uint8)
    view = training_view(disc[..., None], (41, 41), AugmentConfig(rotate=180), partial(np.random.default_rng, 3))
    assert abs(view[0].astype(int) - disc).mean() < 4


def test_crop_boxes_have_the_wanted_area_and_aspect() -> None:
    config = CropConfig(area=(0.2, 0.5), aspect=(0.75, 1.3333))
    for seed in range(300):
        left, top, right, bottom = crop_box(100, 150, config, np.random.default_rng(seed))
        assert 0 <= left < right <= 150 and 0 <= top < bottom <= 100
        area, aspect = (right - left) * (bottom - top) / 15_000, (right - left) / (bottom - top)
        assert 0.19 < area < 0.52 and 0.72 < aspect < 1.38
    assert crop_box(10, 1000, CropConfig(area=(1, 1)), np.random.default_rng(0)) == (495, 0, 505, 10)


def test_crop_boxes_are_drawn_as_the_released_pipeline_draws_them() -> None:
    """At 500 x 375 TensorFlow's boxes keep 0.390 of the area on average, torchvision's 0.435."""

    def boxes(height: int, width: int, config: CropConfig, count: int = 6000) -> np.ndarray:
        rng = np.random.default_rng(0)
        return np.array([crop_box(height, width, config, rng) for _ in range(count)])

    def share(found: np.ndarray) -> np.ndarray:
        return (found[:, 2] - found[:, 0]) * (found[:, 3] - found[:, 1]) / (375 * 500)

    side = boxes(375, 500, CropConfig(draw="side"))
    assert share(side).mean() == pytest.approx(0.390, abs=0.008)
    assert share(boxes(375, 500, CropConfig())).mean() == pytest.approx(0.435, abs=0.008)
    assert share(side).min() >= 0.1 and share(boxes(375, 500, CropConfig(draw="side", covered=0))).min() < 0.09
    wide, tall = side[:, 2] - side[:, 0], side[:, 3] - side[:, 1]
    assert (side >= 0).all() and side[:, 2].max() <= 500 and side[:, 3].max() <= 375
    assert side[wide < 500, 2].max() < 500 and side[tall < 375, 3].max() < 375, "the last offset is never drawn"
    assert np.abs(wide - np.clip(wide / tall, 3 / 4, 4 / 3) * tall).max() <= 0.5 + 1e-9, "the width is rounded"
    # No box fits, or all of the image is kept: the evaluation crop.
    assert crop_box(10, 1000, CropConfig(draw="side"), np.random.default_rng(0)) == (496, 1, 504, 9)
    whole = CropConfig(draw="side", area=(1, 1), aspect=(1, 1))
    assert crop_box(64, 64, whole, np.random.default_rng(0)) == (4, 4, 60, 60)


def test_the_evaluation_crop_is_the_central_share_of_the_shorter_side() -> None:
    image = np.zeros((256, 400, 3), np.uint8)
    image[16:240, 88:312] = 255
    assert (evaluation_view(image, (224, 224), 224 / 256) == 255).all()
    assert evaluation_view(image, (50, 100), 1.0).shape == (3, 50, 100)


def test_boxes_are_on_the_papers_pixels() -> None:
    """The side is rounded down to whole pixels; an odd rest puts one pixel more before the crop than after it."""
    for height, width, side in ((375, 500, 328), (256, 256, 224), (333, 500, 291), (8, 1000, 7), (1, 3, 1)):
        left, top, right, bottom = centred_box(height, width, (224, 224), 224 / 256)
        assert right - left == bottom - top == side
        assert (top, left) == ((height - side + 1) // 2, (width - side + 1) // 2)
    assert centred_box(100, 150, (50, 100), 1.0) == (0, 13, 150, 88)
    for height in range(1, 300):
        assert centred_box(height, height, (224, 224), 1.0) == (0, 0, height, height)


def test_the_same_generator_gives_the_same_view() -> None:
    config = AugmentConfig(crop=CropConfig(), flip=True, rotate=10, shift=2)
    views = [training_view(COLOUR, (8, 8), config, partial(np.random.default_rng, seed)) for seed in (1, 1, 2)]
    assert (views[0] == views[1]).all() and (views[0] != views[2]).any()


def test_ranges_out_of_order_are_refused() -> None:
    with pytest.raises(ValidationError, match="low <= high"):
        AugmentConfig(scale=(1.1, 0.9))
    for wrong in ({"area": (0.5, 0.2)}, {"area": (0, 1)}, {"area": (0.5, 1.5)}, {"aspect": (-1, 2)}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            CropConfig.model_validate(wrong)
    with pytest.raises(ValidationError, match="greater than 0"):
        ViewConfig(image_size=(0, 32))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_resized_box_is_pillows_but_for_rounding(mode: str) -> None:
    """Noise without black and white, where each pass is clipped and Pillow chooses the first axis."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(80, 176, (60, 80, 3), np.uint8)).convert(mode)
    for seed in range(60):
        left, top, right, bottom = box = crop_box(60, 80, CropConfig(), np.random.default_rng(seed))
        height, width = map(int, rng.integers(1, 120, 2))
        pillow = noise.crop((left, top, right, bottom)).resize((width, height), Image.Resampling.BICUBIC)
        ours = resized(to_picture(noise), (height, width), box)
        assert ours.shape == (len(noise.getbands()), height, width) and ours.dtype == np.uint8
        difference = abs(ours.astype(int) - to_picture(pillow).transpose(2, 0, 1))
        assert difference.max() <= 2 and (difference > 1).mean() < 0.01
        assert (resized(to_picture(noise), (height, width), box, flip=True) == ours[:, :, ::-1]).all()


def test_images_are_resized_by_torch_only_where_it_is_imported_early() -> None:
    stored, free = ImageFeature(channels=3, size=(28, 28)), ImageFeature(channels=3)
    assert stored.imports(ViewConfig()) == () == stored.imports(ViewConfig(image_size=(28, 28)))
    assert stored.imports(ViewConfig(image_size=(14, 14))) == ("torch",) == free.imports(ViewConfig(image_size=(9, 9)))
    assert stored.imports(ViewConfig(augment=AugmentConfig(crop=CropConfig()))) == ("torch",)


def test_transforms_know_neither_ray_nor_torch() -> None:
    """Except resizing, which imports torch at its first use: see tests/test_architecture.py."""
    folder = Path(__file__).parents[3] / "pipelines"
    for name in (
        "transforms/image.py",
        "features/image.py",
        "feed/samples.py",
        "shards/reader.py",
        "order/plan.py",
        "shards/manifest.py",
        "prepare.py",
    ):
        text = (folder / name).read_text()
        assert "import torch" not in text and "\nimport ray" not in text, name


@pytest.mark.parametrize("side", [56, 29, 20])
@pytest.mark.parametrize("augment", [{}, {"flip": True}, {"shift": 2, "rotate": 10, "scale": [0.9, 1.1]}])
def test_without_random_crops_evaluation_shows_what_training_shows(side: int, augment: dict[str, object]) -> None:
    """Grey pictures of 56 x 56 were once trained on whole and evaluated by their inner 87.5 %."""
    picture = np.random.default_rng(side).integers(0, 256, (side, side + 4, 1), dtype=np.uint8)
    view = ViewConfig.model_validate({"image_size": [28, 28], "augment": augment})
    still = view.model_copy(update={"augment": AugmentConfig()})
    seen, judged = (
        ImageFeature(channels=1).show("image", picture, shown, training, partial(np.random.default_rng, 0))["image"]
        for shown, training in ((still, True), (view, False))
    )
    assert (seen == judged).all()


def test_the_share_that_evaluation_shows_follows_the_random_crop() -> None:
    crop = {"augment": {"crop": {}}}
    assert ViewConfig().eval_crop == 1.0
    assert ViewConfig.model_validate(crop).eval_crop == 0.875
    assert ViewConfig.model_validate({"video": crop}).eval_crop == 0.875
    assert ViewConfig.model_validate({**crop, "eval_crop": 0.9}).eval_crop == 0.9
    assert ViewConfig.model_validate(ViewConfig().model_dump(mode="json")).eval_crop == 1.0
