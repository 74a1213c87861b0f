"""Folders of images with a folder per class, or with a table of labels. Files are stored unchanged."""

from collections.abc import Mapping, Sequence
from functools import partial

from perceiver.storage import Folder
from pipelines.features import Feature
from pipelines.sources._class_folder import ClassFolder
from pipelines.sources._probe import PROBE, image_feature


def _probe(folder: Folder, names: Sequence[str], options: Mapping[str, str]) -> tuple[str, Feature]:
    files = [partial(folder.fs.open, folder.file(name), "rb") for name in names[:PROBE]]
    return "image", image_feature(options, files)


source = ClassFolder(
    name="image_folder",
    title="folders of images, one folder per class (SRC/CLASS/*.jpg, or SRC/train/CLASS/*.jpg with SRC/test)",
    suffixes=(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    options=("channels",),
    probe=_probe,
)
"""Further option: `channels` (1 or 3; default: as found)."""
