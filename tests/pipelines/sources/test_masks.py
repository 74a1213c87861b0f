"""Images with masks, from folders and tables to batches."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perceiver.config import UserError
from pipelines.features import SegmentationFeature
from pipelines.features.base import ViewConfig
from pipelines.transforms import BadSample
from pipelines.transforms.image import AugmentConfig
from pipelines.transforms.mask import IGNORED, Masked, decode_mask, training_view, unpack
from tests.pipelines.raw import write
from tests.pipelines.sources.test_csv import lines
from tests.pipelines.sources.test_layouts import PICTURES, prepared
from tests.pipelines.toys import png

MASK = np.array([[0, 1, 1, 2], [0, 1, 255, 2], [0, 0, 0, 2], [2, 2, 1, 1]], np.uint8)


def grey(mask: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(mask).save(stream, "PNG")
    return stream.getvalue()


def palette(mask: np.ndarray) -> bytes:
    stream, image = io.BytesIO(), Image.fromarray(mask, "P")
    image.putpalette(list(range(255, -1, -1)) * 3)
    image.save(stream, "PNG")
    return stream.getvalue()


def test_folders_of_images_and_masks(tmp_path: Path) -> None:
    files = {f"{split}/images/{i}.png": PICTURES[i] for i in range(4) for split in ("train", "val")}
    files |= {f"{split}/masks/{i}.png": grey(MASK) for i in range(4) for split in ("train", "val")}
    files["train/masks/1.png"] = grey(MASK[:3])
    files["train/masks/2.png"] = grey(MASK + 5)
    files["val/masks/9.png"] = grey(MASK)
    del files["val/masks/3.png"]
    write(tmp_path / "src", files)
    found = prepared(tmp_path, "segmentation_folder", classes="sky,tree,road")
    assert found.samples == {"train": 2, "val": 3} and found.manifest.classes == ("sky", "tree", "road")
    assert found.manifest.features == {"image": SegmentationFeature(channels=3, size=(4, 4))}
    assert found.manifest.statistics["image"].samples == 2
    assert found.rejected == {
        "train/images/1.png": "a mask of 4x3 for an image of 4x4",
        "train/images/2.png": "a mask with the class 5, wanted 0 to 2 or 255",
        "val/images/3.png": "no mask of its name in a folder masks",
        "val/masks/9.png": "a mask without an image in a folder images",
    }
    decoded = unpack(found.rows["val"]["val/images/0.png"]["image"], 3, 100, 3)
    assert np.array_equal(decoded.mask, MASK)


def test_a_column_of_masks(tmp_path: Path) -> None:
    files = {f"{i}.png": PICTURES[i] for i in range(3)} | {"m.png": palette(MASK)}
    rows = ["0.png,m.png", "1.png,", "2.png,m.png"]
    write(tmp_path / "src", files | {"t.csv": lines("image,mask", *rows)})
    found = prepared(tmp_path, "csv", classes="a,b,c", held_out="none")
    assert found.samples == {"train": 2} and found.rejected == {"t.csv#2": "no mask"}
    assert found.manifest.features == {"image": SegmentationFeature(channels=3, size=(4, 4))}


@pytest.mark.parametrize("classes", ["", "one", "a,a"])
def test_masks_need_names_of_classes(tmp_path: Path, classes: str) -> None:
    write(tmp_path / "src", {"images/a.png": PICTURES[0], "masks/a.png": grey(MASK)})
    with pytest.raises(UserError, match="set --option classes="):
        prepared(tmp_path, "segmentation_folder", classes=classes)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_values_of_few_bits_are_classes(bits: int) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    classes = [0, 1, 2**bits - 1, 0, 1, 0, 0, 1]
    row = int("".join(f"{value:0{bits}b}" for value in classes), 2).to_bytes(bits, "big")
    header = struct.pack(">IIBBBBB", 8, 1, bits, 0, 0, 0, 0)
    content = b"".join(
        (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")),
    )
    assert decode_mask(b"\x89PNG\r\n\x1a\n" + content, 100, 16).tolist() == [classes]


def test_masks_of_other_kinds_are_bad_samples() -> None:
    with pytest.raises(BadSample, match="mode RGB"):
        decode_mask(png(np.zeros((4, 4, 3), np.uint8)), 100, 3)
    with pytest.raises(BadSample, match="up to 15 pixels"):
        decode_mask(grey(MASK), 15, 3)
    with pytest.raises(BadSample, match="undecodable"):
        decode_mask(grey(MASK)[:50], 100, 3)


@pytest.mark.parametrize(
    "augment",
    [
        {"flip": True},
        {"shift": 2},
        {"crop": {}},
        {"rotate": 20, "scale": (0.9, 1.1), "shift": 1},
    ],
)
def test_image_and_mask_change_alike(augment: dict[str, object]) -> None:
    """A picture that shows its own mask still does so in any view, but for interpolated borders."""
    mask = np.zeros((32, 32), np.uint8)
    mask[8:20, 5:17] = 1
    picture = (mask * 255)[..., None]
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(20):
        pixels, found = training_view(
            Masked(picture, mask), (32, 32), AugmentConfig.model_validate(augment), lambda: rng
        )
        known = found != IGNORED
        wrong = ((pixels[0] > 127) != (found == 1)) & known
        assert wrong.mean() < 0.03
        seen.add(found.tobytes())
    assert len(seen) > 1


def test_operations_without_a_mask_are_refused() -> None:
    view = ViewConfig.model_validate({"augment": {"rand_augment": {}}})
    with pytest.raises(UserError, match="rand_augment"):
        SegmentationFeature(size=(4, 4)).shapes("image", view, 3)
