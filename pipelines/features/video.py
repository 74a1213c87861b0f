"""Encoded video, with or without its sound."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from perceiver.config import UserError
from pipelines.features.audio import some_sound
from pipelines.features.base import BaseFeature, Channels, PixelSize, RngFactory, Shapes, ViewConfig
from pipelines.transforms.clip import clip_starts, clips_excess, exceeds_clips
from pipelines.transforms.image import some_pixels
from pipelines.transforms.media import Media, frames_at, media_sound, open_media
from pipelines.transforms.store import StoreConfig, fitted_size, stored_video
from pipelines.transforms.video import CentredView, RandomView, video_clips

MEASURED_FRAMES = 4
"""Frames of a recording that are looked at for the statistics of a data set."""


class VideoFeature(BaseFeature):
    """One encoded video per sample (MP4, Matroska, WebM, AVI, ...); uint8 (F, C, H, W) in a batch.

    Frames are taken by their time stamps, so the frame rate may vary. Bad samples: no bytes, no pictures, damaged or
    truncated in the clip, frames above data.video.max_pixels, longer than data.clip.max_seconds.
    """

    arrow: ClassVar[pa.DataType] = pa.binary()
    clips: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    stores: ClassVar[tuple[str, ...]] = ("resize", "fps", "quality")
    kind: Literal["video"] = "video"
    channels: Channels = Field(default=3, description="channels after decoding: 1 (grey) or 3 (RGB)")
    size: PixelSize | None = Field(default=None, description="(height, width) of all frames; null if they differ")

    def smaller(self, stored: Any, config: StoreConfig) -> Any:
        """Return H.264 without sound."""
        return stored_video(stored or b"", config, sound=False)

    def after(self, config: StoreConfig) -> Self:
        """Return the feature with the size of the smaller frames."""
        return self.model_copy(update={"size": _even_size(self.size, config)})

    def shapes(self, name: str, view: ViewConfig, classes: int) -> Shapes:
        """Return (F, C, height, width) uint8."""
        return {name: _frames_shape(name, self.channels, self.size, view)}

    def normalised(self, name: str) -> dict[str, int]:
        """Return the channels of a frame."""
        return {name: self.channels}

    def values(self, name: str, stored: Any) -> Mapping[str, NDArray[np.floating]]:
        """Return pixels in [0, 1] of some frames."""
        return {name: _some_frames(_open(stored, ViewConfig(), video=True, audio=False), self.channels)}

    def imports(self, view: ViewConfig) -> tuple[str, ...]:
        """Return torch if frames are resized or their colours change."""
        return _imports(self.size, view)

    def decode(self, stored: Any, view: ViewConfig, classes: int) -> Any:
        """Read the header; return a `Media`."""
        return _open(stored, view, video=True, audio=False)

    def exceeds(self, decoded: Any, view: ViewConfig) -> bool:
        """Return whether the clips of an evaluation are not all of the recording."""
        return exceeds_clips(decoded.seconds, view.video.seconds, view.clip)

    def excess(self, view: ViewConfig) -> str:
        """See `BaseFeature`."""
        return clips_excess(view.video.seconds, view.clip)

    def show(self, name: str, decoded: Any, view: ViewConfig, training: bool, rng: RngFactory) -> Mapping[str, Any]:
        """Return the pixels of a clip; in an evaluation of K clips (K, F, C, H, W)."""
        starts = clip_starts(decoded.seconds, view.video.seconds, view.clip, training, rng)
        clips = _pixels(decoded, starts, (self.channels, self.size), view, training, rng)
        return {name: clips if view.clip.axes(training) else clips[0]}


class MediaFeature(BaseFeature):
    """One encoded video with sound per sample; in a batch uint8 `video` (F, C, H, W) and int16 `audio` (T,).

    Both show the same part of the recording, also with time jitter (Perceiver, 4.2). Bad samples: as for `video` and
    `audio`, and files without one of the two.
    """

    arrow: ClassVar[pa.DataType] = pa.binary()
    clips: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    stores: ClassVar[tuple[str, ...]] = ("resize", "fps", "rate", "quality")
    kind: Literal["media"] = "media"
    channels: Channels = Field(default=3, description="channels of a frame after decoding: 1 (grey) or 3 (RGB)")
    size: PixelSize | None = Field(default=None, description="(height, width) of all frames; null if they differ")

    def smaller(self, stored: Any, config: StoreConfig) -> Any:
        """Return H.264 with the sound as AAC."""
        return stored_video(stored or b"", config, sound=True)

    def after(self, config: StoreConfig) -> Self:
        """Return the feature with the size of the smaller frames."""
        return self.model_copy(update={"size": _even_size(self.size, config)})

    def shapes(self, name: str, view: ViewConfig, classes: int) -> Shapes:
        """Return (F, C, height, width) uint8 and (T,) int16, or the one that data.clip.show names."""
        shapes: Shapes = {}
        if view.clip.show != "audio":
            shapes["video"] = _frames_shape(name, self.channels, self.size, view)
        if view.clip.show != "video":
            shapes["audio"] = ((view.audio.samples,), np.int16)
        return shapes

    def normalised(self, name: str) -> dict[str, int]:
        """Return the channels of a frame, and one of the sound."""
        return {"video": self.channels, "audio": 1}

    def values(self, name: str, stored: Any) -> Mapping[str, NDArray[np.floating]]:
        """Return pixels in [0, 1] of some frames, and samples in [-1, 1) of ten seconds about the middle."""
        media = _open(stored, ViewConfig(), video=True, audio=True)
        return {"video": _some_frames(media, self.channels), "audio": some_sound(media)}

    def imports(self, view: ViewConfig) -> tuple[str, ...]:
        """Return torch if frames are shown, and are resized or their colours change."""
        return _imports(self.size, view) if view.clip.show != "audio" else ()

    def decode(self, stored: Any, view: ViewConfig, classes: int) -> Any:
        """Read the header; return a `Media`."""
        return _open(stored, view, video=view.clip.show != "audio", audio=view.clip.show != "video")

    def exceeds(self, decoded: Any, view: ViewConfig) -> bool:
        """Return whether the clips of an evaluation are not all of the recording."""
        return exceeds_clips(decoded.seconds, _clip_seconds(view), view.clip)

    def excess(self, view: ViewConfig) -> str:
        """See `BaseFeature`."""
        return clips_excess(_clip_seconds(view), view.clip)

    def show(self, name: str, decoded: Any, view: ViewConfig, training: bool, rng: RngFactory) -> Mapping[str, Any]:
        """Return pixels and samples of a clip; in an evaluation of K clips each with a leading axis of K."""
        keys = self.shapes(name, view, 0)
        starts = clip_starts(decoded.seconds, _clip_seconds(view), view.clip, training, rng)
        shown: dict[str, NDArray[Any]] = {}
        if "video" in keys:
            shown["video"] = _pixels(decoded, starts, (self.channels, self.size), view, training, rng)
        if "audio" in keys:
            shown["audio"] = np.stack([media_sound(decoded, float(start), view.audio) for start in starts])
        return shown if view.clip.axes(training) else {key: clips[0] for key, clips in shown.items()}


def _even_size(size: tuple[int, int] | None, config: StoreConfig) -> tuple[int, int] | None:
    """Return the size of re-encoded frames of one size; of different or unknown ones None."""
    if size is None:
        return None
    height, width = fitted_size(*size, config.resize)
    return height + height % 2, width + width % 2


def _open(stored: Any, view: ViewConfig, *, video: bool, audio: bool) -> Media:
    limits = {"max_seconds": view.clip.max_seconds, "max_pixels": view.video.max_pixels}
    return open_media(stored or b"", video=video, audio=audio, **limits)


def _some_frames(media: Media, channels: int) -> NDArray[np.float32]:
    """Return pixels (n, channels) in [0, 1] of a few evenly spaced frames."""
    times = media.seconds * (np.arange(MEASURED_FRAMES) + 0.5) / MEASURED_FRAMES
    return np.concatenate(frames_at(media, times, some_pixels, channels)[0])


def _clip_seconds(view: ViewConfig) -> float:
    """Return the length of a clip of the streams that are shown."""
    of_video, of_audio = view.clip.show != "audio", view.clip.show != "video"
    return max(view.video.seconds if of_video else 0.0, view.audio.seconds if of_audio else 0.0)


def _frames_shape(
    name: str, channels: int, stored: tuple[int, int] | None, view: ViewConfig
) -> tuple[tuple[int, ...], type[np.generic]]:
    size = view.video.size or stored
    if size is None:
        raise UserError(f"the videos of feature '{name}' differ in size: set data.video.size, for example [224, 224]")
    return (view.video.frames, channels, *size), np.uint8


def _imports(stored: tuple[int, int] | None, view: ViewConfig) -> tuple[str, ...]:
    augment = view.video.augment
    return ("torch",) if augment.crop or augment.colour or (view.video.size or stored) != stored else ()


def _pixels(
    media: Media,
    starts: NDArray[np.float64],
    stored: tuple[int, tuple[int, int] | None],
    view: ViewConfig,
    training: bool,
    rng: RngFactory,
) -> NDArray[np.uint8]:
    channels, size = stored
    size = view.video.size or size
    assert size is not None, "shapes() is called first"
    chosen = RandomView(view.video.augment, rng) if training else CentredView(view.eval_crop)
    return video_clips(media, starts, size, channels, view.video, chosen)
