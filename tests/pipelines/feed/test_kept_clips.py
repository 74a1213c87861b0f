"""Clips that show whole recordings are decoded once; those that are random each time."""

from typing import Any

import numpy as np
import pytest

from pipelines.features import AudioFeature, LabelFeature, audio
from pipelines.feed.ingest import DataConfig, sample_spec
from pipelines.feed.samples import SampleSpec, make_sample
from pipelines.shards.manifest import Manifest, ShardInfo, Split
from pipelines.shards.reader import RowGroup
from tests.pipelines.recordings import sound_file, tone

RATE = 16_000


def spec(samples: int, clip: dict[str, Any] | None = None, *, keep: bool = True, training: bool = True) -> SampleSpec:
    data = DataConfig.model_validate({"url": "x", "audio": {"rate": RATE, "samples": samples}, "clip": clip or {}})
    return SampleSpec({"audio": AudioFeature(), "label": LabelFeature()}, data, 2, training, False, keep)


@pytest.fixture
def group() -> RowGroup:
    columns = {"audio": [sound_file(tone(440, 1.0, RATE), RATE)], "label": [1]}
    return RowGroup({name: values.__getitem__ for name, values in columns.items()}, 1, 0)


def views(spec: SampleSpec, group: RowGroup, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], int]:
    """Return the clip of three epochs, and how often the sound was decoded."""
    decoded: list[float] = []
    clip = audio.clip
    monkeypatch.setattr(audio, "clip", lambda *given: decoded.append(given[1]) or clip(*given))
    shown = [make_sample(spec, group, 0, lambda seed=n: np.random.default_rng(seed))["audio"] for n in range(3)]
    return shown, len(decoded)


def test_a_whole_recording_is_decoded_once(group: RowGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, times = views(spec(RATE, keep=False), group, monkeypatch)
    assert times == 3 and not group.decoded
    found, times = views(spec(RATE), group, monkeypatch)
    assert times == 1 and len(group.decoded) == 1
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    assert views(spec(RATE, training=False), group, monkeypatch)[1] == 1, "evaluation has clips of its own"
    assert views(spec(RATE - 100, {"jitter": 0}), group, monkeypatch)[1] == 1, "the middle is not random"


def test_a_random_part_is_decoded_each_time(group: RowGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    found, times = views(spec(RATE // 2), group, monkeypatch)
    assert times == 3 and not group.decoded and not np.array_equal(found[0], found[1])
    assert views(spec(RATE, {"jitter": 0.1}), group, monkeypatch)[1] == 3


@pytest.mark.parametrize(("samples", "rows", "kept"), [(RATE, 10, True), (RATE, 10_000, False), (70_000, 10, False)])
def test_clips_are_kept_if_they_are_small_and_the_split_fits(samples: int, rows: int, kept: bool) -> None:
    shard = ShardInfo(name="a.arrow", rows=rows, rows_per_group=rows, bytes=1)
    facts: dict[str, Any] = {"name": "x", "features": {"audio": AudioFeature()}, "licence": "x", "source": "x"}
    manifest = Manifest(**facts, splits={"train": Split(shards=(shard,))})
    data = DataConfig.model_validate({"url": "x", "audio": {"rate": RATE, "samples": samples}})
    assert sample_spec(data, manifest, split="train", training=True).keep_shown == kept
