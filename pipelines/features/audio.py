"""Encoded sound."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.features.base import BaseFeature, RngFactory, Shapes, ViewConfig
from pipelines.transforms.audio import FULL_SCALE, AudioViewConfig, Samples, Sound, open_sound, sound_clip
from pipelines.transforms.clip import clip_starts, clips_excess, exceeds_clips
from pipelines.transforms.media import Media, media_sound, open_media
from pipelines.transforms.store import MAX_SECONDS, StoreConfig, stored_sound

MEASURED_S = 10.0
"""Seconds of a recording that are looked at for the statistics of a data set."""


class AudioFeature(BaseFeature):
    """One encoded recording per sample (FLAC, WAV, Ogg, MP3, or the sound of an MP4); int16 (T,) in a batch.

    Other rates are resampled, channels are mixed, short recordings end in silence. Bad samples: no bytes, no samples,
    NaN, truncated or damaged in the clip, longer than data.clip.max_seconds.
    """

    arrow: ClassVar[pa.DataType] = pa.binary()
    clips: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    stores: ClassVar[tuple[str, ...]] = ("rate",)
    kind: Literal["audio"] = "audio"

    def smaller(self, stored: Any, config: StoreConfig) -> Any:
        """Return FLAC of the lower rate."""
        sound = open_sound(stored or b"", MAX_SECONDS)
        recording = sound or open_media(stored, video=False, audio=True, max_seconds=MAX_SECONDS)
        return stored_sound(stored, recording, config)

    def shapes(self, name: str, view: ViewConfig, classes: int) -> Shapes:
        """Return (T,) int16, T = data.audio.samples."""
        return {name: ((view.audio.samples,), np.int16)}

    def normalised(self, name: str) -> dict[str, int]:
        """Return one channel: sound is shown mono."""
        return {name: 1}

    def values(self, name: str, stored: Any) -> Mapping[str, NDArray[np.floating]]:
        """Return samples in [-1, 1) of ten seconds about the middle, at their own rate."""
        return {name: some_sound(self.decode(stored, ViewConfig(), 0))}

    def decode(self, stored: Any, view: ViewConfig, classes: int) -> Any:
        """Read the header; return a `Sound`, or a `Media` where libsndfile does not know the format."""
        sound = open_sound(stored or b"", view.clip.max_seconds)
        return sound or open_media(stored, video=False, audio=True, max_seconds=view.clip.max_seconds)

    def exceeds(self, decoded: Any, view: ViewConfig) -> bool:
        """Return whether the clips of an evaluation are not all of the recording."""
        return exceeds_clips(decoded.seconds, view.audio.seconds, view.clip)

    def excess(self, view: ViewConfig) -> str:
        """See `BaseFeature`."""
        return clips_excess(view.audio.seconds, view.clip)

    def show(self, name: str, decoded: Any, view: ViewConfig, training: bool, rng: RngFactory) -> Mapping[str, Any]:
        """Return the samples of a clip (T,); in an evaluation of K clips (K, T)."""
        starts = clip_starts(decoded.seconds, view.audio.seconds, view.clip, training, rng)
        clips = [clip(decoded, float(start), view.audio) for start in starts]
        return {name: np.stack(clips) if view.clip.axes(training) else clips[0]}


def some_sound(recording: Sound | Media, rate: int = 0) -> NDArray[np.float32]:
    """Return samples (n, 1) in [-1, 1) of up to ten seconds about the middle, at a rate; 0: the recording's."""
    rate, seconds = rate or recording.rate, min(recording.seconds, MEASURED_S)
    view = AudioViewConfig(rate=rate, samples=max(1, int(seconds * rate)))
    return clip(recording, (recording.seconds - seconds) / 2, view).astype(np.float32)[:, None] / np.float32(FULL_SCALE)


def clip(recording: Sound | Media, start: float, config: AudioViewConfig) -> Samples:
    """Return the samples of a clip, whichever library reads the file; raise `BadSample` if it is damaged there."""
    if isinstance(recording, Sound):
        return sound_clip(recording, start, config)
    return media_sound(recording, start, config)
