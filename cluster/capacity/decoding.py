"""CPU time to decode and augment a sample, as assumed without a calibration."""

import math

from pipelines.features import MediaFeature, VideoFeature
from pipelines.features.base import ViewConfig
from pipelines.shards.manifest import Manifest
from pipelines.transforms.store import StoreConfig

NS_PER_BYTE = {
    "image": 31.0,
    "segmentation": 31.0,
    "audio": 10.0,
    "mel": 10.0,
    "video": 250.0,
    "media": 250.0,
    "clip": 250.0,
    "flow": 31.0,
}
"""CPU nanoseconds for one stored byte, by feature. Images: a JPEG of 90 KB takes 1.3 ms with the papers' augmentation
on an idle core of an AMD EPYC, 15 ns per byte, and twice that on an older or shared core; sound is of that order. Video
as it came: 250 ns at 720p, 224 x 224, 32 frames (docs/data.md, media at the size at which they are used)."""
SECONDS_PER_SAMPLE = 50e-6

# Of videos that `prepare` stored at a size, whose cost follows from their frames (measured on the same clip).
MEDIA_SECONDS = 7e-3
"""To open a container, and to decode the sound of a clip."""
SECOND_NS, DECODED_NS = 31.0, 1.05
"""For each pixel of a second, and of a frame, that is decoded: the clip, and half of the time to the next key frame."""
CONVERTED_NS = 1.8
"""For each stored pixel of a frame that is shown: to RGB."""
RESIZED_NS, COLOURED_NS = 8.0, 18.0
"""For each pixel of a batch: crop, resize, copy; change of colours."""
KEY_FRAME_S = 1.0
USUAL_FPS, USUAL_SHAPE = 30.0, 16 / 9


def by_bytes(kinds: list[str], sample_bytes: float) -> float:
    """Return the CPU seconds for a sample of `sample_bytes` with features of these kinds."""
    return SECONDS_PER_SAMPLE + 1e-9 * sample_bytes * max(NS_PER_BYTE.get(kind, 1.0) for kind in kinds)


def of_prepared(manifest: Manifest, view: ViewConfig, sample_bytes: float) -> float:
    """Return the CPU seconds for a training sample of prepared data."""
    videos = [f for f in manifest.features.values() if isinstance(f, MediaFeature | VideoFeature)]
    if videos and manifest.stored.resize and view.clip.show != "audio":
        return sum(_video(feature.size, manifest.stored, view) for feature in videos)
    return by_bytes([str(getattr(feature, "kind", "")) for feature in manifest.features.values()], sample_bytes)


def _video(size: tuple[int, int] | None, stored: StoreConfig, view: ViewConfig) -> float:
    """Return the CPU seconds for a clip of a video that `prepare` stored with key frames each second."""
    assert stored.resize is not None
    fps, clip = stored.fps or USUAL_FPS, view.video.seconds
    seconds = clip + KEY_FRAME_S / 2
    different = min(view.video.frames, math.ceil(clip * fps) + 1)
    pixels = math.prod(size) if size else stored.resize**2 * USUAL_SHAPE
    decoded = seconds * (SECOND_NS + fps * DECODED_NS) * pixels
    colour = view.video.augment.colour
    each = RESIZED_NS + (COLOURED_NS * colour.probability if colour else 0.0)
    shown = CONVERTED_NS * pixels + each * (math.prod(view.video.size) if view.video.size else pixels)
    return MEDIA_SECONDS + 1e-9 * (decoded + different * shown)
