"""Data without the inputs of the model are refused, naming both keys of the recipe."""

from typing import Any

import pytest

from cluster.recipe.inputs import check_inputs
from perceiver.config import UserError
from perceiver.factory import model_config
from pipelines.features import (
    AudioFeature,
    Feature,
    FlowFeature,
    ImageFeature,
    LabelFeature,
    MediaFeature,
    PointsFeature,
    SeriesFeature,
    TextFeature,
    VideoFeature,
)
from pipelines.features.base import ViewConfig
from pipelines.feed.ingest import DataConfig
from pipelines.shards.manifest import Manifest, ShardInfo, Split
from pipelines.transforms.audio import AudioViewConfig
from pipelines.transforms.video import VideoViewConfig

MEL = {"kind": "mel", "samples": 16_000, "rate": 16_000, "high": 7000}
VIDEO = {"kind": "video", "frames": 8, "size": [32, 32]}
DATA: dict[str, Any] = {
    "url": "data/x",
    "audio": AudioViewConfig(rate=16_000, samples=16_000),
    "video": VideoViewConfig(frames=8, size=(32, 32)),
}
BOTH = {"kind": "multimodal", "modalities": {"sound": MEL, "video": VIDEO}}


def check(feature: Feature, inputs: dict[str, Any], trained: bool = False, **changes: Any) -> None:
    """Check a model with these inputs against data of one feature."""
    data = DataConfig(**{**DATA, **changes})
    splits = {"train": Split(shards=(ShardInfo(name="a", rows=1, rows_per_group=1, bytes=9),))}
    features = {"x": feature, "label": LabelFeature()}
    manifest = Manifest(name="x", features=features, splits=splits, licence="", source="")
    kind = feature.kind if feature.kind in ("image", "audio", "text", "video", "points", "series") else "x"
    shapes = {
        key: shape
        for key, (shape, _) in feature.shapes(
            kind, ViewConfig(audio=data.audio, video=data.video, clip=data.clip), 0
        ).items()
    }
    check_inputs(model_config({"kind": "perceiver", "inputs": inputs}), shapes, data, manifest, trained=trained)


def test_matching_data_pass() -> None:
    check(AudioFeature(), MEL)
    check(MediaFeature(), BOTH)
    check(ImageFeature(channels=3, size=(8, 8)), {"kind": "image", "size": [8, 8]})


@pytest.mark.parametrize(
    "feature, inputs, changes, reason",
    [
        (ImageFeature(channels=3, size=(8, 8)), MEL, {}, "model.inputs.kind = 'mel'.* 'audio'.*data/x"),
        (AudioFeature(), BOTH, {}, "modalities.video.kind = 'video'.*data/x .* x, label"),
        (AudioFeature(), {**MEL, "samples": 8000}, {}, "model.inputs.samples = 8000.*data.audio.samples = 16000"),
        (AudioFeature(), {**MEL, "rate": 48_000}, {}, "model.inputs.rate = 48000.*data.audio.rate = 16000"),
        (MediaFeature(channels=1), BOTH, {}, "modalities.video.channels = 3.*data/x .* 1"),
        (
            MediaFeature(),
            BOTH,
            {"video": VideoViewConfig(frames=4, size=(32, 32))},
            r"modalities.video .*frames = 8 .*size = \[32, 32\].*data.video .*4 frames of 32 x 32",
        ),
        (PointsFeature(features=3), {"kind": "points"}, {}, "0 features.*data/x have 6 columns: set .*features to 3"),
        (SeriesFeature(length=9), {"kind": "series"}, {}, "inputs.length = 128.* 9 steps: set it to 9"),
        (SeriesFeature(channels=2, length=128), {"kind": "series"}, {}, "channels = 1.* have 2: set it to 2"),
        (PointsFeature(), {"kind": "points", "features": 3}, {}, "3 features.*3 columns: set .*features to 0"),
        (ImageFeature(channels=1, size=(8, 8)), {"kind": "image", "size": [8, 8]}, {}, "model.inputs.channels = 3"),
        (ImageFeature(channels=3, size=(9, 8)), {"kind": "image", "size": [8, 8]}, {}, r"data.image_size .*\[8, 8\]"),
        (
            FlowFeature(size=(16, 16)),
            {"kind": "flow_frames", "size": [16, 16]},
            {"flow": {"eval_size": [16, 12]}},
            r"eval_size = \[16, 12\] is smaller than the model's 16 x 16",
        ),
    ],
)
def test_other_data_are_refused(feature: Feature, inputs: Any, changes: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check(feature, inputs, **changes)


@pytest.mark.parametrize(
    "feature, inputs, changes, fix",
    [
        (ImageFeature(channels=1, size=(8, 8)), {"kind": "image", "size": [8, 8]}, {}, "--option channels=3"),
        (
            ImageFeature(channels=3, size=(9, 8)),
            {"kind": "image", "size": [8, 8]},
            {},
            r"set data.image_size to \[8, 8\]$",
        ),
        (AudioFeature(), {**MEL, "samples": 8000}, {}, "set data.audio.samples to 8000$"),
        (AudioFeature(), {**MEL, "rate": 48_000}, {}, "set data.audio.rate to 48000$"),
        (TextFeature(), {"kind": "text", "length": 64}, {}, "set data.text_length to 64$"),
        (VideoFeature(channels=1), VIDEO, {}, "use data with as many$"),
        (VideoFeature(), {**VIDEO, "frames": 4}, {}, "set data.video to the same$"),
        (PointsFeature(features=3), {"kind": "points"}, {}, "--option features=0"),
        (FlowFeature(channels=1, size=(16, 16)), {"kind": "flow_frames", "size": [16, 16]}, {}, "with as many$"),
    ],
)
def test_of_a_trained_model_only_the_data_can_change(feature: Feature, inputs: Any, changes: Any, fix: str) -> None:
    """The advice was once to set model.inputs.channels of a model with its weights."""
    with pytest.raises(UserError, match=fix) as caught:
        check(feature, inputs, trained=True, **changes)
    assert "set model." not in str(caught.value) and "set it" not in str(caught.value)


def test_a_model_that_resizes_accepts_any_size() -> None:
    small = {"kind": "image", "channels": 1, "size": [6, 6], "mean": [0.5], "std": [0.3]}
    images = ImageFeature(channels=1, size=(12, 12))
    check(images, {**small, "resize": True})
    with pytest.raises(UserError, match=r"model.inputs.size = \[6, 6\]"):
        check(images, small)
