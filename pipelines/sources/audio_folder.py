"""Folders of recordings with a folder per class, or with a table of labels. Files are stored unchanged."""

from collections.abc import Mapping, Sequence

from perceiver.storage import Folder
from pipelines.features import AudioFeature, Feature
from pipelines.sources._class_folder import ClassFolder


def _probe(folder: Folder, names: Sequence[str], options: Mapping[str, str]) -> tuple[str, Feature]:
    return "audio", AudioFeature()


source = ClassFolder(
    name="audio_folder",
    title="folders of recordings, one folder per class (SRC/CLASS/*.wav, flac, ogg, mp3, m4a, ...)",
    suffixes=(".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".aif", ".aiff", ".au"),
    probe=_probe,
)
