"""Clips with several weak labels. The packages come from the cache after the first time."""

from typing import Any

import numpy as np
import pytest

from perceiver.config import UserError
from pipelines.features.base import ViewConfig
from pipelines.sources import Unit, digits, notes, weak_av
from pipelines.sources.av_digits import packages
from pipelines.transforms.audio import AudioViewConfig
from pipelines.transforms.video import VideoViewConfig

VIEW = ViewConfig(video=VideoViewConfig(frames=8, fps=4), audio=AudioViewConfig(rate=16_000, samples=32_000))


def test_train_has_a_long_tail_and_test_has_none() -> None:
    counts: dict[str, np.ndarray] = {}
    for split in ("train", "test"):
        rng = np.random.default_rng(0)
        clips = [weak_av.draw_events(split, rng) for _ in range(2000)]
        events = [event for clip in clips for event in clip]
        assert {len(clip) for clip in clips} == {1, 2, 3}
        assert all(event.heard or event.seen for event in events)
        assert all(len({event.label for event in clip}) == len(clip) for clip in clips)
        # 0.85 and 0.5, where those with neither (0.075) are drawn again.
        assert np.mean([event.heard for event in events]) == pytest.approx(0.85 / 0.925, abs=0.02)
        assert np.mean([event.seen for event in events]) == pytest.approx(0.5 / 0.925, abs=0.03)
        counts[split] = np.bincount([event.label for event in events], minlength=10) / len(clips)
    assert counts["train"][0] > 0.6 and counts["train"][9] < 0.09
    assert counts["test"].max() < 0.24 and counts["test"].min() > 0.16


def test_clips_are_the_same_each_time_and_made_of_parts_of_their_split() -> None:
    listing = weak_av.source.listing(
        None, seed=3, shard_rows=6, options={"clips": "12", "held_out": "6", "validation": "6"}
    )
    units = list(listing.units)
    assert [unit.split for unit in units] == ["train", "train", "test", "val"] and len(listing.classes) == 10
    rows = digits.stratified_split(digits.read_archive(packages(None)[0])[1], 3)
    feature: Any = listing.features["media"]
    for unit in units[1:]:
        samples = list(weak_av.source.samples(unit))
        assert samples == list(weak_av.source.samples(unit)) and len(samples) == 6
        for sample in samples:
            parts = [part for event in sample["key"].split("/")[3].split(",") for part in event.split("+")]
            for part in parts:
                number = int(part.rsplit(".", 1)[1])
                held = notes.held_out(number) if part.startswith("TimGM6mb") else number in rows["test"]
                assert held == (unit.split == "test")
            shown = feature.show("media", feature.decode(sample["media"], VIEW, 10), VIEW, False, None)
            assert shown["video"].shape == (8, 1, 32, 32) and shown["audio"].shape == (32_000,)
            assert 1 <= len(sample["label"]) <= 3


def test_an_event_fills_a_part_of_the_clip() -> None:
    parts = weak_av.split_parts(Unit("test", {"src": None, "seed": 0}))
    sound, frames = np.zeros(weak_av.SAMPLES), np.zeros((8, 32, 32))
    for label in range(10):
        rng, alone, seen = np.random.default_rng(label), sound.copy(), frames.copy()
        weak_av.add_note(alone, parts.font, parts.notes[label][0], rng)
        weak_av.add_digit(seen, parts.images[parts.rows[label][0]], rng)
        inside = np.flatnonzero(alone)
        seconds = (inside[-1] - inside[0]) / notes.RATE
        assert 0.05 < seconds <= 0.8 and 3 <= seen.any((1, 2)).sum() <= 8
        # 0 dB over the whole note, less its end.
        assert 0.5 < np.sqrt((alone**2).sum() / (0.6 * notes.RATE)) / weak_av.LOUDNESS < 1.3


def test_a_number_of_clips_is_a_number() -> None:
    with pytest.raises(UserError, match="clips=few"):
        weak_av.source.listing(None, seed=0, shard_rows=6, options={"clips": "few"})
