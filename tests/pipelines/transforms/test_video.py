"""Video with and without sound: time stamps, sync, views, clips, damage."""

import colorsys
import functools
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from perceiver.config import UserError
from perceiver.storage import open_folder
from pipelines.features import Feature, LabelFeature, MediaFeature, VideoFeature
from pipelines.features.base import ViewConfig
from pipelines.feed.ingest import DataConfig, EvalShare, eval_batches
from pipelines.shards.arrow import ShardWriter
from pipelines.shards.manifest import Manifest, Split, arrow_schema, load_manifest, save_manifest
from pipelines.transforms import BadSample
from pipelines.transforms.audio import AudioViewConfig
from pipelines.transforms.clip import ClipConfig
from pipelines.transforms.colour import ColourConfig, recoloured
from pipelines.transforms.image import CropConfig
from pipelines.transforms.video import VideoAugmentConfig, VideoViewConfig
from tests.pipelines.recordings import BIKES, media_file, ramp, real_video, sound_file

GREY = VideoFeature(channels=1, size=(32, 32))
BOTH = MediaFeature(channels=1, size=(32, 32))


def no_rng() -> np.random.Generator:
    """Fail the test: for views without randomness."""
    raise AssertionError("nothing here is random")


def seeded(seed: int) -> Callable[[], np.random.Generator]:
    """Return one sample's generator."""
    return functools.cache(functools.partial(np.random.default_rng, seed))


def view(frames: int = 4, fps: float = 25, samples: int = 1600, **settings: Any) -> ViewConfig:
    """Return a view of so many frames."""
    of_clip = settings.keys() & {"jitter", "eval_clips", "max_seconds", "show"}
    clip = ClipConfig(**{key: settings.pop(key) for key in of_clip})
    return ViewConfig(
        video=VideoViewConfig(frames=frames, fps=fps, **settings),
        clip=clip,
        audio=AudioViewConfig(rate=16_000, samples=samples),
    )


def shown(
    feature: Feature, stored: Any, how: ViewConfig, training: bool = False, seed: int = 0
) -> dict[str, NDArray[Any]]:
    """Return what a batch gets."""
    decoded = feature.decode(stored, how, 0)
    return dict(feature.show("video", decoded, how, training, seeded(seed) if training else no_rng))


def greys(frames: NDArray[Any]) -> list[int]:
    """Return the grey of each frame."""
    return frames[:, 0, 0, 0].tolist()


STEPS = media_file([40 * i for i in range(50)], [5 * i for i in range(50)], sound=ramp(2, 16_000))
"""Two seconds: frame i is of grey 5 i, and the sound encodes its time, too."""


def test_frames_come_by_time_stamp_also_of_variable_rates() -> None:
    varying = media_file([0, 40, 500, 540, 1960], [10, 20, 30, 40, 50])
    how = view(frames=10, fps=5, jitter=0)
    # Seconds 0, 0.2, ..., 1.8 of 2.
    assert greys(shown(GREY, varying, how)["video"]) == [10, 20, 20, 40, 40, 40, 40, 40, 40, 40]
    assert greys(shown(GREY, STEPS, how)["video"]) == [5 * i for i in range(0, 50, 5)]
    # A higher rate than the file's repeats frames.
    assert greys(shown(GREY, STEPS, view(frames=100, fps=50))["video"]) == [5 * (i // 2) for i in range(100)]


def test_frames_are_the_same_wherever_decoding_begins() -> None:
    """The real video: a clip in its middle begins between key frames."""
    stored = real_video()
    feature = VideoFeature()
    whole = shown(feature, stored, view(frames=132, size=(36, 64)))["video"]
    middle = shown(feature, stored, view(frames=32, size=(36, 64)))["video"]
    assert whole.shape == (132, 3, 36, 64) and whole.dtype == np.uint8 and whole.std() > 20
    assert (middle == whole[50:82]).all()


def test_sound_and_pictures_stay_in_step() -> None:
    starts = set()
    for seed in range(12):
        clip = shown(BOTH, STEPS, view(frames=10, samples=6400), True, seed)
        frame_time = clip["video"][0, 0, 0, 0] / 5 / 25
        sound_time = clip["audio"][0] / 10_000 * 2
        # The frame on screen began at most a frame's time before the sound that starts with it.
        assert -0.001 <= sound_time - frame_time < 0.041
        starts.add(int(clip["video"][0, 0, 0, 0]))
    assert len(starts) > 6
    clips = shown(BOTH, STEPS, view(frames=10, samples=6400, eval_clips=4))
    assert clips["video"].shape == (4, 10, 1, 32, 32) and clips["audio"].shape == (4, 6400)
    for pictures, sound in zip(clips["video"], clips["audio"], strict=True):
        assert -0.001 <= sound[0] / 5000 - pictures[0, 0, 0, 0] / 125 < 0.041
    assert clips["video"][0, 0, 0, 0, 0] == 0 and clips["video"][-1, -1, 0, 0, 0] == 245


def test_the_real_recording_gives_its_sound_in_mono() -> None:
    how = ViewConfig(video=VideoViewConfig(size=(32, 32)))
    got = shown(MediaFeature(), real_video(), how)
    assert got["audio"].shape == (61_440,) and got["audio"].dtype == np.int16 and got["audio"].std() > 10
    assert got["video"].shape == (32, 3, 32, 32)


def test_one_half_of_a_recording_can_be_left_out() -> None:
    quiet = media_file([0, 40], [1, 2])
    assert set(shown(BOTH, STEPS, view(show="audio"))) == {"audio"}
    assert set(shown(BOTH, quiet, view(show="video"))) == {"video"}
    assert set(BOTH.shapes("media", view(), 0)) == {"audio", "video"}


def test_jitter_beyond_the_ends_shows_the_last_frame_and_silence() -> None:
    how, most = view(frames=50, samples=32_000, jitter=0.5), 0
    for seed in range(4):
        clip = shown(BOTH, STEPS, how, True, seed)
        pictures = greys(clip["video"])
        assert pictures == sorted(pictures)
        still = sum(grey == pictures[0] for grey in pictures), sum(grey == pictures[-1] for grey in pictures)
        silent = np.flatnonzero(clip["audio"] > 4)[[0, -1]]
        # The first or last frame is repeated for as long as there is silence, in frames of 640 samples.
        assert still[0] == pytest.approx(silent[0] / 640 + 1, abs=1.1)
        assert still[1] == pytest.approx((32_000 - silent[1]) / 640 + 1, abs=1.1)
        most = max(most, *still)
    assert most > 5


def test_one_crop_flip_and_colour_for_all_frames() -> None:
    stored = real_video(BIKES)
    augment = VideoAugmentConfig(crop=CropConfig(), flip=True, colour=ColourConfig())
    how = view(frames=3, fps=1000, size=(24, 24), augment=augment)
    # At 1,000 frames a second all three are the same picture, so all must be changed in the same way.
    clips = [shown(VideoFeature(), stored, how, True, seed)["video"] for seed in range(4)]
    for clip in clips:
        assert (clip[0] == clip[1]).all() or (clip[1] == clip[2]).all()
    assert (clips[0] != clips[1]).any()
    assert (clips[0] == shown(VideoFeature(), stored, how, True, 0)["video"]).all()


def test_colours_change_as_in_hsv() -> None:
    pixels = np.random.default_rng(0).integers(60, 180, (3, 8, 8), dtype=np.uint8)
    assert (recoloured(pixels, 0, 1, 1, 0) == pixels).all()
    brighter = recoloured(pixels, 32 / 255, 1, 1, 0).astype(int)
    assert (brighter - pixels == 32).all()
    contrast = recoloured(pixels, 0, 1, 1.4, 0).astype(float)
    means = pixels.mean((1, 2), keepdims=True)
    assert np.abs(contrast - (means + 1.4 * (pixels - means)).clip(0, 255)).max() <= 0.5 + 1e-3
    grey = recoloured(pixels, 0, 0, 1, 0)
    assert (grey == pixels.max(0)).all()
    red = np.array([200, 0, 0], np.uint8)[:, None, None]
    assert recoloured(red, 0, 1, 1, 1 / 3).ravel().tolist() == [0, 200, 0]


@pytest.mark.parametrize("saturation, hue", [(1.4, 0), (0.6, 0), (1, 0.2), (1, -0.2), (1, 0.5), (1.4, -0.13)])
def test_saturation_and_hue_are_those_of_colorsys(saturation: float, hue: float) -> None:
    """Grey, black, white and the corners of the colour cube among them; without rounding or clipping in between."""
    levels = np.random.default_rng(1).integers(0, 256, (3, 200), dtype=np.uint8)
    corners = np.array(list(itertools.product((0, 128, 255), repeat=3)), np.uint8).T
    pixels = np.concatenate([levels, corners], axis=1)
    wanted = []
    for colour in (pixels.T / 255).tolist():
        h, s, v = colorsys.rgb_to_hsv(*colour)
        wanted.append(colorsys.hsv_to_rgb((h + hue) % 1, min(1, s * saturation), v))
    found = recoloured(pixels[..., None], 0, saturation, 1, hue)[..., 0]
    assert np.abs(found.T - 255 * np.array(wanted)).max() <= 0.5 + 1e-2


def test_colours_are_cut_off_once_at_the_end() -> None:
    """White after more brightness and less contrast differs if it is clipped in between."""
    halves = np.repeat(np.array([0, 255], np.uint8), 8)[None].repeat(3, 0)[..., None]
    assert np.unique(recoloured(halves, 0.1, 1, 0.6, 0)).tolist() == [76, 230]


def test_torch_is_imported_early_where_frames_need_it() -> None:
    plain, colour = view(), view(augment=VideoAugmentConfig(colour=ColourConfig()))
    assert GREY.imports(plain) == () == BOTH.imports(plain) == BOTH.imports(view(size=(9, 9), show="audio"))
    assert GREY.imports(view(size=(9, 9))) == BOTH.imports(colour) == VideoFeature().imports(colour) == ("torch",)


def test_sizes_that_differ_need_a_size() -> None:
    with pytest.raises(UserError, match=r"data\.video\.size"):
        VideoFeature().shapes("video", ViewConfig(), 0)


def mp4(flags: str = "") -> bytes:
    """Encode two seconds of noise as MP4, which does not compress."""
    rng = np.random.default_rng(0)
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        return _mp4(file.name, flags, rng)


def _mp4(path: str, flags: str, rng: np.random.Generator) -> bytes:
    with av.open(path, "w", options={"movflags": flags} if flags else {}) as container:
        stream: Any = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(50):
            pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return Path(path).read_bytes()


ORDINARY, FRONT = mp4(), mp4("faststart")


@pytest.mark.parametrize(
    "feature, stored, reason",
    [
        (GREY, b"", "0 bytes"),
        (GREY, None, "0 bytes"),
        (GREY, b"nothing" * 500, "undecodable media"),
        (GREY, ORDINARY[: len(ORDINARY) // 2], "undecodable media"),
        (GREY, FRONT[: len(FRONT) // 2], "undecodable media|truncated"),
        (GREY, media_file([0, 61_000], [1, 2]), "longer than 60 seconds"),
        (GREY, media_file([0, 40], [1, 2], size=(300, 400)), "frames of 400x300 are not 1 to 100000 pixels"),
        (GREY, sound_file(ramp(1, 16_000), 16_000), "no video stream"),
        (BOTH, media_file([0, 40], [1, 2]), "no audio stream"),
        (BOTH, sound_file(ramp(1, 16_000), 16_000), "no video stream"),
        (GREY, b"#EXTM3U\n#EXTINF:10,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n", "undecodable media"),
        (GREY, b"ffconcat version 1.0\nfile /etc/hostname\n", "undecodable media"),
    ],
)
def test_damage_is_a_bad_sample(feature: Feature, stored: Any, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        shown(feature, stored, view(frames=48, max_pixels=100_000, max_seconds=60, size=(32, 32)))


def test_the_complete_files_of_truncated_ones_are_good() -> None:
    assert shown(GREY, FRONT, view(frames=48, size=(32, 32)))["video"].shape == (48, 1, 32, 32)


def test_clips_go_through_shards_and_batches_and_count_once(tmp_path: Path) -> None:
    features: dict[str, Feature] = {"media": BOTH, "label": LabelFeature()}
    folder = open_folder(str(tmp_path))
    with ShardWriter(folder, "a.arrow", arrow_schema(features), 4) as writer:
        writer.write({"key": str(i), "media": STEPS if i != 3 else STEPS[:400], "label": i % 2} for i in range(5))
        shard = writer.close()
    assert shard is not None
    save_manifest(
        Manifest(
            name="clips",
            features=features,
            classes=("a", "b"),
            licence="",
            source="",
            splits={"test": Split(shards=(shard,))},
        ),
        folder,
    )
    data = DataConfig(
        url=str(tmp_path),
        executor="inline",
        train_split="test",
        max_bad_fraction=1,
        clip=ClipConfig(eval_clips=3),
        video=VideoViewConfig(frames=4),
        audio=AudioViewConfig(rate=16_000, samples=2560),
    )
    assert data.clip.eval_rows(6) == 2 and data.clip.eval_rows(1) == 1
    batches = list(eval_batches(data, load_manifest(str(tmp_path)), EvalShare("test", 2), "cpu"))
    assert [tuple(batch["video"].shape) for batch in batches] == [(2, 3, 4, 1, 32, 32)] * 3
    assert tuple(batches[0]["audio"].shape) == (2, 3, 2560) and batches[0]["audio"].dtype == torch.int16
    assert torch.cat([batch["valid"] for batch in batches]).tolist() == [True, True, True, False, True, False]
    assert batches[0]["video"][0, 2, 3, 0, 0, 0] == 245


def test_without_random_crops_evaluation_shows_what_training_shows() -> None:
    """The real video, resized; a clip without jitter is in the middle."""
    stored, how = real_video(), view(frames=2, size=(36, 64), jitter=0)
    assert (shown(VideoFeature(), stored, how, True)["video"] == shown(VideoFeature(), stored, how)["video"]).all()
