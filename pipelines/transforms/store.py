"""Media at the size at which they are used: smaller pictures, fewer frames, lower rates, re-encoded while preparing."""

import io
import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import av
import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from perceiver.config import Config, Real, Size, UserError
from perceiver.storage import first_line
from pipelines.transforms import BadSample
from pipelines.transforms.audio import MOST_RATE, Sound
from pipelines.transforms.decode import decode_image, to_image
from pipelines.transforms.media import Media, open_media, pictures_at_rate, sound_blocks
from pipelines.transforms.video import MAX_PIXELS

IMAGE_QUALITY, VIDEO_QUALITY = 90, 75
"""Qualities without `quality`; 75 is x264's default."""
MAX_SECONDS = 86_400.0
FLAC_CHANNELS = 8
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
ENCODERS = ("libx264", "libopenh264")
BLOCK = 1 << 16
"""Samples of each channel that are resampled at a time."""
GAP_S = 0.05
"""A longer gap between the time stamps of sound is kept; a shorter one may be their rounding."""


class StoreConfig(Config):
    """How media are stored; null: as they came. Nothing is enlarged."""

    resize: Size | None = Field(default=None, description="pixels of the shorter side of images and frames, at most")
    fps: Real | None = Field(default=None, ge=0.001, le=1000, description="frames per second of videos, at most")
    rate: int | None = Field(default=None, ge=100, le=MOST_RATE, description="samples per second of sound, at most")
    quality: int | None = Field(
        default=None,
        ge=1,
        le=100,
        description="of JPEG, and of H.264 on the same scale; null: 90 of images, 75 of videos",
    )

    @property
    def given(self) -> tuple[str, ...]:
        """Return the names of the settings that are not null."""
        return tuple(key for key, value in self if value is not None)


def fitted_size(height: int, width: int, side: int | None) -> tuple[int, int]:
    """Return (height, width) of a picture whose shorter side is at most `side`, its shape kept to a pixel."""
    if side is None or min(height, width) <= side:
        return height, width
    factor = side / min(height, width)
    return max(side, round(height * factor)), max(side, round(width * factor))


def stored_image(encoded: bytes, channels: int, config: StoreConfig) -> bytes:
    """Return an image as a JPEG, upright and with its shorter side at most `config.resize`.

    One that is small enough stays as it is, unless `config.quality` is given and the JPEG is smaller.

    Raises:
        BadSample: it is damaged, see `decode_image`.
    """
    picture = decode_image(encoded, channels)
    height, width = picture.shape[:2]
    size = fitted_size(height, width, config.resize)
    small = size == (height, width)
    if small and config.quality is None:
        return encoded
    image = to_image(picture)
    if not small:
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=config.quality or IMAGE_QUALITY, optimize=True)
    return encoded if small and sink.tell() >= len(encoded) else sink.getvalue()


def stored_sound(encoded: bytes, recording: Sound | Media, config: StoreConfig) -> bytes:
    """Return a recording as FLAC of 16 bits at `config.rate`; one of a lower rate stays as it is.

    Raises:
        BadSample: it is damaged, or has NaN or infinite samples.
    """
    rate, channels = config.rate, recording.channels
    if rate is None or recording.rate <= rate or channels > FLAC_CHANNELS:
        return encoded
    stream = soxr.ResampleStream(recording.rate, rate, channels, dtype="float32", quality="HQ")
    sink = io.BytesIO()
    with soundfile.SoundFile(sink, "w", rate, channels, format="FLAC", subtype="PCM_16") as file:
        for block in _blocks(recording):
            if not np.isfinite(block).all():
                raise BadSample("NaN or infinite samples")
            file.write(stream.resample_chunk(np.ascontiguousarray(block)).reshape(-1, channels))
        file.write(stream.resample_chunk(np.zeros((0, channels), np.float32), last=True).reshape(-1, channels))
    return sink.getvalue()


def _blocks(recording: Sound | Media) -> Iterator[NDArray[np.float32]]:
    """Yield the samples of a recording (n, channels) in -1 to 1."""
    if isinstance(recording, Media):
        yield from (samples for _, samples in sound_blocks(recording))
        return
    try:
        recording.file.seek(0)
        for block in recording.file.blocks(BLOCK, dtype="float32", always_2d=True):
            yield block.astype(np.float32, copy=False)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise BadSample(f"undecodable audio: {first_line(error).split('>')[-1].strip(': ')[:80]}") from error


def check_encoder(config: StoreConfig, sound: bool) -> None:
    """Refuse to store videos without an encoder, or their sound at a rate that its format does not have."""
    if not any(name in av.codecs_available for name in ENCODERS):
        raise UserError(
            f"--{config.given[0]} of videos needs one of the encoders {', '.join(ENCODERS)}, which PyAV"
            f" {av.__version__} here lacks: pip install av"
        )
    if sound and config.rate is not None and config.rate not in AAC_RATES:
        raise UserError(
            f"--rate {config.rate}: the sound of videos is stored as AAC, wanted"
            f" one of {', '.join(map(str, AAC_RATES))}"
        )


def stored_video(encoded: bytes, config: StoreConfig, sound: bool) -> bytes:
    """Return a video as H.264, with AAC where its sound is used, in Matroska; one that needs no change as it is.

    Frames are taken by their time stamps, at an even rate; there is a key frame each second.

    Raises:
        BadSample: it is damaged or too long.
    """
    media = open_media(encoded, video=True, audio=sound, max_seconds=MAX_SECONDS, max_pixels=MAX_PIXELS)
    size = fitted_size(media.height, media.width, config.resize)
    fps = min(config.fps or math.inf, media.fps or 25.0)
    slower = config.fps is not None and (not media.fps or media.fps > config.fps)
    lower = sound and config.rate is not None and media.rate > config.rate
    if size == (media.height, media.width) and config.quality is None and not slower and not lower:
        return encoded
    sink = io.BytesIO()
    with av.open(sink, "w", format="matroska") as container:
        streams = [_video_stream(container, fps, config)]
        packets = _video_packets(streams[0], media, fps, config.resize)
        if sound:
            streams.append(_sound_stream(container, media, config))
        for packet in packets:
            container.mux(packet)
        if sound:
            again = open_media(encoded, video=False, audio=True, max_seconds=MAX_SECONDS)
            for packet in _sound_packets(streams[1], replace(again, origin=media.origin)):
                container.mux(packet)
    return sink.getvalue()


def _video_stream(container: Any, fps: float, config: StoreConfig) -> Any:
    name = next(name for name in ENCODERS if name in av.codecs_available)
    quality = VIDEO_QUALITY if config.quality is None else config.quality
    # Without CABAC and the deblocking filter a frame is decoded in less than half the time and takes 4 % more bytes.
    x264 = {"crf": f"{23 + (75 - quality) / 5:.1f}", "preset": "veryfast", "tune": "fastdecode"}
    options = x264 if name == "libx264" else {}
    stream = container.add_stream(name, rate=Fraction(fps).limit_denominator(1001), options=options)
    stream.pix_fmt = "yuv420p"
    stream.codec_context.gop_size = max(1, round(fps))
    stream.codec_context.thread_count = 1
    return stream


def _video_packets(stream: Any, media: Media, fps: float, side: int | None) -> Iterator[Any]:
    """Yield the encoded frames; the size is that of the first one, even as H.264 wants it."""
    for number, picture in enumerate(pictures_at_rate(media, fps)):
        if not number:
            height, width = (length + length % 2 for length in fitted_size(picture.shape[0], picture.shape[1], side))
            stream.height, stream.width = height, width
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame = frame.reformat(stream.width, stream.height, "yuv420p", interpolation="BICUBIC")
        frame.pts, frame.time_base = number, 1 / Fraction(fps).limit_denominator(1001)
        yield from stream.encode(frame)
    yield from stream.encode()


def _sound_stream(container: Any, media: Media, config: StoreConfig) -> Any:
    rate = min(config.rate or MOST_RATE, media.rate)
    rate = rate if rate in AAC_RATES else min((r for r in AAC_RATES if r >= rate), default=AAC_RATES[-1])
    return container.add_stream("aac", rate=rate, layout="mono" if media.channels == 1 else "stereo")


def _sound_packets(stream: Any, media: Media) -> Iterator[Any]:
    """Yield the encoded sound, which starts as long after the origin as before, with its gaps."""
    context = stream.codec_context
    resampler = av.AudioResampler(format="fltp", layout=context.layout, rate=context.sample_rate)
    given = {1: "mono", 2: "stereo"}
    done: int | None = None
    for time, block in sound_blocks(media):
        start = round(time * media.rate)
        if done is None or start - done > GAP_S * media.rate:
            done = start
        found = block if media.channels in given else block.mean(1, keepdims=True)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(found.T), format="fltp", layout=given[found.shape[1]])
        frame.sample_rate, frame.pts, frame.time_base = media.rate, done, Fraction(1, media.rate)
        done += len(found)
        for part in resampler.resample(frame):
            yield from stream.encode(part)
    for part in resampler.resample(None):
        yield from stream.encode(part)
    yield from stream.encode()
