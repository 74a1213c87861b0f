"""The assumed CPU time of a sample: by stored bytes, and by frames where `prepare` stored videos at a size."""

from typing import Any

import pytest

from cluster.capacity.decoding import by_bytes, of_prepared
from pipelines.features.base import ViewConfig
from pipelines.shards.manifest import Manifest


def prepared(stored: dict[str, Any], size: tuple[int, int] | None = (256, 456)) -> Manifest:
    shard = {"name": "train.arrow", "rows": 1, "rows_per_group": 1, "bytes": 610, "batches": [[168, 232, 1, 0]]}
    return Manifest.model_validate(
        {
            "name": "clips",
            "features": {"video": {"kind": "media", "size": size}},
            "splits": {"train": {"shards": [shard]}},
            "licence": "",
            "source": "",
            "stored": stored,
        }
    )


def view(**clip: Any) -> ViewConfig:
    video = {"frames": 32, "fps": 25, "size": [224, 224], "augment": {"colour": {"probability": 0.5}}}
    return ViewConfig.model_validate({"video": video, "clip": clip})


def test_videos_as_they_came_take_time_by_their_bytes() -> None:
    assert of_prepared(prepared({}), view(), 4e5) == pytest.approx(50e-6 + 4e5 * 250e-9) == by_bytes(["media"], 4e5)


def test_the_time_of_stored_videos_follows_from_their_frames() -> None:
    stored, shown = 256 * 456, 224 * 224
    found = of_prepared(prepared({"resize": 256, "fps": 10}), view(), 4e5)
    decoded = (1.28 + 0.5) * (31 + 10 * 1.05) * stored
    assert found == pytest.approx(7e-3 + 1e-9 * (decoded + 14 * (1.8 * stored + (8 + 0.5 * 18) * shown)))
    assert of_prepared(prepared({"resize": 256, "fps": 10}), view(), 1e3) == found, "whatever their bytes"


def test_fewer_frames_take_less_and_unknown_sizes_are_assumed_wide() -> None:
    times = [of_prepared(prepared({"resize": 256, "fps": fps}), view(), 4e5) for fps in (10, 12.5, 25, None)]
    assert times == sorted(times)
    wide = of_prepared(prepared({"resize": 256, "fps": 10}, size=None), view(), 4e5)
    assert wide == pytest.approx(times[0], rel=0.01)


def test_sound_alone_takes_time_by_its_bytes() -> None:
    assert of_prepared(prepared({"resize": 256}), view(show="audio"), 4e5) == by_bytes(["media"], 4e5)
