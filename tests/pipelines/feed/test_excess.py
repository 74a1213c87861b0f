"""What is not shown of long samples is reported once, with its share."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver.storage import open_folder
from pipelines.features import AudioFeature, Feature, TextFeature
from pipelines.features.base import ViewConfig
from pipelines.feed.excess import describe_excess
from pipelines.feed.ingest import DataConfig
from pipelines.shards.arrow import ShardWriter
from pipelines.shards.manifest import Manifest, Split, arrow_schema, load_manifest, save_manifest
from tests.pipelines.recordings import media_file, ramp, sound_file


def prepared(folder: Path, feature: Feature, name: str, values: list[Any]) -> Manifest:
    """Write a data set of one feature, in row groups of five."""
    target, features = open_folder(str(folder)), {name: feature}
    with ShardWriter(target, "a.arrow", arrow_schema(features), 5) as writer:
        writer.write([{"key": str(number), name: value} for number, value in enumerate(values)])
        shard = writer.close()
    assert shard is not None
    splits = {"train": Split(shards=(shard,))}
    save_manifest(Manifest(name="x", features=features, splits=splits, licence="", source=""), target)
    return load_manifest(str(folder))


def test_texts_that_are_cut(tmp_path: Path) -> None:
    """A text of 14 bytes and its two special tokens fits into 16; bytes count, not characters."""
    manifest = prepared(tmp_path, TextFeature(), "text", ["a" * 14, "a" * 15, "ä" * 8, "", "b"] * 4)
    found = describe_excess(DataConfig(url=str(tmp_path), text_length=16), manifest, "train")
    assert len(found) == 1 and "50% of train" in found[0] and "data.text_length = 16" in found[0]
    assert not describe_excess(DataConfig(url=str(tmp_path), text_length=18), manifest, "train")


@pytest.mark.parametrize("clips, reported", [(1, True), (2, False)])
def test_recordings_longer_than_the_clips_of_an_evaluation(clips: int, reported: bool, tmp_path: Path) -> None:
    sounds = [sound_file(np.zeros(round(8000 * seconds), np.int16), 8000) for seconds in (0.5, 1.0, 2.0, 2.0, 1.5)]
    manifest = prepared(tmp_path, AudioFeature(), "audio", sounds)
    view = {"audio": {"rate": 8000, "samples": 8000}, "clip": {"eval_clips": clips}}
    found = describe_excess(DataConfig.model_validate({"url": str(tmp_path), **view}), manifest, "train")
    assert bool(found) == reported
    if reported:
        assert "60% of train" in found[0] and "data.clip.eval_clips" in found[0]


def test_a_recording_of_both_is_measured_by_what_is_shown() -> None:
    from pipelines.features import MediaFeature

    feature = MediaFeature(channels=1, size=(32, 32))
    stored = media_file([40 * i for i in range(50)], [0] * 50, sound=ramp(2, 16_000))
    for show, exceeds in (("both", False), ("video", False), ("audio", True)):
        view = ViewConfig.model_validate(
            {"video": {"frames": 50}, "audio": {"rate": 16_000, "samples": 16_000}, "clip": {"show": show}}
        )
        assert feature.exceeds(feature.decode(stored, view, 0), view) == exceeds


def test_images_are_not_looked_at(tmp_path: Path) -> None:
    from tests.pipelines.toys import write_images

    assert not describe_excess(DataConfig(url=str(tmp_path)), write_images(tmp_path, {"train": [5]}), "train")
