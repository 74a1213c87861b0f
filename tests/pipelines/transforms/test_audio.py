"""Sound: stored form, rates, channels, clips, damage."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pipelines.features import AudioFeature
from pipelines.features.base import ViewConfig
from pipelines.transforms import BadSample
from pipelines.transforms.audio import AudioViewConfig, Sound
from pipelines.transforms.clip import ClipConfig, clip_starts
from pipelines.transforms.media import Media
from tests.pipelines.recordings import media_file, ramp, sound_file, tone

FEATURE = AudioFeature()


def no_rng() -> np.random.Generator:
    """Fail the test: for views without randomness."""
    raise AssertionError("nothing here is random")


def seeded(seed: int) -> Callable[[], np.random.Generator]:
    """Return one sample's generator."""
    return functools.cache(functools.partial(np.random.default_rng, seed))


def view(rate: int = 16_000, samples: int = 16_000, channel: int | None = None, **clip: Any) -> ViewConfig:
    """Return a view of so many samples."""
    return ViewConfig(audio=AudioViewConfig(rate=rate, samples=samples, channel=channel), clip=ClipConfig(**clip))


def shown(stored: bytes, how: ViewConfig, training: bool = False, seed: int = 0) -> np.ndarray:
    """Return what a batch gets."""
    decoded = FEATURE.decode(stored, how, 0)
    return np.asarray(FEATURE.show("audio", decoded, how, training, seeded(seed) if training else no_rng)["audio"])


def frequency(samples: np.ndarray, rate: int) -> float:
    """Return the loudest frequency."""
    return float(np.abs(np.fft.rfft(samples * np.hanning(len(samples)))).argmax()) * rate / len(samples)


@pytest.mark.parametrize("kind, subtype", [("FLAC", None), ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("AIFF", "PCM_24")])
def test_lossless_samples_come_through_unchanged(kind: str, subtype: str | None) -> None:
    samples = ramp(1, 16_000)
    stored: Any = samples if subtype != "FLOAT" else samples.astype(np.float32) / 32768
    got = shown(sound_file(stored, 16_000, kind, subtype), view())
    assert got.dtype == np.int16 and (got == samples).all()


@pytest.mark.parametrize("kind, subtype", [("OGG", "VORBIS"), ("MP3", None), ("FLAC", None)])
@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_other_rates_and_formats_keep_pitch_and_loudness(kind: str, subtype: str | None, rate: int) -> None:
    got = shown(sound_file(tone(440, 1.5, rate), rate, kind, subtype), view())
    assert len(got) == 16_000 and frequency(got, 16_000) == pytest.approx(440, abs=2)
    assert np.abs(got[2000:-2000]).max() == pytest.approx(16384, rel=0.03 if kind == "FLAC" else 0.12)


def test_containers_that_libsndfile_does_not_know_are_read_by_ffmpeg() -> None:
    sound = ramp(2, 16_000)
    stored = media_file([0, 1000], [1, 2], sound=sound)
    decoded = FEATURE.decode(stored, view(), 0)
    assert isinstance(decoded, Media)
    assert (shown(stored, view()) == sound[8000:24_000]).all()
    assert isinstance(FEATURE.decode(sound_file(sound, 16_000), view(), 0), Sound)
    assert frequency(
        shown(
            media_file([0], [1], sound=(tone(440, 2, 16_000) * 32767).astype(np.int16)), view(rate=8_000, samples=8_000)
        ),
        8_000,
    ) == pytest.approx(440, abs=2)


def test_channels_are_mixed_or_chosen() -> None:
    left, right = np.full(1600, 8000, np.int16), np.full(1600, -2000, np.int16)
    stored = sound_file(np.stack([left, right], 1), 16_000)
    assert (shown(stored, view(samples=1600)) == 3000).all()
    assert (shown(stored, view(samples=1600, channel=1)) == -2000).all()
    with pytest.raises(BadSample, match="channel 2 of 2 is missing"):
        shown(stored, view(samples=1600, channel=2))


def test_short_recordings_end_in_silence_and_long_ones_show_their_middle() -> None:
    sound = ramp(1, 16_000) + np.int16(1)
    short = shown(sound_file(sound[:4000], 16_000), view())
    assert (short[:4000] == sound[:4000]).all() and not short[4000:].any()
    assert (shown(sound_file(sound, 16_000), view(samples=4000)) == sound[6000:10_000]).all()


def test_silence_is_a_recording() -> None:
    assert not shown(sound_file(np.zeros(16_000, np.int16), 16_000), view()).any()


def test_training_clips_start_anywhere_and_depend_on_the_seed_alone() -> None:
    stored, how = sound_file(ramp(4, 16_000), 16_000), view(samples=1600)
    starts = [shown(stored, how, True, seed)[0] for seed in range(200)]
    assert min(starts) < 500 and max(starts) > 9000
    assert [shown(stored, how, True, seed)[0] for seed in range(5)] == starts[:5]


def test_jitter_moves_the_middle_clip_also_beyond_the_ends() -> None:
    rng = seeded(0)
    starts = np.concatenate([clip_starts(2.0, 1.0, ClipConfig(jitter=0.1), True, rng) for _ in range(300)])
    assert 0.4 <= starts.min() < 0.41 and 0.59 < starts.max() <= 0.6
    assert clip_starts(2.0, 1.0, ClipConfig(jitter=0), True, no_rng).tolist() == [0.5]
    stored, how = sound_file(ramp(1, 16_000) + np.int16(1), 16_000), view(jitter=0.05)
    clips = [shown(stored, how, True, seed) for seed in range(40)]
    assert any(clip[0] == 0 for clip in clips) and any(clip[-1] == 0 for clip in clips)
    # Shifted, not stretched: neighbours differ as in the recording.
    assert all(np.diff(clip[np.flatnonzero(clip)].astype(int)).max() <= 1 for clip in clips)


def test_evaluation_clips_overlap_and_cover_the_recording() -> None:
    """Sixteen clips of 1.28 s over 10 s (Perceiver 4.2) begin (10 - 1.28) / 15 s apart."""
    starts = clip_starts(10.0, 1.28, ClipConfig(eval_clips=16), False, no_rng)
    assert starts[0] == 0 and starts[-1] == pytest.approx(8.72) and np.allclose(np.diff(starts), 8.72 / 15)
    sound = ramp(10, 1000)
    got = shown(sound_file(sound, 1000), view(rate=1000, samples=1280, eval_clips=16))
    assert got.shape == (16, 1280)
    assert (got[0] == sound[:1280]).all() and (got[-1] == sound[-1280:]).all()
    assert got[5, 0] == sound[round(1000 * starts[5])]


NAN = np.zeros(16_000, np.float32)
NAN[8000] = np.nan
INFINITE = np.where(np.isnan(NAN), np.inf, NAN).astype(np.float32)
FLAC = sound_file(np.random.default_rng(0).integers(-3000, 3000, 64_000).astype(np.int16), 16_000)
WAV = sound_file(ramp(2, 16_000), 16_000, "WAV")


@pytest.mark.parametrize(
    "stored, reason",
    [
        (b"", "0 bytes"),
        (None, "0 bytes"),
        (b"no sound at all" * 100, "undecodable media"),
        (sound_file(np.zeros(0, np.int16), 16_000, "WAV"), "0 seconds"),
        (sound_file(NAN, 16_000, "WAV", "FLOAT"), "NaN or infinite"),
        (sound_file(INFINITE, 16_000, "WAV", "FLOAT"), "NaN or infinite"),
        (FLAC[: len(FLAC) // 3], "undecodable audio|truncated"),
        (WAV[: len(WAV) // 2], "truncated"),
        (sound_file(np.zeros(11_000, np.int16), 1000), "longer than 10 seconds"),
        (media_file([0, 1000], [1, 2]), "no audio stream"),
        (b"#EXTM3U\n#EXTINF:10,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n", "undecodable media"),
    ],
)
def test_damage_is_a_bad_sample(stored: bytes | None, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        shown(stored, view(samples=40_000, max_seconds=10))  # pyright: ignore[reportArgumentType]


def test_a_long_recording_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = sound_file(np.zeros(2_000_000, np.int16), 100)
    monkeypatch.setattr("soundfile.SoundFile.read", lambda *args, **kwargs: pytest.fail("it was decoded"))
    with pytest.raises(BadSample, match="longer than 600 seconds"):
        FEATURE.decode(bomb, ViewConfig(), 0)
