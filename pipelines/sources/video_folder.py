"""Folders of videos with a folder per class, or with a table of labels. Files are stored unchanged."""

from collections.abc import Mapping, Sequence

from perceiver.storage import Folder
from pipelines.features import AudioFeature, Feature, MediaFeature, VideoFeature
from pipelines.sources._class_folder import ClassFolder
from pipelines.sources._common import choice

KINDS: dict[str, tuple[str, Feature]] = {
    "video": ("video", VideoFeature()),
    "audio": ("audio", AudioFeature()),
    "both": ("media", MediaFeature()),
}


def _probe(folder: Folder, names: Sequence[str], options: Mapping[str, str]) -> tuple[str, Feature]:
    return KINDS[choice(options, "media", KINDS, "video")]


source = ClassFolder(
    name="video_folder",
    title="folders of videos, one folder per class (SRC/CLASS/*.mp4, mkv, webm, avi, mov)",
    suffixes=(".mp4", ".m4v", ".mkv", ".webm", ".avi", ".mov", ".mpg", ".mpeg", ".gif"),
    options=("media",),
    probe=_probe,
)
"""Further option: `media` (video, audio or both; default video): what of a file is shown."""
