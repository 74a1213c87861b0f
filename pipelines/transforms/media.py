"""Media containers (MP4, Matroska, WebM, AVI, ...) through FFmpeg: header, frames at given times, sound of a clip.

Only known containers are opened, only from memory and with no protocol allowed: neither a playlist nor a reference in
a container makes FFmpeg read a file or an address.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from perceiver.storage import first_line
from pipelines.transforms import BadSample
from pipelines.transforms.audio import MARGIN_S, AudioViewConfig, Samples, check_length, check_rate, finish, source_span
from pipelines.transforms.decode import Picture

FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,wav,flac,mp3,aac,ac3,eac3,aiff,"
    "au,amr,caf,gif,m4v,h264,hevc,dv,rm,swf,w64,wv,ape,nut"
)
SHORT_S = 0.25
"""A stream may end this much plus a fiftieth of its length before the end in the header."""
SETTLE_S = 0.1
PROBED_PIXELS = 7680 * 4320

T = TypeVar("T")


@dataclass(frozen=True)
class Media:
    """An open media file, for one reader at a time.

    Attributes:
        container: the file.
        seconds: length of the shortest wanted stream.
        origin: start of its first stream, which counts as 0.
        height, width, fps: of the pictures; 0 if they are not wanted.
        rate, channels: of the sound; 0 if it is not wanted.
    """

    container: Any
    seconds: float
    origin: float
    height: int = 0
    width: int = 0
    fps: float = 0.0
    rate: int = 0
    channels: int = 0


def open_media(encoded: bytes, *, video: bool, audio: bool, max_seconds: float, max_pixels: int = 0) -> Media:
    """Read the header.

    Args:
        encoded: the file.
        video, audio: whether these streams are wanted.
        max_seconds: longer files are refused.
        max_pixels: larger frames are refused.

    Raises:
        BadSample: empty, not a media file, a missing stream, too long, too large frames, a rate above 1 MHz, or more
            than 32 channels.
    """
    if not encoded:
        raise BadSample("0 bytes")
    with _damage():
        container = _open(encoded, max_pixels)
        streams = [_stream(container, kind) for kind, wanted in (("video", video), ("audio", audio)) if wanted]
        starts = [float(stream.start_time * stream.time_base) for stream in streams if stream.start_time is not None]
        seconds = min(_seconds(container, stream, encoded) for stream in streams)
        check_length(seconds, max_seconds)
        facts: dict[str, Any] = {}
        for stream in streams:
            stream.codec_context.thread_count = 1
            if stream.type == "video":  # also of frames that are larger than the header's
                stream.codec_context.options = {"max_pixels": str(max_pixels)}
            facts |= _pictures(stream, max_pixels) if stream.type == "video" else _sounds(stream)
        return Media(container, seconds, min(starts, default=0.0), **facts)


def _open(encoded: bytes, max_pixels: int = 0) -> Any:
    """Open a container. FFmpeg decodes the first frames for that, but none of more than 8K."""
    probed = str(max(max_pixels, PROBED_PIXELS))
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "none", "max_pixels": probed}
    # PyAV 19 takes titles of any encoding and has no such argument; before, one that was not UTF-8 was an error.
    lenient: Any = {"metadata_errors": "ignore"} if int(av.__version__.partition(".")[0]) < 19 else {}
    return av.open(io.BytesIO(encoded), options=options, **lenient)


def _pictures(stream: Any, max_pixels: int) -> dict[str, Any]:
    height, width = stream.codec_context.height, stream.codec_context.width
    if not 0 < height * width <= max_pixels:
        size = f"{width}x{height}" if height * width else "an unreadable size"
        raise BadSample(f"frames of {size} are not 1 to {max_pixels} pixels")
    return {"height": height, "width": width, "fps": float(stream.average_rate or 0)}


def _sounds(stream: Any) -> dict[str, Any]:
    rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
    check_rate(rate, channels)
    return {"rate": rate, "channels": channels}


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Raise `BadSample` for whatever FFmpeg raises on damaged files."""
    try:
        yield
    except BadSample:
        raise
    except Exception as error:  # FFmpeg's demuxers and decoders fail in a dozen ways on damaged files.
        raise BadSample(f"undecodable media: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return FFmpeg's message, without the number and the name of the file."""
    text = getattr(error, "strerror", None) or first_line(error)
    return text.split(": '")[0][:80]


def _stream(container: Any, kind: str) -> Any:
    for stream in container.streams:
        picture = "ATTACHED_PIC" in str(getattr(stream, "disposition", "")).upper()
        if stream.type == kind and not picture:
            return stream
    raise BadSample(f"no {kind} stream")


def _seconds(container: Any, stream: Any, encoded: bytes) -> float:
    """Return the length of a stream by its header, else by the container's, else by its packets."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if container.duration:
        return container.duration / av.time_base - float((stream.start_time or 0) * stream.time_base)
    with _open(encoded) as again:
        ends = [
            float((packet.pts + (packet.duration or 0)) * packet.time_base)
            for packet in again.demux(_stream(again, stream.type))
            if packet.pts is not None
        ]
    return max(ends, default=0.0)


def frames_at(
    media: Media, times: NDArray[np.float64], take: Callable[[Picture], T], channels: int
) -> tuple[list[T], NDArray[np.int64]]:
    """Return the frames that are on screen at given times, by their time stamps (the frame rate may vary).

    Before the first frame and after the last one, that frame is shown.

    Args:
        media: the file.
        times: (n,) seconds from the beginning, in any order.
        take: applied once to each frame that is needed.
        channels: 1 (grey) or 3 (RGB).

    Returns:
        The frames, each once, and for each time the index of its frame.

    Raises:
        BadSample: damaged before the last of the times.
    """
    order = np.argsort(times, kind="stable")
    ascending = times[order]
    index = np.zeros(len(times), np.int64)
    images: list[T] = []
    served = 0
    reformatter = VideoReformatter()
    with _damage():
        for frame, until in _shown(_decoded(media, ascending[0]), media, ascending[-1]):
            upto = int(np.searchsorted(ascending, until - 1e-3))
            if upto > served:
                images.append(take(_picture(frame, channels, reformatter)))
                index[order[served:upto]] = len(images) - 1
                served = upto
            if served == len(times):
                break
    return images, index


def pictures_at_rate(media: Media, fps: float) -> Iterator[Picture]:
    """Yield the pixels (H, W, 3) that are on screen at each multiple of 1/fps seconds, one at a time.

    Raises:
        BadSample: damaged or truncated.
    """
    count, done = max(1, math.ceil(media.seconds * fps - 1e-6)), 0
    reformatter = VideoReformatter()
    with _damage():
        for frame, until in _shown(_decoded(media, 0.0), media, media.seconds):
            picture: Picture | None = None
            while done < count and done / fps < until - 1e-3:
                picture = _picture(frame, 3, reformatter) if picture is None else picture
                yield picture
                done += 1


def _shown(frames: Iterable[tuple[Any, float, float]], media: Media, last: float) -> Iterator[tuple[Any, float]]:
    """Yield (frame, time at which the next one replaces it); the last frame stays on screen."""
    shown: Any = None
    end = 0.0
    for frame, time, until in frames:
        if shown is not None:
            yield shown, time
        shown, end = frame, until
    if shown is None:
        raise BadSample("no frame can be decoded")
    if end < min(last, media.seconds) - _slack(media):
        raise BadSample("truncated: the pictures end before the time in the header")
    yield shown, math.inf


def _slack(media: Media) -> float:
    return SHORT_S + media.seconds / 50


def _decoded(media: Media, first: float) -> Iterator[tuple[Any, float, float]]:
    """Yield (frame, its time, its end), from the key frame before a time."""
    stream = _stream(media.container, "video")
    _seek(media, stream, first)
    step = 1 / media.fps if media.fps else 0.0
    for frame in media.container.decode(stream):
        if frame.time is not None:
            time = frame.time - media.origin
            yield frame, time, time + (frame.duration * float(frame.time_base) if frame.duration else step)


def _seek(media: Media, stream: Any, time: float) -> None:
    """Seek to the key frame before a time."""
    media.container.seek(int((max(time, 0.0) + media.origin) / stream.time_base), stream=stream)


def _picture(frame: Any, channels: int, reformatter: VideoReformatter) -> Picture:
    """Return a frame's pixels, turned upright. The reformatter is set up by the first of a clip's frames."""
    plain = reformatter.reformat(frame, format="gray" if channels == 1 else "rgb24")
    found: Picture = plain.to_ndarray().astype(np.uint8, copy=False).reshape(frame.height, frame.width, channels)
    quarters, rest = divmod(round(getattr(frame, "rotation", 0)) % 360, 90)
    return np.ascontiguousarray(np.rot90(found, quarters)) if quarters and not rest else found


def media_sound(media: Media, start: float, config: AudioViewConfig) -> Samples:
    """Return samples (T,) int16 from `start` seconds on, with silence where the file has none.

    Raises:
        BadSample: damage in the clip, NaN or infinite samples, or a missing channel.
    """
    first, count = source_span(start, config, media.rate)
    span = np.zeros((count, media.channels), np.float32)
    end = 0.0
    with _damage():
        for time, samples in _sound(media, first / media.rate):
            offset = round(time * media.rate) - first
            end = time + len(samples) / media.rate
            part = slice(max(offset, 0), min(offset + len(samples), count))
            if part.start < part.stop:
                span[part] = samples[part.start - offset : part.stop - offset]
            if offset + len(samples) >= count:
                break
        needed = min(start + config.seconds, media.seconds)
        if end < needed - _slack(media) and end < (first + count) / media.rate - MARGIN_S:
            raise BadSample("truncated: the sound ends before the time in the header")
    return finish(span, 0, count, start - first / media.rate, media.rate, config)


def sound_blocks(media: Media) -> Iterator[tuple[float, NDArray[np.float32]]]:
    """Yield (seconds from the origin, samples (n, channels) in -1 to 1) of the whole sound, frame by frame.

    Raises:
        BadSample: damaged or truncated, or the rate changes.
    """
    end = 0.0
    with _damage():
        for time, samples in _sound(media, 0.0):
            end = time + len(samples) / media.rate
            yield time, samples
        if end < media.seconds - _slack(media):
            raise BadSample("truncated: the sound ends before the time in the header")


def _sound(media: Media, first: float) -> Iterator[tuple[float, NDArray[np.float32]]]:
    """Yield (time, samples (n, channels)) of each decoded frame, from a time or a little earlier.

    Decoders need a few packets before their output is correct, hence the earlier start.
    """
    stream = _stream(media.container, "audio")
    _seek(media, stream, first - SETTLE_S)
    for frame in media.container.decode(stream):
        if (frame.sample_rate, frame.layout.nb_channels) != (media.rate, media.channels):
            raise BadSample("the sound's rate or channels change")
        if frame.time is not None:
            yield frame.time - media.origin, _floats(frame)


def _floats(frame: Any) -> NDArray[np.float32]:
    """Return the samples of a decoded frame of any format, (n, channels) in -1 to 1."""
    found = frame.to_ndarray()
    found = found.T if frame.format.is_planar else found.reshape(-1, frame.layout.nb_channels)
    if found.dtype.kind == "f":
        return found.astype(np.float32)
    middle = 128 if found.dtype == np.uint8 else 0
    return (found.astype(np.float32) - middle) / 2 ** (8 * found.dtype.itemsize - 1)
