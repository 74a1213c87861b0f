"""Audio: from encoded bytes to int16 samples of a clip, at the rate wanted.

WAV, FLAC, Ogg (Vorbis, Opus), MP3, AIFF and their like are read by libsndfile, other containers (MP4, WebM, ...) by
FFmpeg. Only the clip that is shown is decoded, so a recording may be long; damage outside the clip goes unnoticed.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile
import soxr
from numpy.typing import NDArray
from pydantic import Field

from perceiver.config import Config
from pipelines.transforms import BadSample

Samples = NDArray[np.int16]
Found = NDArray[Any]
"""Samples of the source: int16, or float32 in -1 to 1."""

FULL_SCALE = 32768
MOST_RATE = 1_000_000
MARGIN_S = 0.02
"""What is read beyond a clip's ends, so that resampling does not begin from silence."""
UNKNOWN_SIZE = 0xFFFFFFFF
"""The size that streaming writers leave in a RIFF header."""


class AudioViewConfig(Config):
    """How sound is given to the model; mono."""

    rate: int = Field(
        default=48_000, ge=100, le=MOST_RATE, description="samples a second in a batch; others are resampled"
    )
    samples: int = Field(
        default=61_440,
        ge=1,
        description="samples of a clip (paper: 61,440, 1.28 s at 48 kHz); shorter recordings end in silence",
    )
    channel: int | None = Field(default=None, ge=0, description="the channel to take; null: the mean of all")

    @property
    def seconds(self) -> float:
        """Length of a clip."""
        return self.samples / self.rate


@dataclass(frozen=True)
class Sound:
    """An audio file whose header was read.

    Attributes:
        file: open; one reader at a time.
        rate: samples a second.
        frames: samples of each channel.
        channels: how many.
    """

    file: soundfile.SoundFile
    rate: int
    frames: int
    channels: int

    @property
    def seconds(self) -> float:
        """Length."""
        return self.frames / self.rate


def open_sound(encoded: bytes, max_seconds: float) -> Sound | None:
    """Read the header; None if the format is not one of libsndfile's.

    Raises:
        BadSample: empty, no samples, too long, cut off, or of an absurd rate.
    """
    if not encoded:
        raise BadSample("0 bytes")
    try:
        file = soundfile.SoundFile(pa.BufferReader(encoded))  # which reads a view without copying it
    except (soundfile.LibsndfileError, RuntimeError, TypeError, ValueError):
        return None
    sound = Sound(file, file.samplerate, file.frames, file.channels)
    check_length(sound.seconds if sound.frames < 2**62 else math.inf, max_seconds)
    if sound.rate > MOST_RATE:
        raise BadSample(f"{sound.rate} samples a second is more than {MOST_RATE}")
    size = int.from_bytes(encoded[4:8], "little")
    if encoded[:4] == b"RIFF" and size != UNKNOWN_SIZE and size + 7 > len(encoded):
        raise BadSample("cut off: the file is shorter than its header says")
    return sound


def check_length(seconds: float, max_seconds: float) -> None:
    """Refuse recordings without length and those that are too long.

    Raises:
        BadSample: so.
    """
    if seconds <= 0:
        raise BadSample("0 seconds of sound or pictures")
    if seconds > max_seconds:
        raise BadSample(f"longer than {max_seconds:g} seconds")


def sound_clip(sound: Sound, start: float, config: AudioViewConfig) -> Samples:
    """Samples (T,) from `start` seconds on; silence stands before the recording's start and after its end.

    Raises:
        BadSample: damaged within the clip, NaN or infinite samples, or the wanted channel is missing.
    """
    first, count = source_span(start, config, sound.rate)
    begin, end = min(max(first, 0), sound.frames), min(max(first + count, 0), sound.frames)
    try:
        sound.file.seek(begin)
        exact = sound.file.subtype == "PCM_16" and sound.channels == 1
        found = sound.file.read(end - begin, dtype="int16" if exact else "float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise BadSample(f"undecodable audio: {str(error).splitlines()[0].split('>')[-1].strip(': ')[:80]}") from error
    if len(found) < end - begin:
        raise BadSample("cut off: the sound is shorter than its header says")
    return finish(found, begin - first, count, start - first / sound.rate, sound.rate, config)


def source_span(start: float, config: AudioViewConfig, rate: int) -> tuple[int, int]:
    """First sample and number of samples to read for a clip from a source of that rate; the first may be negative."""
    if rate == config.rate:
        return round(start * rate), config.samples
    first = math.floor((start - MARGIN_S) * rate)
    return first, math.ceil((start + config.seconds + MARGIN_S) * rate) - first


def finish(found: Found, offset: int, count: int, lead: float, rate: int, config: AudioViewConfig) -> Samples:
    """Mix, pad, resample and cut what was read.

    Args:
        found: (n, channels).
        offset: where in the span its first sample belongs.
        count: samples of the span, at the source's rate.
        lead: seconds from the span's start to the clip's.
        rate: of the source.
        config: what is wanted.

    Raises:
        BadSample: samples that are not finite, or a missing channel.
    """
    mixed = _mono(found, config.channel)
    if len(mixed) < count:
        padded = np.zeros(count, mixed.dtype)
        padded[offset : offset + len(mixed)] = mixed
        mixed = padded
    if rate != config.rate:
        floats = mixed if mixed.dtype == np.float32 else mixed.astype(np.float32) / FULL_SCALE
        mixed = soxr.resample(floats, rate, config.rate, quality="HQ")
        skip = round(lead * config.rate)
        mixed = mixed[skip : skip + config.samples]
    if mixed.dtype != np.int16:
        scaled = mixed * np.float32(FULL_SCALE)
        mixed = np.clip(np.rint(scaled, out=scaled), -FULL_SCALE, FULL_SCALE - 1, out=scaled).astype(np.int16)
    if len(mixed) < config.samples:
        mixed = np.pad(mixed, (0, config.samples - len(mixed)))
    return mixed


def _mono(found: Found, channel: int | None) -> Found:
    if channel is not None and channel >= found.shape[1]:
        raise BadSample(f"channel {channel} of {found.shape[1]} is missing")
    if found.shape[1] == 1:
        mono = found[:, 0]
    elif channel is not None:
        mono = found[:, channel]
    else:
        mono = found @ np.full(found.shape[1], 1 / found.shape[1], np.float32)
    if mono.dtype == np.float32 and not np.isfinite(mono).all():
        raise BadSample("samples that are not finite")
    return mono
