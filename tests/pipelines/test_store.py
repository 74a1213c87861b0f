"""`prepare --resize --fps --rate --quality`: media at the size at which they are used."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from perceiver.config import UserError
from pipelines.features import AudioFeature, ImageFeature
from pipelines.index import index
from pipelines.prepare import PrepareConfig, prepare
from pipelines.shards.manifest import load_manifest
from pipelines.transforms import BadSample
from pipelines.transforms.audio import AudioViewConfig
from pipelines.transforms.decode import decode_image
from pipelines.transforms.media import media_sound, open_media, pictures_at_rate
from pipelines.transforms.store import StoreConfig, fitted_size, stored_image, stored_video
from tests.pipelines.recordings import media_file, sound_file, tone
from tests.pipelines.test_prepare import rows_of
from tests.pipelines.toys import png


def photo(height: int, width: int, kind: str = "JPEG") -> bytes:
    """Encode a smooth picture."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return png(np.stack([across, down, 255 - across], axis=2).astype(np.uint8), kind)


@pytest.mark.parametrize(
    "size, side, wanted",
    [((100, 300), 50, (50, 150)), ((300, 100), 50, (150, 50)), ((33, 70), 32, (32, 68)), ((20, 30), 50, (20, 30))],
)
def test_the_shape_is_kept(size: tuple[int, int], side: int, wanted: tuple[int, int]) -> None:
    assert fitted_size(*size, side) == wanted and fitted_size(*size, None) == size


def recording() -> bytes:
    """Encode two seconds at 20 frames per second that become lighter, with a tone."""
    times = list(range(0, 2000, 50))
    sound = (tone(440, 2, 16_000) * 32767).astype(np.int16)
    return media_file(times, [50 + time // 20 for time in times], sound=sound, size=(48, 64), channels=3)


def test_images_become_smaller_jpegs() -> None:
    large, config = photo(120, 200), StoreConfig(resize=60)
    found = stored_image(large, 3, config)
    with Image.open(io.BytesIO(found)) as image:
        assert (image.format, image.size) == ("JPEG", (100, 60))
    wanted = decode_image(large, 3)[::2, ::2].astype(int)
    assert np.abs(decode_image(found, 3).astype(int) - wanted).mean() < 4
    small = photo(50, 60, "PNG")
    assert stored_image(small, 3, config) == small  # nothing is enlarged
    noise = png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    worse = stored_image(noise, 3, StoreConfig(quality=30))
    assert worse[:3] == b"\xff\xd8\xff" and len(worse) < len(noise)
    flat = png(np.zeros((64, 64), np.uint8))
    assert stored_image(flat, 1, StoreConfig(quality=100)) == flat  # the JPEG would be larger
    with pytest.raises(BadSample):
        stored_image(large[:300], 3, config)


def test_sound_is_resampled_and_its_channels_are_kept() -> None:
    time = np.arange(48_000) / 48_000
    waves = np.stack([np.sin(2 * np.pi * 440 * time), np.sin(2 * np.pi * 1000 * time)], axis=1) * 0.5
    encoded = sound_file((waves * 32767).astype(np.int16), 48_000, "WAV")
    feature = AudioFeature()
    found = feature.smaller(encoded, StoreConfig(rate=16_000))
    read, rate = soundfile.read(io.BytesIO(found))
    assert (rate, read.shape) == (16_000, (16_000, 2))
    assert np.abs(read - waves[::3])[100:-100].max() < 0.01  # apart from the ends, where the sound begins at once
    assert feature.smaller(found, StoreConfig(rate=16_000)) == found
    broken = sound_file(np.array([0, np.nan, 0.5], np.float32), 48_000, "WAV", "FLOAT")
    with pytest.raises(BadSample, match="NaN"):
        feature.smaller(broken, StoreConfig(rate=16_000))
    with pytest.raises(BadSample):
        feature.smaller(b"", StoreConfig(rate=16_000))


def test_videos_are_smaller_slower_and_stay_in_step() -> None:
    encoded = recording()
    before = open_media(encoded, video=True, audio=True, max_seconds=60, max_pixels=10**7)
    config = StoreConfig(resize=16, fps=5, rate=8000)
    found = stored_video(encoded, config, sound=True)
    media = open_media(found, video=True, audio=True, max_seconds=60, max_pixels=10**7)
    side = min(media.height, media.width)
    assert side == 16 and media.fps == pytest.approx(5, abs=0.5) and media.rate == 8000
    assert media.seconds == pytest.approx(before.seconds, abs=0.3) and len(found) < len(encoded)
    times = [picture.mean() for picture in pictures_at_rate(media, 5)]
    wanted = [picture.mean() for picture in pictures_at_rate(before, 5)]
    assert len(wanted) <= len(times) <= len(wanted) + 1  # AAC ends with some silence
    assert np.abs(np.subtract(times[: len(wanted)], wanted)).max() < 2
    view = AudioViewConfig(rate=8000, samples=4000)
    again, first = (open_media(one, video=False, audio=True, max_seconds=60) for one in (found, encoded))
    heard, original = media_sound(again, 0.2, view).astype(float), media_sound(first, 0.2, view).astype(float)
    assert np.corrcoef(heard, original)[0, 1] > 0.95
    assert stored_video(found, config, sound=True) == found
    with pytest.raises(BadSample):
        stored_video(encoded[: len(encoded) // 2], config, sound=True)


def test_sound_that_starts_later_or_has_a_gap_stays_in_step() -> None:
    sound, times = (tone(440, 1, 16_000) * 32767).astype(np.int16), list(range(0, 2000, 50))
    encoded = media_file(times, [100] * len(times), sound=sound, sound_at=0.4, gap=0.3, channels=3)
    found = stored_video(encoded, StoreConfig(fps=5, rate=8000), sound=True)
    view, loud = AudioViewConfig(rate=8000, samples=8000 * 9 // 5), []
    for one in (encoded, found):
        media = open_media(one, video=True, audio=True, max_seconds=60, max_pixels=10**7)
        loud.append(np.abs(media_sound(media, 0.0, view).astype(float)).reshape(-1, 400).mean(1) > 3000)
    original, heard = loud
    assert not original[:8].any() and original[9:16].all() and not original[19:23].any() and original[25:33].all()
    assert np.sum(heard != original) <= 3  # windows of 50 ms at the edges


def test_a_prepared_folder_records_it_and_rejects_what_cannot_be_decoded(tmp_path: Path) -> None:
    for number in range(8):
        place = tmp_path / "raw" / "train" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.jpg").write_bytes(photo(60, 80)[: 200 if number == 3 else None])
    options = PrepareConfig(options={"held_out": "none"}, max_bad_fraction=0.5, media=StoreConfig(resize=30))
    manifest = prepare("image_folder", str(tmp_path / "raw"), str(tmp_path / "data"), options)
    assert manifest.features["image"] == ImageFeature(channels=3, size=(30, 40))
    assert manifest.stored == StoreConfig(resize=30) and manifest.rejected == 1
    assert load_manifest(str(tmp_path / "data")) == manifest
    rows = rows_of(tmp_path / "data", manifest, "train")
    assert {decode_image(row["image"], 3).shape for row in rows} == {(30, 40, 3)} and len(rows) == 7
    with pytest.raises(UserError, match="with other settings"):
        other = options.model_copy(update={"media": StoreConfig()})
        prepare("image_folder", str(tmp_path / "raw"), str(tmp_path / "data"), other)


@pytest.mark.parametrize(
    "media, message",
    [
        ({"fps": 5}, "--fps 5.0 does not apply to the features image, label .*which take --quality, --resize"),
        ({"rate": 8000}, "--rate 8000 does not apply"),
    ],
)
def test_what_does_not_apply_is_refused(tmp_path: Path, media: dict[str, int], message: str) -> None:
    for name in "ab":
        place = tmp_path / "raw" / name
        place.mkdir(parents=True)
        (place / "0.jpg").write_bytes(photo(8, 8))
    with pytest.raises(UserError, match=message):
        prepare("image_folder", str(tmp_path / "raw"), str(tmp_path / "d"), PrepareConfig(media=StoreConfig(**media)))
    with pytest.raises(UserError, match="--index leaves them in place"):
        index("table", str(tmp_path / "raw"), str(tmp_path / "d"), PrepareConfig(media=StoreConfig(**media)))


def test_sound_of_videos_has_the_rates_of_its_format(tmp_path: Path) -> None:
    for name in "ab":
        place = tmp_path / "raw" / name
        place.mkdir(parents=True)
        (place / "0.mp4").write_bytes(recording())
    options = PrepareConfig(options={"media": "both"}, media=StoreConfig(rate=10_000))
    with pytest.raises(UserError, match="--rate 10000: .*AAC, wanted one of 8000"):
        prepare("video_folder", str(tmp_path / "raw"), str(tmp_path / "d"), options)
