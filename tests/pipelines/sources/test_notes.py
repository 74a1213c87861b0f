"""Notes from the soundfont, and moving digits with sounds. The packages come from the cache after the first time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver.config import UserError
from pipelines.features.base import ViewConfig
from pipelines.packages import fetch
from pipelines.sources import Unit, av_digits, notes
from pipelines.sources._soundfont import Note, play, read_font
from pipelines.transforms.audio import AudioViewConfig
from pipelines.transforms.video import VideoViewConfig


@pytest.fixture(scope="module")
def font() -> Any:
    """Return the real soundfont."""
    return notes.soundfont(str(fetch(notes.PACKAGE)))


def pitch(samples: np.ndarray, rate: int, near: float) -> float:
    """Return the strongest frequency within a third of an octave about one."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 1 << 17))
    frequencies = np.fft.rfftfreq(1 << 17, 1 / rate)
    spectrum[(frequencies < near / 1.25) | (frequencies > near * 1.25)] = 0
    return float(frequencies[spectrum.argmax()])


@pytest.mark.parametrize("program", [0, 19, 40, 56, 65, 73])
@pytest.mark.parametrize("key", [48, 60, 73])
def test_notes_sound_at_their_pitch(font: Any, program: int, key: int) -> None:
    wanted = 440 * 2 ** ((key - 69) / 12)
    samples = play(font, Note(0, program, key), 16_000)
    assert samples.shape == (16_000,) and np.abs(samples).max() > 0.02
    # A third of a semitone: real instruments waver.
    assert abs(12 * np.log2(pitch(samples, 16_000, wanted) / wanted)) < 0.35


def test_a_released_key_becomes_silent_and_a_held_one_does_not(font: Any) -> None:
    organ = play(font, Note(0, 19, 60, seconds=2.0, held=1.0), 16_000)
    level = [float(np.sqrt(np.mean(part**2))) for part in np.split(organ, 8)]
    assert min(level[1:4]) > 0.5 * max(level) and level[7] < 0.05 * max(level)
    longer = play(font, Note(0, 19, 60, seconds=6.0, held=6.0), 16_000)
    assert np.sqrt(np.mean(longer[-8000:] ** 2)) > 0.5 * max(level)
    assert not play(font, Note(5, 0, 60), 16_000).any()


def test_the_pitch_is_the_key_and_drums_have_none(font: Any) -> None:
    both = notes.source.listing(None, seed=0, shard_rows=4, options={"label": "both"})
    sample: Any = next(iter(notes.source.samples(next(iter(both.units)))))
    program, key = (int(part) for part in sample["key"].split("/")[2:])
    family: Any = both.features["label_family"]
    assert sample["target"] == [key] and program in notes.FAMILIES[family.classes[sample["label_family"]]]
    assert not any(bank == notes.DRUMS for unit in both.units for bank, *_ in unit.content["notes"])


def test_the_split_holds_out_pitches_of_every_family(font: Any) -> None:
    splits = notes.split_notes(font, 0)
    assert {name: len(places) for name, places in splits.items()} == {"train": 3897, "test": 947}
    keys = {name: {key for _, _, key, _ in places} for name, places in splits.items()}
    assert not keys["train"] & keys["test"]
    for places in splits.values():
        assert {label for *_, label in places} == set(range(10))
    assert len({place[:3] for places in splits.values() for place in places}) == 4844


def test_a_unit_gives_the_same_bytes_each_time(font: Any) -> None:
    unit = Unit("test", {"path": None, "notes": [[0, 0, 60, 0], [128, 0, 36, 9]]})
    first, again = list(notes.source.samples(unit)), list(notes.source.samples(unit))
    assert first == again and [sample["label"] for sample in first] == [0, 9]


def test_other_files_than_soundfonts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.sf2"):
        read_font(b"RIFF" + bytes(100))
    (tmp_path / "x.whl").write_bytes(b"nothing")
    with pytest.raises(UserError, match="pretty_midi"):
        notes.soundfont(str(tmp_path / "x.whl"))


def test_moving_digits_are_lossless_recordings_and_the_same_each_time() -> None:
    listing = av_digits.source.listing(None, seed=3, shard_rows=4, options={})
    units = list(listing.units)
    assert sum(unit.split == "train" for unit in units) == 1000 and len(listing.classes) == 10
    samples = list(av_digits.source.samples(units[0]))
    assert samples == list(av_digits.source.samples(units[0])) and len(samples) == 4
    feature: Any = listing.features["media"]
    view = ViewConfig(video=VideoViewConfig(frames=4, fps=8), audio=AudioViewConfig(rate=16_000, samples=8000))
    for sample in samples:
        assert notes.held_out(int(sample["key"].rsplit("/", 1)[1])) is False
        shown = feature.show("media", feature.decode(sample["media"], view, 10), view, False, None)
        assert shown["video"].shape == (4, 1, 32, 32) and shown["audio"].shape == (8000,)
        # 0 dB: the note and the noise, each of 0.1, make 0.1 * sqrt(2).
        assert (shown["audio"] / 32768).std() == pytest.approx(0.1 * 2**0.5, rel=0.05)
        assert shown["video"].std() > 20 and (shown["video"][0] != shown["video"][1]).any()
    clean = next(iter(av_digits.source.listing(None, seed=3, shard_rows=4, options={"noise": "0"}).units))
    assert clean.content == {**units[0].content, "noise": 0.0}
    for sample in av_digits.source.samples(clean):
        shown = feature.show("media", feature.decode(sample["media"], view, 10), view, False, None)
        assert (shown["audio"] / 32768).std() == pytest.approx(0.1, rel=0.05), "the note alone"
        assert (shown["video"] == 0).mean() > 0.7, "a digit on black"
    for noise in ("", "x", "nan", "-1", "5"):
        with pytest.raises(UserError, match=f"option noise={noise}: wanted a number from 0 to 4"):
            av_digits.source.listing(None, seed=3, shard_rows=4, options={"noise": noise})
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 32), dtype=np.uint8)
    sound = np.random.default_rng(0).integers(-9000, 9000, 8000).astype(np.int16)
    decoded = feature.decode(av_digits.matroska(frames, sound, 8), view, 10)
    back = feature.show("media", decoded, view, False, None)
    assert (back["video"][:, 0] == frames).all() and (back["audio"] == sound).all()
